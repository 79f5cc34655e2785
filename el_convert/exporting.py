"""Files for other runtimes: written only where they agree with the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
from el_convert.torch_export import open_program, save_program, torch_program

_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_BATCHES = (1, 3)  # what the file is tried on: the batch size is free
_SEED = 0


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        bytes: its size.
        opset: version of ONNX's operators; 0 for other formats.
        packed: how many convolutions are stored at 1 bit a weight.
        error: the largest difference from the model, relative to its largest output.
        images: how many images that is from.
        any_batch: whether the file takes batches of any size, or one image at a time.
    """

    path: Path
    bytes: int
    opset: int
    packed: int
    error: float
    images: int
    any_batch: bool = True


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

    "torch" writes a program of `torch.export`, for AOTInductor and the like, with every binary
    convolution as `torch.ops.el_convert.binary_conv2d`, and tries it in the same way. It is not the
    safe format: `torch.export.load` can run code that a file holds, so load only what you trust,
    and `import el_convert.kernels`, which knows the operator, before that.

    Args:
        model: made by `binarize`, `load` or `pack`, trained; not changed.
        path: file to write.
        format: "onnx", or "torch" for a `.pt2` file.
        input_size: (C, H, W).
        images: (N, C, H, W), more to compare on, as the model takes them.
        float_weights: store weights as float32, for runtimes without `BitShift`; for "onnx".
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
    _check_format(format, float_weights)
    packed = model if _packed_layers(model) else pack(model)
    batches = [*_random_batches(input_size), *([] if images is None else [images])]
    expected = [_outputs(packed, batch) for batch in batches]
    sample, any_batch = batches[len(_BATCHES) - 1], True
    save: Callable[[Path], None]
    opened: Callable[[Path], Callable[[Tensor], list[Tensor]]]
    if format == "torch":
        reader, opened = "the program", open_program
        program, any_batch = torch_program(packed, sample)
        save = partial(save_program, program)
    else:
        reader, opened = "ONNX Runtime", _checked
        save = _onnx_writer(packed, sample, len(expected[0]), float_weights)
    if not any_batch:
        batches = [image for batch in batches for image in torch.split(batch, 1)]
        expected = [_outputs(packed, batch) for batch in batches]
    errors: list[float] = []

    def write(temporary: Path) -> None:
        save(temporary)
        run = opened(temporary)
        errors.extend(
            _difference(run(batch), wanted) for batch, wanted in zip(batches, expected, strict=True)
        )
        if not max(errors) <= tolerance:
            raise ExportError(
                f"{reader} differs from the model by {max(errors):.1e}, more than the "
                f"tolerance of {tolerance:.0e}: nothing was written"
            )

    replace_file(Path(path), write)
    return Exported(
        Path(path),
        Path(path).stat().st_size,
        OPSET if format == "onnx" else 0,
        _packed_layers(packed),
        max(errors),
        sum(len(batch) for batch in batches),
        any_batch,
    )


def _check_format(format: str, float_weights: bool) -> None:
    if format not in ("onnx", "torch"):
        raise ExportError(f"format must be 'onnx' or 'torch', not {format!r}")
    if format == "torch" and float_weights:
        raise ExportError("float_weights is for format 'onnx': leave it out")
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if format == "onnx" and missing:
        raise ExportError(
            f"{' and '.join(missing)} not installed: pip install 'el_convert[export]' brings them"
        )


def _onnx_writer(
    packed: nn.Module, sample: Tensor, outputs: int, float_weights: bool
) -> Callable[[Path], None]:
    names = ["output"] if outputs == 1 else [f"output{i}" for i in range(outputs)]
    program = onnx_program(packed, sample, names, float_weights=float_weights)
    return lambda path: program.save(str(path), external_data=False)


def _packed_layers(model: nn.Module) -> int:
    return sum(isinstance(module, PackedConv) for module in model.modules())


def _random_batches(size: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    return [torch.randn(batch, *size, generator=generator) for batch in _BATCHES]


@torch.no_grad()
def _outputs(model: nn.Module, batch: Tensor) -> list[Tensor]:
    """The tensors of a model's output, in the order in which exporters flatten it."""
    try:
        found, _ = torch.utils._pytree.tree_flatten(model(batch))
    except Exception as error:  # of any kind: a forward is the user's code
        raise ExportError(
            f"{type(model).__name__} does not run on a batch of {list(batch.shape)} "
            f"({first_line(error)}): give its input_size; models of other inputs than one batch "
            "of images cannot be exported"
        ) from error
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
