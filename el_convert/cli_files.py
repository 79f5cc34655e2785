"""Converted files as commands take them and read them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from el_convert.console import step

FILE = click.Path(exists=True, path_type=Path)
"""A saved model: a file, or a folder with config.json and model.safetensors."""

OUT = click.Path(path_type=str)
"""Where to save one, as it was typed: `bnn/` is a folder."""

OUT_HELP = "File to write, .pt or .safetensors, or a folder: bnn/."

if TYPE_CHECKING:
    from torch import nn

    from el_convert.header import Header
    from el_convert.zoo import Source


def read_model(file: Path) -> tuple[nn.Module, Source, Header]:
    """The model in a file, what it was made from, and the file's header.

    Raises:
        click.ClickException: the model is of neither library, so that only Python can build it.
        CheckpointError: as `load` does.
    """
    from el_convert.checkpoint import load, read

    with step(f"reading {file}"):
        header, _ = read(file)
        if header.source is None:
            raise click.ClickException(
                f"{file} is of a model of neither library: in Python, "
                "load(path, model=...) reads it, and what this command does is a function"
            )
        return load(file), header.source, header
