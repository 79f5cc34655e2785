"""Small folders and tars of images whose class can be seen, and a network that learns it."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy
import timm
from PIL import Image
from torch import nn

from el_convert.convert import binarize
from el_convert.recipes import RECIPES, Recipe
from el_convert.train_options import ImageOptions, TrainOptions

SIDE = 16
IMAGES = ImageOptions((3, SIDE, SIDE), batch_size=8, workers=0, crop_pct=1.0, scale=(0.8, 1.0))
OPTIONS = TrainOptions(epochs=2, lr=5e-3, images=IMAGES)


def draw_folder(folder: Path, classes: int = 3, each: int = 8, seed: int = 0) -> Path:
    """One folder per class; class c is bright in one of the colours, on noise."""
    noise = numpy.random.default_rng(seed)
    for label in range(classes):
        place = folder / f"class{label}"
        place.mkdir(parents=True)
        for number in range(each):
            pixels = noise.integers(0, 120, (SIDE, SIDE, 3))
            pixels[..., label % 3] += 100
            Image.fromarray(pixels.astype("uint8")).save(place / f"{number}.png")
    return folder


def pack_tar(folder: Path) -> Path:
    """The folder as a tar beside it."""
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as archive:
        archive.add(folder, ".")
    return path


def small_network(recipe: str | Recipe = "elastic-link", classes: int = 3) -> nn.Module:
    """A binarized timm ResNet of a few thousand weights."""
    return binarize(float_network(classes), recipe, inplace=True)


def float_network(classes: int = 3, **options: object) -> nn.Module:
    shape = {"channels": (8, 8, 16, 16), "stem_width": 8}
    model: nn.Module = timm.create_model("resnet18", num_classes=classes, **shape, **options)
    return model


def with_recipe(name: str, **options: object) -> Recipe:
    return RECIPES[name].with_options(
        {key.replace("__", "."): value for key, value in options.items()}
    )
