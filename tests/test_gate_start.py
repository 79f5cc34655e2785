"""Where gates start: high before a norm, at most at 1 where nothing brings the scale back."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from el_convert.convert import binarize
from el_convert.latent import binary_layers
from el_convert.recipes import RECIPES


def starts(model: nn.Module, recipe: object = "elastic-link") -> dict[str, float]:
    binary = binarize(model, recipe)  # type: ignore[arg-type]
    return {
        path: float(layer.link.gamma.detach().unique())  # type: ignore[union-attr]
        for path, layer in binary_layers(binary)
        if layer.link is not None and layer.link.gamma is not None
    }


@pytest.mark.parametrize("name", ["resnet26", "mobilenetv1_100", "efficientnet_b0"])
def test_before_a_norm_they_start_at_the_recipes_value(name: str) -> None:
    assert set(starts(timm.create_model(name)).values()) == {3.0}


def test_without_a_norm_they_start_at_one() -> None:
    assert set(starts(torchvision.models.squeezenet1_1()).values()) == {1.0}
    assert set(starts(torchvision.models.vgg11()).values()) == {1.0}
    low = RECIPES["elastic-link"].with_options({"link.gamma_init": 0.5})
    assert set(starts(torchvision.models.squeezenet1_1(), low).values()) == {0.5}


def test_each_convolution_by_itself() -> None:
    found = starts(torchvision.models.densenet121())
    assert found["features.denseblock1.denselayer1.conv1"] == 3  # a norm reads it
    assert found["features.denseblock1.denselayer1.conv2"] == 1  # it is concatenated


def test_shortcuts_of_bi_real_stay_at_one() -> None:
    binary = binarize(timm.create_model("resnet18"), "bi-real")
    links = [layer.link for _, layer in binary_layers(binary) if layer.link is not None]
    assert {link.options.gamma_init for link in links} == {1.0}


@pytest.mark.parametrize("name", ["squeezenet1_1", "vgg11", "resnet18", "densenet121"])
def test_outputs_stay_finite_and_small(name: str) -> None:
    model = binarize(torchvision.models.get_model(name, num_classes=10)).train()
    output = model(torch.randn(2, 3, 64, 64))
    assert float(output.detach().abs().max()) < 1e4
