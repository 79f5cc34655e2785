"""Options that several commands share: where images come from, and where a model runs."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from el_convert.train_options import ImageOptions, field_help

if TYPE_CHECKING:
    import torch
    from torch import nn

    from el_convert.datasets import LabelledImages

_FROM_MODEL = ("size", "mean", "std", "images")
EVALUATION = ("batch_size", "workers", "crop_pct", "corrupt")
INPUT_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
PATH = click.Path(path_type=Path)


def options_of(kind: type, names: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """A click option for each field of an options class, its help from the class's docstring."""
    hints, helps = get_type_hints(kind), field_help(kind)

    def decorate(command: Any) -> Any:
        for field in reversed(fields(kind)):
            if field.name in _FROM_MODEL or (names and field.name not in names):
                continue
            default = None if field.default is MISSING else field.default
            flag = "--" + field.name.replace("_", "-")
            text = helps[field.name][0].upper() + helps[field.name][1:]
            command = _option(flag, hints[field.name], default, text)(command)
        return command

    return decorate


def _option(flag: str, hint: Any, default: Any, text: str) -> Callable[[Any], Any]:
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = [part for part in get_args(hint) if part is not type(None)]
    options: dict[str, Any] = {
        "default": default,
        "help": text,
        "show_default": default is not None,
    }
    if hint is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", **options)
    if get_origin(hint) is Literal:
        kinds = {str(choice): choice for choice in get_args(hint)}
        options["callback"] = lambda _, __, value: kinds.get(str(value))
        return click.option(flag, type=click.Choice(list(kinds)), **options)
    if get_origin(hint) is tuple:
        return click.option(flag, type=get_args(hint)[0], nargs=len(get_args(hint)), **options)
    return click.option(flag, type=hint, **options)


def device_option(command: Any) -> Any:
    """`--device`; `device_of` reads it."""
    return click.option("--device", help="cpu, cuda, cuda:1, ...; the GPU where there is one.")(
        command
    )


def size_option(command: Any) -> Any:
    """`--image-size`."""
    help = "Side of the images, where it is not the model's own."
    return click.option("--image-size", type=click.IntRange(1), help=help)(command)


def device_of(name: str | None) -> torch.device:
    """The device of that name; without one the GPU where there is one.

    Raises:
        click.BadParameter: torch has no such device here.
    """
    import os

    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(str(error).split("\n")[0], param_hint="--device") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def image_options(
    model: nn.Module, source: Any, side: int | None, given: dict[str, Any]
) -> ImageOptions:
    """How to read images for a model, as the command line and its library say."""
    from el_convert.zoo import input_spec

    spec = input_spec(model, source)
    size = spec.size if side is None else (spec.size[0], side, side)
    return ImageOptions((size[0], size[1], size[2]), tuple(spec.mean), tuple(spec.std), **given)


def warn_corrupt(images: LabelledImages) -> None:
    """Name on stderr what did not decode."""
    from el_convert.errors import first_few

    names = list(dict.fromkeys(images.corrupt_names()))
    if names:
        click.echo(
            f"{len(names)} images do not decode and were skipped: {first_few(names)}", err=True
        )
