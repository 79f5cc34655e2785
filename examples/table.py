"""Print the table of the README: what `binarize` makes of well-known models, and how long it takes.

Run on one core: `taskset -c 1 python examples/table.py`.
"""

from __future__ import annotations

import statistics
import time

import timm
import torch
import torchvision
from torch import nn

from el_convert import binarize, summarize

INPUT = (3, 224, 224)
RUNS = 5
MODELS = {
    "resnet18 (timm)": timm.create_model,
    "resnet50 (timm)": timm.create_model,
    "mobilenetv1_100 (timm)": timm.create_model,
    "densenet121 (torchvision)": torchvision.models.get_model,
    "mobilenet_v2 (torchvision)": torchvision.models.get_model,
}
HEAD = (
    "model",
    "convolutions",
    "binarized",
    "float MACs before",
    "OPs after",
    "MB stored",
    "MB packed",
    "CPU seconds",
)


def main() -> None:
    torch.set_num_threads(1)
    print("|", " | ".join(HEAD), "|")
    print("|---|" + "--:|" * (len(HEAD) - 1))
    for title, create in MODELS.items():
        model = create(title.split()[0])
        print("|", " | ".join([title, *numbers(model)]), "|", flush=True)


def numbers(model: nn.Module) -> list[str]:
    before, after = summarize(model, INPUT), summarize(binarize(model), INPUT)
    return [
        str(len(after.convolutions)),
        str(len(after.binarized)),
        f"{(before.float_macs or 0) / 1e6:,.0f} M",
        f"{(after.ops or 0) / 1e6:,.0f} M",
        f"{after.stored_bytes / 1e6:.1f}",
        f"{after.packed_bytes / 1e6:.1f}",
        f"{statistics.median(conversion_seconds(model) for _ in range(RUNS)):.2f}",
    ]


def conversion_seconds(model: nn.Module) -> float:
    """CPU time of one conversion; `binarize` copies the model, and the copy counts."""
    start = time.process_time()
    binarize(model)
    return time.process_time() - start


if __name__ == "__main__":
    main()
