"""What all commands share: exit codes, progress on stderr, and where a file may be written."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import click

from el_convert.atomic import names_folder
from el_convert.errors import ElConvertError, SourceError, UnknownNameError

_SUFFIXES = (".pt", ".safetensors")


@contextmanager
def errors_as_exits() -> Iterator[None]:
    """What a user can mend by typing something else exits 2; a refusal exits 1."""
    from el_convert.recipes import RecipeError

    try:
        yield
    except (UnknownNameError, RecipeError, SourceError) as error:
        raise click.UsageError(str(error)) from error
    except ElConvertError as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def step(label: str) -> Iterator[None]:
    """Say on stderr what is going on; a spinner where stderr is a terminal."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        with console.status(label):
            yield
    else:
        console.print(f"{label} ...", soft_wrap=True)
        yield


def check_model_output(out: str) -> None:
    """Refuse a file or folder that a model cannot be written to, before anything slow.

    Args:
        out: as it was typed: "bnn/" is a folder.

    Raises:
        click.BadParameter: wrong suffix, missing or read-only folder.
    """
    folder = Path(out)
    if not names_folder(out, _SUFFIXES):
        check_output(folder, _SUFFIXES, " or in / for a folder")
    elif folder.is_file():
        _refuse(f"{out}: {folder} is a file")
    else:
        _check_parent(folder if folder.exists() else folder.parent)


def check_output(out: Path, suffixes: tuple[str, ...], more: str = "") -> None:
    """Refuse an output file that cannot be written, before anything slow.

    Args:
        out: the file.
        suffixes: what its name may end in.
        more: what else it may be, for the message.

    Raises:
        click.BadParameter: wrong suffix, missing or read-only folder, or a folder itself.
    """
    if out.suffix not in suffixes:
        _refuse(f"{out}: the name must end in {' or '.join(suffixes)}{more}")
    _check_parent(out.parent)
    if out.is_dir():
        _refuse(f"{out} is a folder")


def _check_parent(folder: Path) -> None:
    if not folder.is_dir():
        _refuse(f"folder {folder} does not exist: mkdir -p {folder}")
    if not os.access(folder, os.W_OK):
        _refuse(f"folder {folder} is not writable")


def _refuse(problem: str) -> NoReturn:
    raise click.BadParameter(problem, param_hint="--out")


def print_result(result: object) -> None:
    """With colours in a terminal, as text elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(result)
    else:
        click.echo(str(result))
