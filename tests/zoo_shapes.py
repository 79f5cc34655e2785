"""Run every binarized model of timm and torchvision on the meta device and compare shapes.

    python -m tests.zoo_shapes                     all models
    python -m tests.zoo_shapes 'timm/resnet*'      some

Nothing is computed, but every layer and every gate runs on the shapes that the model's own input
size gives; the outputs must have those of the unconverted model. What does not run on that device
unconverted is counted and named.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter

import torch
from torch import nn

from el_convert.catalog import model_names
from el_convert.convert import binarize
from el_convert.errors import ConversionError, first_line
from el_convert.zoo import find_source, input_spec
from tests.models import flat_tensors
from tests.zoo_sweep import build


def output_shapes(model: nn.Module, size: tuple[int, ...]) -> list[torch.Size]:
    with torch.no_grad():
        return [t.shape for t in flat_tensors(model(torch.empty(2, *size, device="meta")))]


def outcome(name: str) -> str:
    """ "agrees", "nothing to binarize", or why there is nothing to compare.

    Raises:
        AssertionError: the binarized model gives other shapes.
    """
    model = build(name).to("meta").eval()
    size = input_spec(model, find_source(name)).size
    try:
        expected = output_shapes(model, size)
    except Exception as error:  # values are read, or the model takes other inputs
        return f"does not run on shapes alone: {first_line(error)[:60]}"
    try:
        binarize(model, inplace=True)
    except ConversionError:
        return "nothing to binarize"
    found = output_shapes(model, size)
    if found != expected:
        raise AssertionError(f"{found} became {expected}")
    return "agrees"


def main() -> int:
    from rich.console import Console
    from rich.progress import track

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("glob", nargs="?", default="*")
    counts: Counter[str] = Counter()
    failures: list[str] = []
    warnings.simplefilter("ignore")  # the libraries' own
    names = model_names(parser.parse_args().glob)
    for name in track(names, "models", console=Console(stderr=True)):
        try:
            counts[outcome(name)] += 1
        except Exception as error:  # all failures are shown together
            failures.append(f"{name}: {first_line(error)}")
    print(*(f"{count:5} {what}" for what, count in counts.most_common()), *failures, sep="\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
