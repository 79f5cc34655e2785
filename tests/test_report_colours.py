"""A report's colours can be read, and told apart by everyone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

TEMPLATES = Path(__file__).parents[1] / "el_convert" / "templates"


# Colours: WCAG 2's contrast, and distances as people see them who lack one kind of cone.
def palettes() -> dict[str, dict[str, str]]:
    css = (TEMPLATES / "page.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    return {
        name: dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for name, block in (("light", light), ("dark", dark))
    }


def linear(colour: str) -> torch.Tensor:
    channels = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return torch.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    weights = torch.tensor([0.2126, 0.7152, 0.0722])
    bright, dark = sorted((float(linear(c) @ weights) for c in (one, other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


SPREAD = ("one-bit", "surface")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str) -> None:
    colours = palettes()[scheme]
    for text in ("ink", "quiet", "accent"):
        for ground in ("ground", "surface"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for mark in ("one-bit", "linear", "rest", "mark", "accent"):
        assert contrast(colours[mark], colours["surface"]) >= 3, mark
    front, back = ([int(colours[n][i : i + 2], 16) for i in (1, 3, 5)] for n in SPREAD)
    box = "".join(f"{round(0.7 * a + 0.3 * b):02x}" for a, b in zip(front, back, strict=True))
    assert contrast(f"#{box}", colours["surface"]) >= 3  # the spreads' boxes
    # With a texture of its own.
    assert contrast(colours["float"], colours["surface"]) >= 2.8


# Linear RGB as seen without one kind of cone, complete (Machado, Oliveira and Fernandes 2009).
BLIND = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
               [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def lab(rgb: torch.Tensor) -> torch.Tensor:
    to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722],
                           [0.0193, 0.1192, 0.9505]])  # fmt: skip
    ratio = (to_xyz @ rgb.clamp(0, 1)) / torch.tensor([0.9505, 1.0, 1.089])
    root = torch.where(ratio > 0.008856, ratio ** (1 / 3), 7.787 * ratio + 16 / 116)
    return torch.stack([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["none", *BLIND])
def test_groups_can_be_told_apart(scheme: str, kind: str) -> None:
    seen = torch.tensor(BLIND[kind]) if kind in BLIND else torch.eye(3)
    groups = ("one-bit", "float", "linear", "rest")
    places = {name: lab(seen @ linear(palettes()[scheme][name])) for name in groups}
    for one in groups:
        for other in groups[: groups.index(one)]:
            assert (places[one] - places[other]).norm() > 20, (one, other)
