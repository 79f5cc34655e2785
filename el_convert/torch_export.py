"""A packed network as a program of `torch.export`, its binary convolutions one operator each."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from el_convert.errors import ExportError, first_line


def torch_program(model: nn.Module, input: Tensor) -> tuple[ExportedProgram, bool]:
    """Trace a packed network.

    Args:
        model: packed, in eval mode.
        input: (N, C, H, W) with N of 2 or more.

    Returns:
        The program, and whether it takes any N; if not it takes one image.

    Raises:
        ExportError: the model's forward cannot be exported.
    """
    try:
        return _traced(model, input, {0: Dim("batch")}), True
    except Exception:  # of a dozen kinds; what else is wrong shows below
        try:
            return _traced(model, input[:1], None), False
        except Exception as error:
            raise ExportError(
                f"{type(model).__name__} cannot be exported ({first_line(error)})"
            ) from error


def _traced(model: nn.Module, input: Tensor, dynamic: dict[int, Dim] | None) -> ExportedProgram:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns about itself
        program = torch.export.export(
            model, (input,), dynamic_shapes=None if dynamic is None else (dynamic,)
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # where in Python: names of the writer's folders
    return program


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write it; the file also holds the input it was traced with, which compilers want."""
    with path.open("wb") as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that weights which are laid out channels_last are odd
        torch.export.save(program, stream)  # given a name, it would want one that ends in .pt2


def open_program(path: Path) -> Callable[[Tensor], list[Tensor]]:
    """A file of our own as a function. Not for others' files: reading one can run code in it."""
    with path.open("rb") as stream:
        program = torch.export.load(stream).module()

    @torch.no_grad()
    def run(batch: Tensor) -> list[Tensor]:
        found, _ = torch.utils._pytree.tree_flatten(program(batch))
        return [value for value in found if isinstance(value, Tensor)]

    return run
