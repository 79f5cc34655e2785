"""`el-convert train`, `evaluate` and `calibrate`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from el_convert.cli_files import FILE, OUT, OUT_HELP, read_model
from el_convert.cli_options import (
    EVALUATION,
    INPUT_FILE,
    PATH,
    device_of,
    device_option,
    image_options,
    options_of,
    size_option,
    warn_corrupt,
)
from el_convert.console import check_model_output, errors_as_exits, step
from el_convert.errors import TrainingError
from el_convert.train_options import ImageOptions, TrainOptions

if TYPE_CHECKING:
    from torch import nn


@click.command()
@click.argument("file", type=FILE)
@click.option(
    "--data", type=PATH, required=True, help="Folder of classes, of train and val, or tar."
)
@click.option("--val", type=PATH, help="Images to validate on, where not beside the others.")
@click.option("--out", type=OUT, required=True, help=OUT_HELP)
@click.option("--run", type=PATH, help="Folder of the run; OUT's name with .run by default.")
@click.option("--resume", is_flag=True, help="Go on where the run stopped.")
@click.option(
    "--weights", type=INPUT_FILE, help="Float checkpoint of the same network to start from."
)
@click.option("--teacher", help="Model name, whose trained weights are used, or a converted FILE.")
@click.option("--teacher-weights", type=INPUT_FILE, help="Float checkpoint of a named teacher.")
@size_option
@device_option
@options_of(ImageOptions)
@options_of(TrainOptions)
def train(
    file: Path,
    data: Path,
    val: Path | None,
    out: str,
    run: Path | None,
    resume: bool,
    weights: Path | None,
    teacher: str | None,
    teacher_weights: Path | None,
    image_size: int | None,
    device: str | None,
    **given: Any,
) -> None:
    """Train the converted network in FILE.

    The recipe says how: in one step or two, with a teacher or without. `torchrun -m el_convert
    train ...` trains on many GPUs; the learning rate is that of the whole batch.
    """
    check_model_output(out)
    with step("loading torch"):
        from el_convert.checkpoint import save
        from el_convert.datasets import find_splits, open_images
        from el_convert.float_weights import load_float_weights
        from el_convert.processes import join_processes
        from el_convert.training import check_trainable
        from el_convert.training import train as train_model
    run = run or _beside(Path(out))
    for_images = {f.name: given.pop(f.name) for f in fields(ImageOptions) if f.name in given}
    where = device_of(device)
    with errors_as_exits(), join_processes(where) as processes:
        model, source, _ = read_model(file)
        check_trainable(model)
        options = TrainOptions(**given, images=image_options(model, source, image_size, for_images))
        with step("listing images"):
            train_from, validate_on = find_splits(data, val)
            images = open_images(train_from, options.images, training=True)
            validation = (
                open_images(validate_on, options.images, training=False) if validate_on else None
            )
        if weights is not None:
            with step(f"reading {weights}"):
                left = load_float_weights(model, weights)
            if left:
                click.echo(f"not in {weights}, as initialized: {left}", err=True)
        expert = _teacher(teacher, teacher_weights, len(images.classes)) if teacher else None
        with _shown(processes.first) as watcher:
            done = train_model(
                model,
                images,
                validation,
                options,
                run=run,
                teacher=expert,
                device=where,
                resume=resume,
                watcher=watcher,
                processes=processes,
            )
        if not processes.first:
            return
        with step(f"writing {out}"):
            save(done.model.cpu(), out, source=source)
    if done.curve is None:
        click.echo("no curve.png: pip install 'el_convert[train]' draws it", err=True)
    last = done.rows[-1]
    accuracy = "" if validation is None else f", top-1 {last.top1:.2f} %, top-5 {last.top5:.2f} %"
    click.echo(f"wrote {out}: loss {last.train_loss:.4f}{accuracy}; the run is in {run}")


def _beside(out: Path) -> Path:
    named = out if out.name not in ("", "..") else out.resolve()
    return named.with_suffix(".run")


def _teacher(name: str, weights: Path | None, classes: int) -> nn.Module:
    from el_convert.float_weights import load_float_weights
    from el_convert.folders import is_saved
    from el_convert.zoo import create, find_source

    if is_saved(name):
        return read_model(Path(name))[0]
    with step(f"building the teacher {name}"):
        if weights is None:
            return create(find_source(name), pretrained=True)
        teacher = create(find_source(name, num_classes=classes))
        left = load_float_weights(teacher, weights)
        if left:
            raise TrainingError(f"{weights} lacks {left} of the teacher {name}")
        return teacher


@contextmanager
def _shown(first: bool) -> Iterator[Any]:
    from el_convert.watcher import Watcher

    if not first:
        yield Watcher()
        return
    from el_convert.progress import shown

    with shown() as watcher:
        yield watcher


@click.command()
@click.argument("file", type=FILE)
@click.option("--data", type=PATH, required=True, help="Folder of classes, with val in it, or tar.")
@click.option("--per-class", is_flag=True, help="Each class too, the worst first.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@size_option
@device_option
@options_of(ImageOptions, EVALUATION)
def evaluate(
    file: Path,
    data: Path,
    per_class: bool,
    as_json: bool,
    image_size: int | None,
    device: str | None,
    **given: Any,
) -> None:
    """Top-1 and top-5 of the network in FILE, packed or not, on labelled images."""
    with step("loading torch"):
        from el_convert.datasets import check_classes, evaluation_loader, open_images, split_of
        from el_convert.evaluation import class_count
        from el_convert.evaluation import evaluate as evaluate_model
        from el_convert.progress import counted
    where = device_of(device)
    with errors_as_exits():
        model, source, _ = read_model(file)
        options = image_options(model, source, image_size, given)
        images = open_images(split_of(data), options, training=False)
        check_classes(images, class_count(model, options))
        loader = evaluation_loader(images, options)
        with counted("evaluating", len(images)) as progress:
            result = evaluate_model(
                model.to(where),
                loader,
                classes=images.classes if per_class else (),
                device=where,
                progress=progress,
            )
    warn_corrupt(images)
    if as_json:
        click.echo(json.dumps({"file": str(file), **vars(result)}))
        return
    click.echo(
        f"top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %, loss {result.loss:.4f}, "
        f"{result.images} images"
    )
    if per_class:
        from el_convert.progress import class_lines

        for line in class_lines(result.per_class):
            click.echo(line)


@click.command()
@click.argument("file", type=FILE)
@click.option("--data", type=PATH, required=True, help="Images like those to train on.")
@click.option("--out", type=OUT, required=True, help=OUT_HELP)
@click.option("--batches", type=click.IntRange(1), default=20, show_default=True)
@size_option
@device_option
@options_of(ImageOptions, EVALUATION)
def calibrate(
    file: Path,
    data: Path,
    out: str,
    batches: int,
    image_size: int | None,
    device: str | None,
    **given: Any,
) -> None:
    """Fit the norms and learned thresholds of the network in FILE to images.

    Before training, so that it starts from statistics of the binarized network rather than of the
    float one.
    """
    check_model_output(out)
    with step("loading torch"):
        from itertools import islice

        from el_convert.calibration import calibrate as calibrate_model
        from el_convert.checkpoint import save
        from el_convert.datasets import EpochSampler, find_splits, open_images, training_loader
        from el_convert.training import check_trainable
    where = device_of(device)
    with errors_as_exits():
        model, source, _ = read_model(file)
        check_trainable(model)
        options = replace(image_options(model, source, image_size, given), augment=False)
        images = open_images(find_splits(data, None)[0], options, training=False)
        options = replace(options, batch_size=min(options.batch_size, len(images)))
        order = EpochSampler(len(images), options.batch_size, seed=0)
        loader = training_loader(images, options, order)
        with step(f"calibrating on {min(batches, len(loader))} batches"):
            found = calibrate_model(model.to(where), islice(loader, batches), device=where)
        warn_corrupt(images)
        with step(f"writing {out}"):
            save(model.cpu(), out, source=source)
    click.echo(
        f"wrote {out}: {found.norms} norms and the thresholds of {found.thresholds} layers, "
        f"from {found.batches} batches"
    )
