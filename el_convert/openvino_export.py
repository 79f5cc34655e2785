"""OpenVINO's files: written only where its 1-bit convolutions run and agree with the model."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from el_convert.agreement import differences, output_names, outputs_of, refuse_disagreement
from el_convert.atomic import replace_files
from el_convert.convert import conversion_of
from el_convert.errors import ExportError, first_few
from el_convert.nn import BinaryLayer
from el_convert.openvino_check import run_apart
from el_convert.openvino_graph import misfit, openvino_model
from el_convert.packed import PackedConv


@dataclass(frozen=True)
class Written:
    """What was written, and what OpenVINO makes of it.

    Attributes:
        files: .xml and .bin.
        binary: names of the layers that run on 1-bit kernels.
        in_float: (name, why) of the convolutions that do not.
        errors: for each image its largest difference from the model, as of `differences`.
    """

    files: tuple[Path, ...]
    binary: tuple[str, ...]
    in_float: tuple[tuple[str, str], ...]
    errors: tuple[float, ...]


def write_openvino(
    model: nn.Module, path: Path, images: Tensor, *, batch: int = 1, tolerance: float = 1e-4
) -> Written:
    """Write a packed network, once OpenVINO was seen to run it on 1-bit kernels and to agree.

    OpenVINO runs in a process of its own, which its crashes are welcome to end.

    Args:
        model: packed, in eval mode.
        path: .xml; weights are put beside it, in a .bin of the same name.
        images: (N, C, H, W), to compare on.
        batch: images in a run.
        tolerance: for the difference.

    Raises:
        ExportError: the model cannot be exported, OpenVINO crashes, does not run every binary
            convolution on 1-bit kernels, or does not agree: nothing is written.
    """
    chunks = list(_chunks(images, batch))
    expected = [outputs_of(model, chunk) for chunk in chunks]
    sample = torch.cat([images[:1], images[:1]])  # exporters need two to leave the number free
    translated, calls = openvino_model(model, sample, output_names(expected[0]), batch=batch)
    binary = tuple(dict.fromkeys(calls.values()))
    in_float = tuple(_in_float(model, binary))
    if not binary:
        why = first_few(f"{name}: {reason}" for name, reason in in_float)
        raise ExportError(f"no convolution fits OpenVINO's 1-bit kernels ({why})")
    errors: list[float] = []

    def write(folder: Path) -> None:
        file = folder / path.name
        _save(translated, file)
        results, ran = run_apart(file, [chunk.numpy() for chunk in chunks], folder)
        _refuse_float(calls, ran)
        for arrays, wanted in zip(results, expected, strict=True):
            errors.extend(differences([torch.from_numpy(array) for array in arrays], wanted))
        del errors[len(images) :]  # those that fill up the last run
        refuse_disagreement("OpenVINO", errors, tolerance)

    files = (path, path.with_suffix(".bin"))
    replace_files(files, write)
    return Written(files, binary, in_float, tuple(errors))


def _refuse_float(wanted: Collection[str], ran: set[str]) -> None:
    """Raise ExportError unless all wanted calls ran on 1-bit kernels."""
    others = [name for name in wanted if name not in ran]
    if others:
        raise ExportError(
            f"on this machine OpenVINO runs {len(others)} of {len(wanted)} binary convolutions "
            f"on no 1-bit kernel: {first_few(others)}"
        )


def _save(translated: Any, file: Path) -> None:
    import openvino

    openvino.save_model(translated, str(file), compress_to_fp16=False)


def _chunks(images: Tensor, batch: int) -> Iterator[Tensor]:
    """Runs of `batch` images; where the last is short, the first images fill it up."""
    for start in range(0, len(images), batch):
        yield images[[i % len(images) for i in range(start, start + batch)]]


def _in_float(model: nn.Module, binary: Collection[str]) -> Iterator[tuple[str, str]]:
    for kept in conversion_of(model).kept:
        yield kept.path, kept.reason
    for path, module in model.named_modules():
        if isinstance(module, (PackedConv, BinaryLayer)) and path not in binary:
            yield path, _reason(module)


def _reason(layer: Any) -> str:
    """Why a binarized convolution is none for OpenVINO."""
    if isinstance(layer, BinaryLayer):  # `pack` left it
        return "its kernel is mixed for each image" if not layer.packs else "real-valued weights"
    dims = len(layer.kernel_size)
    if not layer.recipe.input.binary:
        return "real-valued input"
    if layer.transposed or dims != 2:
        return f"transposed, {dims}d" if layer.transposed else f"it is {dims}d, not 2d"
    return misfit(layer.in_channels, layer.groups) or "the forward does not call it on a batch"
