"""Files for other runtimes: written only where they agree with the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from el_convert.agreement import (
    agreeing,
    differences,
    output_names,
    outputs_of,
    random_images,
    refuse_disagreement,
)
from el_convert.atomic import replace_file
from el_convert.errors import ExportError, first_line
from el_convert.onnx_graph import OPSET, onnx_program
from el_convert.openvino_export import write_openvino
from el_convert.packed import PackedConv
from el_convert.packing import pack
from el_convert.torch_export import open_program, save_program, torch_program

_NEEDED: dict[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnx_ir", "onnxscript", "onnxruntime"),
    "torch": (),
    "openvino": ("onnx", "onnx_ir", "onnxscript", "openvino"),
}
_BATCHES = (1, 4)  # what a file is tried on: the batch size is free


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        bytes: its size, for OpenVINO with that of the .bin.
        opset: version of ONNX's operators; 0 for other formats.
        packed: how many convolutions are stored at 1 bit a weight.
        error: the largest difference from the model, relative to an image's largest output.
        images: how many images that is from.
        agreeing: how many of them differ by no more than the tolerance.
        any_batch: whether the file takes batches of any size.
        binary: for OpenVINO, the names of the layers that it was seen to run on its 1-bit kernels.
        in_float: for OpenVINO, (name, why) of the convolutions that it runs in float.
    """

    path: Path
    bytes: int
    opset: int
    packed: int
    error: float
    images: int
    agreeing: int
    any_batch: bool = True
    binary: tuple[str, ...] = ()
    in_float: tuple[tuple[str, str], ...] = ()


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: str = "onnx",
    input_size: Sequence[int] = (3, 224, 224),
    images: Tensor | None = None,
    float_weights: bool = False,
    batch: int | None = None,
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

    The OpenVINO files, `path` and a .bin beside it, have a `BinaryConvolution` for every
    convolution of two dimensions without groups whose input channels are a multiple of 8; other
    ones convolve signs in float. OpenVINO's CPU plugin must have run each on a 1-bit kernel, which
    is read from the graph it executes, and must agree on as many images, or nothing is written.

    Args:
        model: made by `binarize`, `load` or `pack`, trained; not changed.
        path: file to write; for OpenVINO it ends in .xml.
        format: "onnx", "torch" for a .pt2 file, or "openvino".
        input_size: (C, H, W).
        images: (N, C, H, W), more to compare on, as the model takes them.
        float_weights: store weights as float32, for runtimes without `BitShift`; ONNX only.
        batch: images in a run, which OpenVINO's 1-bit kernels need to know: 1 by default.
            OpenVINO's `Model.reshape` changes it later. Other files take any number.
        tolerance: how much an image's outputs may differ from the model's, relative to the
            largest of them. A file is written where more than half of the images agree: in a float
            layer another order of sums can take a number near zero to its other side, and then
            one sign, and with it one image, is another.

    Returns:
        What was written.

    Raises:
        ConversionError: the model is not binarized or has nothing to pack.
        ExportError: the extra `export` is not installed, the model's forward cannot be exported,
            its outputs are not finite, the file does not agree, or an argument does not go with
            the format: nothing is written.

    Example:
        >>> export(binarize(model).eval(), "model.onnx").packed  # doctest: +SKIP
        52
    """
    path = Path(path)
    _refuse_arguments(format, path, float_weights, batch)
    packed = model if _packed_layers(model) else pack(model)
    random = random_images(sum(_BATCHES), input_size)
    batches = [*torch.split(random, list(_BATCHES)), *([] if images is None else [images])]
    if format == "openvino":
        _refuse_sizes(images, input_size)
        done = write_openvino(
            packed, path, torch.cat(batches), batch=batch or 1, tolerance=tolerance
        )
        size = sum(file.stat().st_size for file in done.files)
        layers, found = len(done.binary), _found(done.errors, tolerance)
        return Exported(path, size, 0, layers, *found, False, done.binary, done.in_float)
    if format == "torch":
        errors, any_batch = _write_program(packed, path, batches, tolerance)
    else:
        errors, any_batch = _write_onnx(packed, path, batches, float_weights, tolerance), True
    opset, size = OPSET if format == "onnx" else 0, path.stat().st_size
    found = _found(errors, tolerance)
    return Exported(path, size, opset, _packed_layers(packed), *found, any_batch)


def _found(errors: Sequence[float], tolerance: float) -> tuple[float, int, int]:
    """The largest difference, of how many images, and how many agree."""
    return max(errors), len(errors), agreeing(errors, tolerance)


def _refuse_arguments(format: str, path: Path, float_weights: bool, batch: int | None) -> None:
    if format not in _NEEDED:
        *others, last = map(repr, _NEEDED)
        raise ExportError(f"format must be {', '.join(others)} or {last}, not {format!r}")
    missing = [name for name in _NEEDED[format] if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"{' and '.join(missing)} not installed: pip install 'el_convert[export]' brings them"
        )
    if format != "openvino" and batch is not None:
        raise ExportError("batch is for format 'openvino': leave it out")
    if format != "onnx" and float_weights:
        raise ExportError("float_weights is for format 'onnx': leave it out")
    if format == "openvino" and path.suffix != ".xml":
        raise ExportError(f"{path}: the name of OpenVINO's file must end in .xml")
    if batch is not None and batch < 1:
        raise ExportError(f"batch must be at least 1, not {batch}")


def _refuse_sizes(images: Tensor | None, size: Sequence[int]) -> None:
    if images is not None and tuple(images.shape[1:]) != tuple(size):
        raise ExportError(
            f"images are {tuple(images.shape)}, but OpenVINO's 1-bit kernels take one size: "
            f"pass images of (N, {', '.join(map(str, size))}) or another input_size"
        )


def _write_onnx(
    packed: nn.Module,
    path: Path,
    batches: Sequence[Tensor],
    float_weights: bool,
    tolerance: float,
) -> list[float]:
    """Write it if it agrees, and return by how much each image differs."""
    expected = [outputs_of(packed, batch) for batch in batches]
    names = output_names(expected[0])
    sample = batches[len(_BATCHES) - 1]
    program = onnx_program(packed, sample, names, float_weights=float_weights)
    save = partial(program.save, external_data=False)
    checks = zip(batches, expected, strict=True)
    return _write_checked(path, lambda file: save(str(file)), _checked, checks, tolerance)


def _write_program(
    packed: nn.Module, path: Path, batches: Sequence[Tensor], tolerance: float
) -> tuple[list[float], bool]:
    """The same for `torch.export`; also whether it takes any batch size."""
    outputs_of(packed, batches[0])  # a forward that does not run is told as such
    program, any_batch = torch_program(packed, batches[len(_BATCHES) - 1])
    if not any_batch:
        batches = [image for batch in batches for image in torch.split(batch, 1)]
    checks = [(batch, outputs_of(packed, batch)) for batch in batches]
    errors = _write_checked(path, partial(save_program, program), open_program, checks, tolerance)
    return errors, any_batch


def _write_checked(
    path: Path,
    save: Callable[[Path], object],
    opened: Callable[[Path], Callable[[Tensor], list[Tensor]]],
    checks: Iterable[tuple[Tensor, list[Tensor]]],
    tolerance: float,
) -> list[float]:
    errors: list[float] = []

    def write(temporary: Path) -> None:
        save(temporary)
        run = opened(temporary)
        for batch, wanted in checks:
            errors.extend(differences(run(batch), wanted))
        runtime = "ONNX Runtime" if opened is _checked else "the program"
        refuse_disagreement(runtime, errors, tolerance)

    replace_file(path, write)
    return errors


def _packed_layers(model: nn.Module) -> int:
    return sum(isinstance(module, PackedConv) for module in model.modules())


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
