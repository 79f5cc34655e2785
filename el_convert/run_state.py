"""The files of a training run: the state it continues from, written so that none is ever lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from el_convert.atomic import replace_file
from el_convert.errors import TrainingError, first_few, first_line

_KEY = "el_convert_run"
_FORMAT = 1


@dataclass(frozen=True)
class EpochRow:
    """What one epoch came to: a line of log.csv.

    Attributes:
        epoch: from 0, over all steps of the training.
        step: 1 or 2 of two-step training.
        lr: learning rate of the last batch.
        train_loss: mean over the epoch.
        top1, top5, loss: on the validation images; NaN without any.
        seconds: of training, without validation.
        images_per_second: of training, all processes together.
        corrupt: images that were skipped.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    top1: float
    top5: float
    loss: float
    seconds: float
    images_per_second: float
    corrupt: int


@dataclass(frozen=True)
class Position:
    """Where a run stands: `batch` batches of `epoch` are done.

    Attributes:
        epoch: from 0, over all steps.
        batch: of that epoch.
        rows: the epochs that are complete.
        loss_sum: of this process's batches of the epoch so far.
        seconds: spent on the epoch so far.
    """

    epoch: int = 0
    batch: int = 0
    rows: tuple[EpochRow, ...] = ()
    loss_sum: float = 0.0
    seconds: float = 0.0


def save_state(
    path: Path, position: Position, settings: Mapping[str, Any], tensors: Mapping[str, Any]
) -> None:
    """Write a state; a crash while writing leaves the one before.

    Args:
        path: the file.
        position: where the run stands.
        settings: what must be the same when it goes on; plain data.
        tensors: state dicts by name.
    """
    header = {"format": _FORMAT, "position": asdict(position), "settings": dict(settings)}
    content = {_KEY: json.dumps(header), **tensors}
    replace_file(path, lambda temporary: torch.save(content, temporary))


def load_state(path: Path, settings: Mapping[str, Any]) -> tuple[Position, dict[str, Any]]:
    """Read a state of a run with the same settings.

    Raises:
        TrainingError: there is none, it is damaged, or the settings differ: each is named.
    """
    if not path.exists():
        raise TrainingError(
            f"{path} does not exist: there is nothing to resume; leave --resume out"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        header = json.loads(content.pop(_KEY))
        stored, plain = header["settings"], header["position"]
        rows = tuple(EpochRow(**row) for row in plain.pop("rows"))
        position = Position(**plain, rows=rows)
    except Exception as error:  # torch and json raise what they like for damaged files
        raise TrainingError(
            f"{path} cannot be resumed from ({first_line(error)}): start again without --resume"
        ) from error
    wanted = json.loads(json.dumps(settings))
    changed = [key for key in sorted({*stored, *wanted}) if stored.get(key) != wanted.get(key)]
    if changed:
        listed = first_few(f"{key} was {stored.get(key)}, is {wanted.get(key)}" for key in changed)
        raise TrainingError(f"{path} is of a run with other settings: {listed}")
    return position, content
