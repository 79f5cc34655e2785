"""What a training run leaves to look at: log.csv, curve.png, and TensorBoard's events."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from el_convert.atomic import replace_file
from el_convert.run_state import EpochRow


def write_csv(path: Path, rows: Sequence[EpochRow]) -> None:
    """All epochs so far, written anew, so that a resumed run has each once."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, [field.name for field in fields(EpochRow)])
            writer.writeheader()
            for row in rows:
                writer.writerow({name: _short(value) for name, value in asdict(row).items()})

    replace_file(path, write)


def _short(value: float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def tensorboard_writer(folder: Path) -> Any | None:
    """A TensorBoard writer, or None where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


def log_row(writer: Any, row: EpochRow) -> None:
    """One epoch for TensorBoard."""
    values = asdict(row)
    for name in ("lr", "train_loss", "loss", "top1", "top5", "images_per_second"):
        if math.isfinite(values[name]):
            writer.add_scalar(name, values[name], row.epoch)
    writer.flush()


def draw_curve(path: Path, rows: Sequence[EpochRow], title: str) -> bool:
    """Loss and accuracy by epoch as a PNG.

    Returns:
        False, with nothing drawn, where matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracy = figure.subplots(1, 2)
    epochs = [row.epoch + 1 for row in rows]
    losses.plot(epochs, [row.train_loss for row in rows], label="training")
    losses.plot(epochs, [row.loss for row in rows], label="validation")
    losses.set(xlabel="epoch", ylabel="loss", title=title)
    losses.legend()
    accuracy.plot(epochs, [row.top1 for row in rows], label="top-1")
    accuracy.plot(epochs, [row.top5 for row in rows], label="top-5")
    accuracy.set(xlabel="epoch", ylabel="validation accuracy (%)")
    accuracy.legend()
    for axes in (losses, accuracy):
        axes.grid(alpha=0.3)
        for row, later in itertools.pairwise(rows):
            if row.step != later.step:
                axes.axvline(row.epoch + 1.5, color="grey", linestyle=":")
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))
    return True
