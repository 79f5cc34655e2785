"""Progress of long work on stderr: bars in a terminal, lines elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from el_convert.run_state import EpochRow
from el_convert.watcher import Watcher


class _Bars(Watcher):
    """A bar for the epoch and one for the whole run, and a line for each epoch."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress, self._console = progress, console
        self._run = progress.add_task("run", total=None, note="")
        self._now = progress.add_task("epoch", total=None, note="")
        self._loss = math.nan

    def epoch_starts(self, epoch: int, epochs: int, step: int, batches: int) -> None:
        self._progress.update(self._run, total=epochs, completed=epoch, note=f"step {step}")
        self._progress.reset(self._now, total=batches, description=f"epoch {epoch + 1}")
        self._epochs = epochs

    def batch_done(self, loss: float, images: int, lr: float) -> None:
        self._loss = loss if math.isfinite(loss) else self._loss
        speed = self._progress.tasks[self._now].speed or 0.0
        note = f"loss {self._loss:.4f}  lr {lr:.2g}  {speed * images:.0f} images/s"
        self._progress.update(self._now, advance=1, note=note)

    def epoch_ends(self, row: EpochRow) -> None:
        self._progress.update(self._run, advance=1)
        self._console.print(epoch_line(row, self._epochs), soft_wrap=True)

    def corrupt_image(self, name: str) -> None:
        self._console.print(f"skipped, it does not decode: {name}", soft_wrap=True)


def epoch_line(row: EpochRow, epochs: int) -> str:
    """One epoch in words."""
    line = f"epoch {row.epoch + 1}/{epochs}: loss {row.train_loss:.4f}"
    if math.isfinite(row.top1):
        line += f", top-1 {row.top1:.2f} %, top-5 {row.top5:.2f} %"
    line += f", {row.images_per_second:.0f} images/s"
    return line + (f", {row.corrupt} corrupt images skipped" if row.corrupt else "")


@contextmanager
def shown() -> Iterator[Watcher]:
    """A watcher that shows a training run."""
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield _Bars(progress, console)


@contextmanager
def counted(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of so many images; gives what advances it."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.print(f"{label} ...", soft_wrap=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        yield lambda images: progress.advance(task, images)


def class_lines(rows: Sequence[tuple[str, float, int]]) -> Iterator[str]:
    """Accuracy of each class, the worst first: name, percent, images, with tabs between."""
    for name, right, images in sorted(rows, key=lambda row: row[1]):
        yield f"{name}\t{right:.2f} %\t{images}"
