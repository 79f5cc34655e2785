"""One optimizer step after the other: what a run does inside an epoch."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from el_convert.datasets import mix_seed, seed_all, to_device
from el_convert.errors import TrainingError, UnknownNameError
from el_convert.latent import clip_latent, latent_weights, parameter_groups
from el_convert.objective import Objective, logits_of
from el_convert.processes import Processes
from el_convert.run_state import Position
from el_convert.train_options import TrainOptions
from el_convert.watcher import Watcher

_CHECK_EVERY = 20  # batches; reading a loss waits for the GPU
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class StopRequest(AbstractContextManager["StopRequest"]):
    """Turns SIGTERM and Ctrl-C into a flag that is looked at between batches."""

    def __init__(self) -> None:
        self.made = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._set)
        return self

    def _set(self, number: int, frame: FrameType | None) -> None:
        if self.made and number == signal.SIGINT:
            raise KeyboardInterrupt  # pressed twice: at once, from the last epoch on
        self.made = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Stepper:
    """The optimizer, schedule, averaged weights and mixed precision of one step of training.

    Args:
        model: to train.
        objective: its loss.
        options: see `TrainOptions`.
        weight_decay: of what decays.
        processes: gradients are averaged over these.
        classes: how many logits the model gives.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        options: TrainOptions,
        weight_decay: float,
        processes: Processes,
        classes: int,
    ) -> None:
        self.model, self.options, self.processes = model, options, processes
        self.device = next(model.parameters()).device
        self.objective = objective.to(self.device)
        wrapped = processes.wrap(model, sync_norm=options.sync_norm)
        self.forward: Any = torch.compile(wrapped) if options.compile else wrapped
        self.latent = latent_weights(model) if options.clip_latent else []
        try:
            self.optimizer = create_optimizer_v2(
                parameter_groups(model, weight_decay), opt=options.opt, lr=options.lr
            )
        except (AssertionError, ValueError, KeyError) as error:
            from timm.optim import list_optimizers

            raise UnknownNameError("optimizer", options.opt, list_optimizers()) from error
        self.average = ModelEmaV3(model, decay=options.ema) if options.ema else None
        scaled = options.amp == "float16" and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.mixup = _mixup(options, classes)
        self.updates = 0

    def schedule(self, batches: int) -> None:
        """Set the schedule up for epochs of so many batches."""
        options = self.options
        usual = 1.0 if options.sched == "poly" else 0.1  # timm's own 0.1 is no linear decay
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            options.sched,
            num_epochs=options.epochs,
            decay_rate=usual if options.decay_rate is None else options.decay_rate,
            warmup_epochs=options.warmup_epochs,
            warmup_lr=options.warmup_lr,
            min_lr=options.min_lr,
            step_on_epochs=False,
            updates_per_epoch=-(-batches // options.accumulate),
        )

    @property
    def lr(self) -> float:
        """The learning rate in force."""
        return float(self.optimizer.param_groups[0]["lr"])

    def tensors(self) -> dict[str, Any]:
        """Everything a later process needs to go on, by name."""
        average = {} if self.average is None else self.average.module.state_dict()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": average,
            "scaler": self.scaler.state_dict(),
            "updates": self.updates,
        }

    def load(self, tensors: dict[str, Any]) -> None:
        """The inverse of `tensors`."""
        self.model.load_state_dict(tensors["model"])
        self.optimizer.load_state_dict(tensors["optimizer"])
        self.scaler.load_state_dict(tensors["scaler"])
        self.updates = tensors["updates"]
        if self.average is not None:
            self.average.module.load_state_dict(tensors["average"])
        self.scheduler.step_update(self.updates)

    def step(self, images: Tensor, labels: Tensor, *, last: bool, divisor: int) -> Tensor:
        """Forward and backward of one batch; an update where `last` of those that count together.

        Returns:
            The loss, detached.
        """
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        waits = self.processes.world > 1 and not last
        with self.forward.no_sync() if waits else nullcontext():
            with self._autocast():
                loss = self.objective(logits_of(self.forward(images)), images, labels)
            self.scaler.scale(loss / divisor).backward()
        if last:
            self._update()
        detached: Tensor = loss.detach()
        return detached

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = _DTYPES.get(self.options.amp)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _update(self) -> None:
        if self.options.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        clip_latent(self.latent)
        self.updates += 1
        self.scheduler.step_update(self.updates)
        if self.average is not None:
            self.average.update(self.model, step=self.updates)


def _mixup(options: TrainOptions, classes: int) -> Any | None:
    if not (options.mixup or options.cutmix):
        return None
    return Mixup(
        options.mixup,
        options.cutmix,
        label_smoothing=options.smoothing,
        num_classes=classes,
    )


@dataclass(frozen=True)
class Reached:
    """Where an epoch got to: its end, or where it was told to stop."""

    position: Position
    complete: bool
    loss: float


def train_epoch(
    stepper: Stepper,
    loader: Iterable[Any],
    position: Position,
    stop: StopRequest,
    watcher: Watcher,
    kept: Path,
) -> Reached:
    """The batches of an epoch that are left.

    Args:
        stepper: does the steps.
        loader: the batches left, at least one.
        position: where the run stands.
        stop: looked at after each update.
        watcher: told of each batch.
        kept: file that a message about divergence names.

    Raises:
        TrainingError: the loss is not finite.
    """
    options, processes = stepper.options, stepper.processes
    stepper.forward.train()
    stepper.scheduler.step_update(stepper.updates)
    batches = position.batch + len(loader)  # type: ignore[arg-type]
    total = torch.tensor(position.loss_sum, dtype=torch.float64, device=stepper.device)
    done, mean = position.batch, math.nan
    for done, batch in enumerate(loader, position.batch + 1):
        # By itself, so that a run can go on at any batch.
        seed_all(mix_seed(options.seed, position.epoch, done, processes.rank))
        images, labels = to_device(batch, stepper.device)
        last = done % options.accumulate == 0 or done == batches
        divisor = min(
            options.accumulate, batches - (done - 1) // options.accumulate * options.accumulate
        )
        total += stepper.step(images, labels, last=last, divisor=divisor)
        mean = math.nan
        if done % _CHECK_EVERY == 0 or done == batches or stepper.device.type == "cpu":
            mean = float(processes.mean(total / done))
            if not math.isfinite(mean):
                raise TrainingError(_diverged(position.epoch, done, kept))
        watcher.batch_done(mean, len(images) * processes.world, stepper.lr)
        if last and done < batches and processes.any(stop.made, stepper.device):
            return Reached(replace(position, batch=done, loss_sum=float(total)), False, math.nan)
    return Reached(replace(position, batch=done), True, mean)


def _diverged(epoch: int, batch: int, kept: Path) -> str:
    state = f"{kept} holds the last good state" if kept.exists() else "no epoch was complete yet"
    return (
        f"the loss is not finite at epoch {epoch + 1}, batch {batch}: {state}; "
        "try a lower --lr, --warmup-epochs 5 or --clip-grad 1"
    )
