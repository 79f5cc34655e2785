"""How to read images and how to train: every choice as frozen data. No torch, no timm."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

LossKind = Literal["cross-entropy", "distribution", "both"]


@dataclass(frozen=True)
class ImageOptions:
    """How images are read; timm's names where timm has them.

    Attributes:
        size: channels, height, width that the model gets.
        mean, std: per channel, for pixels in [0, 1].
        crop_pct: share of the shorter side that evaluation crops.
        scale: smallest and largest share of the area that a training crop takes.
        hflip: probability of a mirrored image.
        color_jitter: strength of changed colours.
        auto_augment: timm's policy, as in "rand-m9-mstd0.5".
        re_prob: probability of an erased rectangle.
        augment: cut, mirror and change training images; without it they are as in evaluation.
        batch_size: images per step and process.
        workers: processes that load images.
        corrupt: images that do not decode are "skip"ped (a neighbour stands in) or "refuse"d.
    """

    size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_pct: float = 0.875
    scale: tuple[float, float] = (0.08, 1.0)
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None
    re_prob: float = 0.0
    augment: bool = True
    batch_size: int = 64
    workers: int = 2
    corrupt: Literal["skip", "refuse"] = "skip"


@dataclass(frozen=True)
class TrainOptions:
    """How to train; timm's names where timm has them.

    Attributes:
        epochs: in each step of the training.
        steps: 2 trains with binary activations and real weights first; None as the recipe says.
        loss: "cross-entropy" with labels, "distribution" against a teacher (ReActNet), or "both";
            None as the recipe says where there is a teacher, else labels. With a teacher,
            "cross-entropy" means "both".
        opt: timm's name of the optimizer.
        lr: learning rate of the whole batch, over all processes.
        weight_decay: of float weights; latent weights and gates have none.
        first_step_decay: weight decay in the first of two steps, of real weights too.
        sched: timm's schedule: "cosine", "poly" (linear), "step", ...
        decay_rate: power of "poly", 1 by default, or factor of "step", 0.1 by default.
        warmup_epochs: in which the rate grows.
        warmup_lr: learning rate to begin with.
        min_lr: learning rate to end with.
        clip_grad: largest norm of the gradient; None leaves it.
        clip_latent: keep latent weights in [-1, 1].
        accumulate: batches per optimizer step.
        amp: compute in bfloat16 or float16 where torch's autocast does.
        ema: decay of averaged weights, as in 0.999; they are then what is evaluated and kept.
        smoothing: share of a label that goes to the other classes.
        mixup: alpha of mixed images.
        cutmix: alpha of images with a patch of another.
        temperature: of both softmaxes against a teacher.
        label_weight: share of the labels in the loss "both"; the teacher has the rest.
        compile: train with torch.compile.
        sync_norm: batch-norm statistics over all processes; CUDA only.
        seed: the whole run follows from it.
    """

    epochs: int = 30
    steps: Literal[1, 2] | None = None
    loss: LossKind | None = None
    opt: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    first_step_decay: float = 1e-5
    sched: str = "cosine"
    decay_rate: float | None = None
    warmup_epochs: int = 0
    warmup_lr: float = 1e-6
    min_lr: float = 0.0
    clip_grad: float | None = None
    clip_latent: bool = True
    accumulate: int = 1
    amp: Literal["none", "bfloat16", "float16"] = "none"
    ema: float | None = None
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    temperature: float = 1.0
    label_weight: float = 0.5
    compile: bool = False
    sync_norm: bool = False
    seed: int = 0
    images: ImageOptions = field(default_factory=ImageOptions)


def field_help(options: type) -> dict[str, str]:
    """What an options class says of each field, from its docstring.

    Example:
        >>> field_help(ImageOptions)["workers"]
        'loading processes.'
    """
    section = (options.__doc__ or "").partition("Attributes:")[2]
    entries = re.findall(r"^ {8}(\w[\w, ]*): (.*(?:\n {12}.*)*)", section, re.MULTILINE)
    return {
        name.strip(): re.sub(r"\s+", " ", text)
        for names, text in entries
        for name in names.split(",")
    }
