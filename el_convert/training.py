"""Training a binarized network: options, and the run over steps and epochs.

Everything a library does well is theirs: timm's optimizers, schedules, losses, mixup and averaged
weights, torch's mixed precision and DistributedDataParallel.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from el_convert.convert import conversion_of
from el_convert.datasets import (
    EpochSampler,
    LabelledImages,
    check_classes,
    evaluation_loader,
    training_loader,
)
from el_convert.errors import TrainingError
from el_convert.evaluation import Evaluation, class_count, evaluate
from el_convert.latent import set_binary_weights
from el_convert.objective import Objective
from el_convert.packed import PackedConv
from el_convert.processes import Processes
from el_convert.run_log import draw_curve, log_row, tensorboard_writer, write_csv
from el_convert.run_state import EpochRow, Position, load_state, save_state
from el_convert.stepping import Stepper, StopRequest, train_epoch
from el_convert.train_options import TrainOptions
from el_convert.watcher import Watcher


@dataclass(frozen=True)
class Trained:
    """What a run came to.

    Attributes:
        model: the trained network; with averaged weights, that of the average.
        rows: every epoch.
        curve: the picture, or None where matplotlib is not installed.
    """

    model: nn.Module
    rows: tuple[EpochRow, ...]
    curve: Path | None


def train(
    model: nn.Module,
    train_images: LabelledImages,
    validation: LabelledImages | None = None,
    options: TrainOptions | None = None,
    *,
    run: str | Path,
    teacher: nn.Module | None = None,
    device: torch.device | str = "cpu",
    resume: bool = False,
    watcher: Watcher | None = None,
    processes: Processes | None = None,
) -> Trained:
    """Train a binarized network.

    Args:
        model: made by `binarize` or `load`; trained in place, left in eval mode.
        train_images, validation: from `open_images`.
        options: see `TrainOptions`.
        run: folder for `last.pt` (what `resume` continues from), `log.csv` and `curve.png`;
            created.
        teacher: a float classifier of the same classes.
        device: where to train.
        resume: go on where `run` stopped: the result is that of an unbroken run, on the CPU bit
            for bit.
        watcher: told of progress.
        processes: this process among several; see `join_processes`.

    Raises:
        ConversionError: the model is not binarized.
        DataError: classes differ, or too few images.
        TrainingError: the model is packed, the folder holds another run, the teacher's classes
            differ, the loss became NaN, or the run was told to stop: `run` is kept.

    Example:
        >>> from el_convert.datasets import ImageOptions, open_images  # doctest: +SKIP
        >>> images = open_images("cifar10/train", ImageOptions((3, 32, 32)), training=True)
        >>> train(binarize(model), images, run="run").rows[-1].train_loss  # doctest: +SKIP
    """
    options, folder = options or TrainOptions(), Path(run)
    job = _Run(model, train_images, validation, options, folder, torch.device(device))
    job.prepare(teacher, processes or Processes(), watcher or Watcher())
    return job.go(resume)


def check_trainable(model: nn.Module) -> None:
    """Refuse what cannot be trained.

    Raises:
        ConversionError: the model is not binarized.
        TrainingError: it is packed.
    """
    conversion_of(model)
    if any(isinstance(module, PackedConv) for module in model.modules()):
        raise TrainingError(
            "the model is packed: its latent weights are gone; train the file it was packed from"
        )


class _Run:
    """One training run: its parts, and where it stands."""

    def __init__(
        self,
        model: nn.Module,
        images: LabelledImages,
        validation: LabelledImages | None,
        options: TrainOptions,
        folder: Path,
        device: torch.device,
    ) -> None:
        check_trainable(model)
        self.recipe = conversion_of(model).recipe
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.images, self.validation, self.options = images, validation, options
        self.folder, self.device = folder, device
        self.state = folder / "last.pt"
        self.told: set[str] = set()
        self.steps = options.steps or self.recipe.training.steps

    def prepare(self, teacher: nn.Module | None, processes: Processes, watcher: Watcher) -> None:
        self.processes, self.watcher = processes, watcher
        self.classes = class_count(self.model, self.options.images)
        self._check_images()
        self.objective = self._objective(teacher)
        self._open_loaders()

    def _check_images(self) -> None:
        for images in filter(None, (self.images, self.validation)):
            check_classes(images, self.classes)
        if self.validation and self.validation.classes != self.images.classes:
            raise TrainingError(
                f"{self.validation.root} has other class names than {self.images.root}"
            )

    def _objective(self, teacher: nn.Module | None) -> Objective:
        options = self.options
        kind = options.loss or (self.recipe.training.loss if teacher else "cross-entropy")
        if teacher is None and kind != "cross-entropy":
            raise TrainingError(f"loss {kind!r} needs a teacher: name one with --teacher")
        if teacher is not None:
            kind = "both" if kind == "cross-entropy" else kind
            teacher = teacher.to(self.device)
            theirs = class_count(teacher, options.images)
            if theirs != self.classes:
                raise TrainingError(f"the teacher has {theirs} classes, the model {self.classes}")
        return Objective(
            kind,
            teacher,
            smoothing=options.smoothing,
            temperature=options.temperature,
            label_weight=options.label_weight,
        )

    def _open_loaders(self) -> None:
        options = self.options.images
        ranks = {"rank": self.processes.rank, "world": self.processes.world}
        self.order = EpochSampler(len(self.images), options.batch_size, self.options.seed, **ranks)
        self.loader = training_loader(self.images, options, self.order)
        self.batches = len(self.loader)  # of a whole epoch
        self.checker = (
            evaluation_loader(self.validation, options, **ranks) if self.validation else None
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same when the run goes on."""
        settings = {
            **asdict(self.options),
            "steps": self.steps,
            "loss": self.objective.kind,
            "world": self.processes.world,
            "recipe": self.recipe.to_dict(),
            "train_images": len(self.images),
        }
        del settings["images"]["workers"]
        return settings

    @property
    def epochs(self) -> int:
        return self.steps * self.options.epochs

    def go(self, resume: bool) -> Trained:
        position = Position()
        stored: dict[str, Any] = {}
        if resume:
            position, stored = load_state(self.state, self.settings)
            self.model.load_state_dict(stored["model"])
        elif self.state.exists():
            raise TrainingError(
                f"{self.folder} holds a run: go on with --resume, or name another folder with --run"
            )
        board = None
        with StopRequest() as stop:
            for step in range(self._step_of(position), self.steps):
                set_binary_weights(self.model, step == self.steps - 1)
                begun = position.epoch > step * self.options.epochs or position.batch > 0
                stepper = self._stepper(step, stored if begun else {})
                stored = {}
                board = board or self._open_folder()
                last = (step + 1) * self.options.epochs
                while position.epoch < last:
                    position = self._epoch(stepper, position, step, stop)
                    if board:
                        log_row(board, position.rows[-1])
        set_binary_weights(self.model, True)
        if stepper.average is not None:
            self.model.load_state_dict(stepper.average.module.state_dict())
        curve = self.folder / "curve.png"
        drawn = self.processes.first and draw_curve(curve, position.rows, self._title())
        if board:
            board.close()
        return Trained(self.model.eval(), position.rows, curve if drawn else None)

    def _open_folder(self) -> Any | None:
        """Make the run's folder, as late as that; gives TensorBoard's writer."""
        if not self.processes.first:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        return tensorboard_writer(self.folder)

    def _step_of(self, position: Position) -> int:
        return min(position.epoch // self.options.epochs, self.steps - 1)

    def _title(self) -> str:
        return f"{type(self.model).__name__}, {self.recipe.name}"

    def _stepper(self, step: int, stored: dict[str, Any]) -> Stepper:
        first = self.steps == 2 and step == 0
        decay = self.options.first_step_decay if first else self.options.weight_decay
        stepper = Stepper(
            self.model, self.objective, self.options, decay, self.processes, self.classes
        )
        stepper.schedule(self.batches)
        if stored:
            stepper.load(stored)
        return stepper

    def _epoch(
        self, stepper: Stepper, position: Position, step: int, stop: StopRequest
    ) -> Position:
        """One epoch, or what is left of it; stores the state at its end."""
        options = self.options
        self.order.go_to(position.epoch, position.batch)
        self.watcher.epoch_starts(position.epoch, self.epochs, step + 1, len(self.loader))
        started = time.perf_counter()
        reached = train_epoch(stepper, self.loader, position, stop, self.watcher, self.state)
        corrupt = self.images.corrupt_names()
        for name in sorted({*corrupt} - self.told):
            self.watcher.corrupt_image(name)
        self.told |= {*corrupt}
        seconds = position.seconds + time.perf_counter() - started
        if not reached.complete:
            self._store(stepper, replace(reached.position, seconds=seconds))
            raise TrainingError(
                f"stopped at epoch {position.epoch + 1}, batch {reached.position.batch}: "
                f"{self.state} is kept, go on with --resume"
            )
        shown = self._validate(stepper)
        seen = self.batches * options.images.batch_size * self.processes.world
        row = EpochRow(
            position.epoch,
            step + 1,
            stepper.lr,
            reached.loss,
            shown.top1 if shown else math.nan,
            shown.top5 if shown else math.nan,
            shown.loss if shown else math.nan,
            seconds,
            seen / seconds,
            len(corrupt),
        )
        position = Position(position.epoch + 1, 0, (*position.rows, row))
        self._store(stepper, position)
        if self.processes.first:
            write_csv(self.folder / "log.csv", position.rows)
        self.watcher.epoch_ends(row)
        return position

    def _validate(self, stepper: Stepper) -> Evaluation | None:
        if self.checker is None:
            return None
        model = self.model if stepper.average is None else stepper.average.module
        return evaluate(model, self.checker, device=self.device, processes=self.processes)

    def _store(self, stepper: Stepper, position: Position) -> None:
        if self.processes.first:
            save_state(self.state, position, self.settings, stepper.tensors())
        self.processes.wait()
