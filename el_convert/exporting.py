"""Files for other runtimes: written only where they agree with the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from el_convert.atomic import replace_file
from el_convert.errors import ExportError, first_line
from el_convert.onnx_graph import OPSET, onnx_program
from el_convert.packed import PackedConv
from el_convert.packing import pack

_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_BATCHES = (1, 3)  # what the file is tried on: the batch size is free
_SEED = 0


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        bytes: its size.
        opset: version of ONNX's operators.
        packed: how many convolutions are stored at 1 bit a weight.
        error: the largest difference from the model, relative to its largest output.
        images: how many images that is from.
    """

    path: Path
    bytes: int
    opset: int
    packed: int
    error: float
    images: int


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: str = "onnx",
    input_size: Sequence[int] = (3, 224, 224),
    images: Tensor | None = None,
    float_weights: bool = False,
    tolerance: float = 1e-4,
) -> Exported:
    """Write a binarized network for another runtime, once it was seen to agree there.

    The ONNX file has standard operators only, any batch size, and weights at one bit each, as
    bytes that operators of the graph unpack. Initializers keep their names. The file is checked by
    `onnx.checker` and run by ONNX Runtime on random images, and on `images`.

    Args:
        model: made by `binarize`, `load` or `pack`, trained; not changed.
        path: file to write.
        format: "onnx".
        input_size: (C, H, W).
        images: (N, C, H, W), more to compare on, as the model takes them.
        float_weights: store weights as float32, for runtimes without `BitShift`.
        tolerance: the largest difference from the model's outputs, relative to the largest of
            them, with which a file is written.

    Returns:
        What was written.

    Raises:
        ConversionError: the model is not binarized or has nothing to pack.
        ExportError: the extra `export` is not installed, the model's forward cannot be exported,
            its outputs are not finite, or the file does not agree: nothing is written.

    Example:
        >>> export(binarize(model).eval(), "model.onnx").packed  # doctest: +SKIP
        52
    """
    if format != "onnx":
        raise ExportError(f"format must be 'onnx', not {format!r}")
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"{' and '.join(missing)} not installed: pip install 'el_convert[export]' brings them"
        )
    packed = model if _packed_layers(model) else pack(model)
    batches = [*_random_batches(input_size), *([] if images is None else [images])]
    expected = [_outputs(packed, batch) for batch in batches]
    sample = batches[len(_BATCHES) - 1]
    names = ["output"] if len(expected[0]) == 1 else [f"output{i}" for i in range(len(expected[0]))]
    program = onnx_program(packed, sample, names, float_weights=float_weights)
    errors: list[float] = []

    def write(temporary: Path) -> None:
        program.save(str(temporary), external_data=False)
        run = _checked(temporary)
        errors.extend(
            _difference(run(batch), wanted) for batch, wanted in zip(batches, expected, strict=True)
        )
        if not max(errors) <= tolerance:
            raise ExportError(
                f"ONNX Runtime differs from the model by {max(errors):.1e}, more than the "
                f"tolerance of {tolerance:.0e}: nothing was written"
            )

    replace_file(Path(path), write)
    return Exported(
        Path(path),
        Path(path).stat().st_size,
        OPSET,
        _packed_layers(packed),
        max(errors),
        sum(len(batch) for batch in batches),
    )


def _packed_layers(model: nn.Module) -> int:
    return sum(isinstance(module, PackedConv) for module in model.modules())


def _random_batches(size: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    return [torch.randn(batch, *size, generator=generator) for batch in _BATCHES]


@torch.no_grad()
def _outputs(model: nn.Module, batch: Tensor) -> list[Tensor]:
    """The tensors of a model's output, in the order in which exporters flatten it."""
    found, _ = torch.utils._pytree.tree_flatten(model(batch))
    tensors = [value for value in found if isinstance(value, Tensor)]
    if not all(bool(value.isfinite().all()) for value in tensors):
        raise ExportError(
            "the model's outputs are not finite, so no file can be compared with it: train it, or "
            "let its norms see images with calibrate"
        )
    return tensors


def _checked(file: Path) -> Callable[[Tensor], list[Tensor]]:
    """The file in ONNX Runtime, after ONNX's own check."""
    import onnx
    import onnxruntime

    try:
        onnx.checker.check_model(str(file), full_check=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # of either library's own kinds
        raise ExportError(f"the file is not good ONNX ({first_line(error)})") from error
    (name,) = (given.name for given in session.get_inputs())

    def run(batch: Tensor) -> list[Tensor]:
        outputs: list[Any] = session.run(None, {name: batch.numpy()})
        return [torch.from_numpy(output) for output in outputs]

    return run


def _difference(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest value of the same output."""
    if [tuple(value.shape) for value in given] != [tuple(value.shape) for value in wanted]:
        return math.inf
    pairs = zip(given, wanted, strict=True)
    return max(
        float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
        for ours, theirs in pairs
    )
