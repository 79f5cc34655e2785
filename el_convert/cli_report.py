"""`el-convert report`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from el_convert.cli_files import FILE, read_model
from el_convert.cli_options import (
    EVALUATION,
    PATH,
    image_options,
    options_of,
    size_option,
    warn_corrupt,
)
from el_convert.console import check_output, errors_as_exits, step
from el_convert.train_options import ImageOptions

if TYPE_CHECKING:
    from torch import nn

    from el_convert.datasets import LabelledImages
    from el_convert.findings import Findings
    from el_convert.header import Header


@click.command()
@click.argument("file", type=FILE)
@click.option("--data", type=PATH, help="Folder of classes, with val in it, or tar.")
@click.option("--out", type=PATH, required=True, help="File to write: .html.")
@click.option("--figures", type=PATH, help="Folder for the page's charts as PNG files.")
@click.option(
    "--images",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="How many of the images to look at, of every class evenly.",
)
@click.option("--note", default="", help="A sentence to show, such as what it was trained on.")
@size_option
@options_of(ImageOptions, EVALUATION)
def report(
    file: Path,
    data: Path | None,
    out: Path,
    figures: Path | None,
    images: int,
    note: str,
    image_size: int | None,
    **given: Any,
) -> None:
    """Write one HTML page about the network in FILE, packed or not.

    How much smaller and cheaper it is, layer by layer, and what was kept in float. With --data also
    the signs of each layer's inputs, what gates and links do, and whether the packed network
    agrees; a FILE that is not packed tells more. The page needs nothing else to be read.
    """
    check_output(out, (".html",))
    if figures is not None:
        _check_folder(figures)
    with step("loading torch"):
        from el_convert.figures import check_figures
        from el_convert.reporting import default_texts, write_report
        from el_convert.zoo import create
    with errors_as_exits():
        if figures is not None:
            check_figures(figures)
        model, source, header = read_model(file)
        options = image_options(model, source, image_size, given)
        chosen = None if data is None else _open(data, options, images)
        texts = default_texts(model, options.size, data="" if data is None else data.name)
        with step(f"building {source} in float"):
            original = create(source)
        with _batches(model, chosen, options) as (batches, progress):
            found = write_report(
                model,
                out,
                batches,
                original=original,
                input_size=options.size,
                figures=figures,
                texts=replace(texts, about=f"{texts.about}; {_origin(file, header)}", note=note),
                progress=progress,
            )
    if chosen is not None:
        warn_corrupt(chosen)
    click.echo(f"wrote {out} ({out.stat().st_size / 1e3:.0f} kB): {_headline(found)}")


def _check_folder(folder: Path) -> None:
    problem = ""
    if folder.exists() and not folder.is_dir():
        problem = f"{folder} is a file"
    elif not folder.parent.is_dir():
        problem = f"folder {folder.parent} does not exist: mkdir -p {folder.parent}"
    if problem:
        raise click.BadParameter(problem, param_hint="--figures")


def _open(data: Path, options: ImageOptions, count: int) -> LabelledImages:
    from el_convert.datasets import open_images, split_of

    with step("listing images"):
        images = open_images(split_of(data), options, training=False)
    return images.first(min(count, len(images)))


@contextmanager
def _batches(
    model: nn.Module, images: LabelledImages | None, options: ImageOptions
) -> Iterator[tuple[Iterable[Any] | None, Callable[[int], None] | None]]:
    """Batches, without labels where these are not the model's; and what to tell of progress."""
    if images is None:
        with step("counting operations"):
            yield None, None
        return
    from el_convert.datasets import evaluation_loader
    from el_convert.evaluation import class_count
    from el_convert.progress import counted

    loader = evaluation_loader(images, options)
    classes = class_count(model, options)
    known = classes == len(images.classes)
    if not known:
        click.echo(
            f"top-1 left out: {images.root} has {len(images.classes)} classes, the model {classes}",
            err=True,
        )
    with counted("looking at images", len(images)) as progress:
        yield (batch if known else (batch[0], None) for batch in loader), progress


def _origin(file: Path, header: Header) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in (header.created_with or {}).items())
    return f"{file.name}, written by {versions}"


def _headline(found: Findings) -> str:
    fewer = "" if found.cheaper is None else f"{found.cheaper:.1f}x fewer operations, "
    one_bit = sum(layer.group == "1-bit" for layer in found.layers)
    convolutions = f"{one_bit} of {len(found.after.convolutions)} convolutions at 1 bit"
    return f"{found.smaller:.1f}x smaller, {fewer}{convolutions}"
