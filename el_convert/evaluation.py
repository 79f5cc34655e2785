"""Accuracy of a model on labelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from el_convert.datasets import to_device
from el_convert.errors import TrainingError
from el_convert.objective import logits_of
from el_convert.processes import Processes
from el_convert.train_options import ImageOptions


@dataclass(frozen=True)
class Evaluation:
    """How a model did.

    Attributes:
        top1, top5: percent of the images whose label is the best, or among the best five.
        loss: mean cross-entropy.
        images: how many there were.
        per_class: (class name, percent of its images that were right, how many it has).
    """

    top1: float
    top5: float
    loss: float
    images: int
    per_class: tuple[tuple[str, float, int], ...] = ()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    classes: tuple[str, ...] = (),
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
    processes: Processes | None = None,
) -> Evaluation:
    """Measure a model, packed ones too; leaves it in the mode it was in.

    Args:
        model: gives (N, K) logits.
        batches: of images (N, C, H, W) and labels (N,).
        classes: names for `per_class`.
        device: where the model is.
        progress: called with the number of images after each batch.
        processes: this process among several, each with its own batches; the result is that of
            all together.

    Example:
        >>> batch = (torch.eye(2).view(2, 2, 1, 1), torch.tensor([0, 0]))
        >>> evaluate(nn.Flatten(), [batch]).top1
        50.0
    """
    device = torch.device(device)
    was_training = model.training
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    counts = torch.zeros(2, len(classes), dtype=torch.float64, device=device)
    try:
        for batch in batches:
            images, labels = to_device(batch, device)
            logits = logits_of(model(images)).float()
            ranks = logits.topk(min(5, logits.shape[-1]), -1).indices == labels.unsqueeze(-1)
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            totals += torch.stack(
                [ranks[:, 0].sum(), ranks.sum(), loss, torch.tensor(float(len(labels)))]
            ).to(totals)
            if classes:
                counts[0].index_add_(0, labels, ranks[:, 0].to(counts))
                counts[1].index_add_(0, labels, torch.ones_like(labels).to(counts))
            if progress:
                progress(len(labels))
    finally:
        model.train(was_training)
    everyone = processes or Processes()
    return _summary(everyone.sum(totals), everyone.sum(counts), classes)


def _summary(totals: Tensor, counts: Tensor, classes: tuple[str, ...]) -> Evaluation:
    right, among, loss, images = totals.tolist()
    number = max(images, 1)
    rows = tuple(
        (name, 100 * good / max(count, 1), int(count))
        for name, good, count in zip(classes, *counts.tolist(), strict=True)
    )
    return Evaluation(100 * right / number, 100 * among / number, loss / number, int(images), rows)


def class_count(model: nn.Module, options: ImageOptions) -> int:
    """How many logits a classifier gives, by one image."""
    was_training = model.training
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        logits = logits_of(model.eval()(torch.zeros(1, *options.size, device=device)))
    model.train(was_training)
    if logits.dim() != 2:
        raise TrainingError(f"the model gives {tuple(logits.shape)}, not one row of logits")
    return int(logits.shape[1])
