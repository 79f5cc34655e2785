"""Running ONNX files in OpenVINO, as they are or with its own 1-bit convolutions.

OpenVINO's CPU plugin has 1-bit convolutions: it makes them itself where inputs are quantized to
two levels and weights are +1 and -1.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_MULTIPLE = 8  # of input channels: with others its 1-bit convolutions are wrong or do not compile
_BINARY = "BinaryConvolution"
_BIASES = {"Constant", "Reshape"}


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

    Those whose input channels are a multiple of 8, without groups, and on no shortcut: inputs are
    quantized to 0 and 1, weights to their signs, and the result is scaled. Where there is padding
    this is not what +1 and -1 would give. It is not the fastest that OpenVINO can do: convolutions
    that share an input stay in float.

    Raises:
        RuntimeError: OpenVINO makes 1-bit convolutions of none, or does not survive them.
    """
    # With some sums of two convolutions OpenVINO crashes, and with it the process.
    call = f"from {__name__} import _try; _try({str(file)!r}, {tuple(input.shape)}, {threads})"
    if subprocess.run([sys.executable, "-c", call], capture_output=True).returncode < 0:  # noqa: S603
        raise RuntimeError("OpenVINO's 1-bit convolutions crash with this model")
    return _runs(_compiled_binary(file, threads), input)


def _try(file: str, shape: tuple[int, ...], threads: int) -> None:
    compiled = _compiled_binary(Path(file), threads)
    compiled.create_infer_request().infer({0: np.ones(shape, np.float32)})


def _compiled_binary(file: Path, threads: int) -> Any:
    model = importlib.import_module("openvino").Core().read_model(str(file))
    binarize_convolutions(model)
    compiled = _compiled(model, threads)
    if _BINARY not in layer_types(compiled):
        raise RuntimeError("OpenVINO runs no convolution of this model at 1 bit on this machine")
    return compiled


def binarize_convolutions(model: Any) -> None:
    """Rewrite an `openvino.Model` in place."""
    convolutions = [n for n in model.get_ordered_ops() if n.get_type_name() == "Convolution"]
    shortcuts = {n.get_friendly_name() for n in convolutions if _is_shortcut(n)}
    for node in convolutions:
        weights = node.input_value(1).get_node()
        if weights.get_type_name() != "Constant" or node.get_friendly_name() in shortcuts:
            continue
        if weights.data.shape[1] % _MULTIPLE == 0:
            _binarize(node, weights.data)


def _is_shortcut(node: Any) -> bool:
    """Whether others read its input too, and its result, with a bias at most, goes into a sum."""
    if len(node.input_value(0).get_target_inputs()) < 2:
        return False
    for _ in range(2):
        inputs = node.output(0).get_target_inputs()
        readers = [each.get_node() for each in inputs]
        sums = [reader for reader in readers if reader.get_type_name() == "Add"]
        if not sums or any(r.get_type_name() not in ("Add", "ShapeOf") for r in readers):
            return False
        terms = {value.get_node().get_type_name() for value in sums[0].input_values()}
        if not terms & _BIASES:
            return True
        node = sums[0]
    return False


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
