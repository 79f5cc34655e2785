"""What training minimizes: timm's classification losses, and agreement with a teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from el_convert.train_options import LossKind


def distribution_loss(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""ReActNet's loss: cross-entropy between the softmaxes (arXiv 2003.03488, section 4.3).

    .. math:: L = -\frac{T^2}{N} \sum_{n, c} p_c(t_n / T) \log p_c(x_n / T)

    Args:
        logits: x, (N, K), of the network that learns.
        teacher_logits: t, (N, K).
        temperature: T; 1 in ReActNet.

    Returns:
        A scalar.

    Example:
        >>> distribution_loss(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor(0.6931)
    """
    target = F.softmax(teacher_logits.float() / temperature, -1)
    log_probability = F.log_softmax(logits.float() / temperature, -1)
    return -(target * log_probability).sum(-1).mean() * temperature**2


class Objective(nn.Module):
    """The loss of a batch: labels, a teacher's distribution, or both.

    Args:
        kind: "cross-entropy" with labels, "distribution" against the teacher, or "both", weighted.
        teacher: a float network of the same classes; None for "cross-entropy".
        smoothing: of hard labels.
        temperature: of both softmaxes.
        label_weight: share of the labels in "both"; the teacher has the rest.

    Shape:
        logits (N, K); images (N, C, H, W); labels (N,), or (N, K) after mixup. Gives a scalar.
    """

    def __init__(
        self,
        kind: LossKind = "cross-entropy",
        teacher: nn.Module | None = None,
        *,
        smoothing: float = 0.0,
        temperature: float = 1.0,
        label_weight: float = 0.5,
    ) -> None:
        super().__init__()
        if (teacher is None) != (kind == "cross-entropy"):
            raise ValueError(
                f"loss {kind!r} {'needs a' if teacher is None else 'takes no'} teacher"
            )
        self.kind, self.temperature, self.label_weight = kind, temperature, label_weight
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        self.hard = LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
        self.soft = SoftTargetCrossEntropy()

    def train(self, mode: bool = True) -> Objective:
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()  # its norms and dropout never train
        return self

    def forward(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        loss = logits.new_zeros(())
        if self.kind != "distribution":
            criterion = self.hard if labels.dim() == 1 else self.soft
            loss = criterion(logits.float(), labels)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            teacher_logits = logits_of(self.teacher(images))
        agreement = distribution_loss(logits, teacher_logits, self.temperature)
        if self.kind == "distribution":
            return agreement
        return self.label_weight * loss + (1 - self.label_weight) * agreement


def logits_of(output: object) -> Tensor:
    """The main logits of a classifier's output: torchvision's GoogLeNet gives a tuple in training.

    Raises:
        TypeError: the output is none of a classifier.
    """
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    if isinstance(output, Tensor):
        return output
    raise TypeError(f"a classifier gives logits, not {type(output).__name__}")
