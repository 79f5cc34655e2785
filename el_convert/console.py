"""What all commands share: exit codes, progress on stderr, and where a file may be written."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

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


def check_output(out: Path, suffixes: tuple[str, ...] = _SUFFIXES) -> None:
    """Refuse an output that cannot be written, before anything slow.

    Args:
        out: the file.
        suffixes: what its name may end in.

    Raises:
        click.BadParameter: wrong suffix, missing or read-only folder, or a folder itself.
    """
    problem = ""
    if out.suffix not in suffixes:
        problem = f"{out}: the name must end in {' or '.join(suffixes)}"
    elif not out.parent.is_dir():
        problem = f"folder {out.parent} does not exist: mkdir -p {out.parent}"
    elif out.is_dir():
        problem = f"{out} is a folder"
    elif not os.access(out.parent, os.W_OK):
        problem = f"folder {out.parent} is not writable"
    if problem:
        raise click.BadParameter(problem, param_hint="--out")


def print_result(result: object) -> None:
    """With colours in a terminal, as text elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(result)
    else:
        click.echo(str(result))
