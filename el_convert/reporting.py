"""Reports of binarized networks: a page to read, figures to print."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from el_convert.atomic import replace_file
from el_convert.convert import conversion_of
from el_convert.errors import ExportError
from el_convert.figures import check_figures, draw_figures
from el_convert.findings import Findings, examine
from el_convert.page import PageTexts, as_page
from el_convert.zoo import source_of


def write_report(
    model: nn.Module,
    path: str | os.PathLike[str],
    batches: Iterable[Any] | None = None,
    *,
    original: nn.Module | None = None,
    input_size: Sequence[int] | None = None,
    figures: str | os.PathLike[str] | None = None,
    texts: PageTexts | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Findings:
    """Write one self-contained HTML page about a binarized network.

    What it shows: how much smaller and cheaper the network is, its layers with their bits,
    operations and bytes, what was kept and why; with images also the signs of each layer's inputs,
    what links give, and whether the packed network agrees. The page loads nothing and asks nobody.

    Args:
        model: made by `binarize`, `load` or `pack`; left as it was.
        path: file to write; an existing one is replaced in one step or stays as it was.
        batches: of images (N, C, H, W) as the model takes them and labels (N,), or None for
            labels; None leaves out what depends on images, and the page says so.
        original: the float network it was made from, see `examine`.
        input_size: (C, H, W), as `summarize` takes it.
        figures: folder for the page's charts as PNG files, made where it is missing.
        texts: heading and notes; by default the model's name and recipe.
        device: where the model is.
        progress: called with the number of images after each batch.

    Returns:
        What the page shows, as data.

    Raises:
        ConversionError: the model is not binarized, does not run on that input, or `original` is
            another network.
        DataError: there is no image in `batches`.
        ExportError: there is no folder to write to, or figures are wanted and matplotlib is not
            installed; nothing was written.

    Example:
        >>> write_report(model, "report.html", loader).smaller  # doctest: +SKIP
        12.9
    """
    if not Path(path).parent.is_dir():
        raise ExportError(f"{path} cannot be written: its folder does not exist")
    if figures is not None:
        check_figures(figures)
    found = examine(
        model, batches, original=original, input_size=input_size, device=device, progress=progress
    )
    text = as_page(found, texts or default_texts(model, found.after.input_size))

    def write(part: Path) -> None:
        part.write_text(text, encoding="utf-8", newline="\n")

    replace_file(Path(path), write)
    if figures is not None:
        draw_figures(found, figures)
    return found


def default_texts(
    model: nn.Module, input_size: Sequence[int] | None, *, data: str = ""
) -> PageTexts:
    """The heading and the line below it that a binarized model gives itself."""
    source = source_of(model)
    name = type(model).__name__ if source is None else str(source)
    size = "x".join(map(str, input_size or ())) or "of unknown size"
    return PageTexts(
        f"{name}, binarized", f"recipe {conversion_of(model).recipe.name}, input {size}", data=data
    )
