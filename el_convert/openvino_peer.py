"""Running ONNX files in OpenVINO, as they are or with its own 1-bit convolutions.

OpenVINO's CPU plugin has 1-bit convolutions: it makes them itself where inputs are quantized to
two levels and weights are +1 and -1.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

_IMAGE_CHANNELS = 4  # as in a table's row `reads-image`; fewer do not compile to 1 bit
_BINARY = "BinaryConvolution"


def openvino_run(file: Path, input: Tensor, threads: int) -> Callable[[], object]:
    """What runs a model once.

    Args:
        file: ONNX.
        input: (N, C, H, W) float32, contiguous.
        threads: to use.
    """
    return _runs(_compiled(str(file), threads), input)


def openvino_binary_run(file: Path, input: Tensor, threads: int) -> Callable[[], object]:
    """The same with 1-bit convolutions where OpenVINO has them.

    Those of more than 4 input channels and without groups: inputs are quantized to 0 and 1, weights
    to their signs, and the result is scaled. Where there is padding this is not what +1 and -1
    would give, but the fastest that OpenVINO runs.

    Raises:
        RuntimeError: OpenVINO makes 1-bit convolutions of none.
    """
    model = importlib.import_module("openvino").Core().read_model(str(file))
    binarize_convolutions(model)
    compiled = _compiled(model, threads)
    if _BINARY not in layer_types(compiled):
        raise RuntimeError("OpenVINO runs no convolution of this model at 1 bit on this machine")
    return _runs(compiled, input)


def binarize_convolutions(model: Any) -> None:
    """Rewrite an `openvino.Model` in place."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Convolution":
            continue
        weights = node.input_value(1).get_node()
        if weights.get_type_name() == "Constant" and weights.data.shape[1] > _IMAGE_CHANNELS:
            _binarize(node, weights.data)


def _binarize(node: Any, weight: Any) -> None:
    ops: Any = importlib.import_module("openvino.opset13")
    zero, one = (ops.constant(np.full((1, 1, 1, 1), v, np.float32)) for v in (0, 1))
    signs = np.where(weight > 0, 1, -1).astype(np.float32)
    scale = np.abs(weight).mean((1, 2, 3)).reshape(1, -1, 1, 1).astype(np.float32)
    bits = ops.fake_quantize(node.input_value(0), zero, zero, zero, one, 2)
    geometry = [
        node.get_attributes()[name] for name in ("strides", "pads_begin", "pads_end", "dilations")
    ]
    sums = ops.convolution(bits, ops.constant(signs), *geometry)
    scaled = ops.multiply(sums, ops.constant(scale))
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(scaled.output(0))


def layer_types(compiled: Any) -> set[str]:
    """What a compiled model's nodes really are."""
    nodes = compiled.get_runtime_model().get_ordered_ops()
    return {node.get_rt_info()["layerType"].astype(str) for node in nodes}


def _compiled(model: Any, threads: int) -> Any:
    # float32 also where the machine has something shorter, as the other peers.
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    return importlib.import_module("openvino").Core().compile_model(model, "CPU", options)


def _runs(compiled: Any, input: Tensor) -> Callable[[], object]:
    request, feed = compiled.create_infer_request(), {0: input.numpy()}
    return lambda: request.infer(feed)
