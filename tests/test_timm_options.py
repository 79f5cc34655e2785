"""Options that timm users turn on: conversion follows them, and nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models import flat_tensors, seed_norms
from timm.layers import BlurPool2d
from torch import Tensor, nn

from el_convert.checkpoint import load, save
from el_convert.convert import binarize
from el_convert.nn import BinaryLayer
from el_convert.planning import plan
from el_convert.zoo import source_of

# Features before an expansion are taken by hooks; their layers are kept, with a warning.
pytestmark = pytest.mark.filterwarnings("ignore:5 of .* convolutions kept")

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("resnet18", {"features_only": True}),
    ("mobilenetv3_small_050", {"features_only": True}),
    ("efficientnet_b0", {"features_only": True, "feature_location": "expansion"}),
    ("convnext_atto", {"features_only": True, "out_indices": (1, 3)}),
    ("resnet18", {"features_only": True, "output_stride": 8}),
    ("resnet18", {"in_chans": 1}),
    ("resnet18", {"num_classes": 0}),
    ("resnet18", {"num_classes": 0, "global_pool": ""}),
    ("resnet18", {"global_pool": "catavgmax"}),
    ("resnet26", {"output_stride": 16}),
    ("resnet18", {"drop_rate": 0.3, "drop_path_rate": 0.2}),
    ("efficientnet_b0", {"drop_path_rate": 0.2, "exportable": True}),
    ("efficientnet_b0", {"scriptable": True}),
    ("resnet50", {"act_layer": nn.SiLU}),
    ("resnet18", {"aa_layer": BlurPool2d}),
]


def image(model: nn.Module, options: dict[str, Any]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, options.get("in_chans", 3), 64, 64, generator=generator)


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_options_convert_and_identity_agrees(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = seed_norms(timm.create_model(name, **options))
    input = image(model, options)
    swapped = binarize(model, "identity")
    for train in (False, True):
        outputs = []
        for network in (copy.deepcopy(model), swapped):
            network.train(train)
            torch.manual_seed(1)
            with torch.no_grad():
                outputs.append(flat_tensors(network(input)))
        assert len(outputs[0]) == len(outputs[1])
        assert all(map(torch.equal, *outputs))


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_options_train(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    binary = binarize(model)
    assert type(binary) is type(model)
    outputs = flat_tensors(binary(image(model, options)))
    loss = sum(output.square().mean() for output in outputs)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert loss.isfinite()
    layers = [m for m in binary.modules() if isinstance(m, BinaryLayer)]
    assert layers
    assert all(layer.weight.grad is not None for layer in layers)


def test_one_channel_images_are_images() -> None:
    decisions = plan(timm.create_model("resnet18", in_chans=1))
    assert [d.path for d in decisions if d.pattern == "reads-image"] == ["conv1"]


def test_feature_hooks_still_fire() -> None:
    # This feature location works by pre-hooks, so the hooked layers stay as they are.
    options = {"features_only": True, "feature_location": "expansion"}
    model = timm.create_model("efficientnet_b0", **options)
    binary = binarize(model)
    features = binary(torch.randn(1, 3, 64, 64))
    assert [f.shape for f in features] == [f.shape for f in model(torch.randn(1, 3, 64, 64))]


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "efficientnet_b0"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    torch.manual_seed(0)
    plain = binarize(timm.create_model(name, num_classes=4))
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing(True)
    input = torch.randn(2, 3, 64, 64)
    for network in (plain, saving):
        torch.manual_seed(1)
        network(input).square().sum().backward()
    pairs = zip(plain.named_parameters(), saving.named_parameters(), strict=True)
    for (name, left), (_, right) in pairs:
        assert left.grad is not None
        assert right.grad is not None
        assert torch.allclose(left.grad, right.grad, atol=1e-5), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("before", [False, True])
def test_half_precision(dtype: torch.dtype, before: bool) -> None:
    model = timm.create_model("resnet18", num_classes=4)
    binary = binarize(model.to(dtype)) if before else binarize(model).to(dtype)
    assert {p.dtype for p in binary.parameters()} == {dtype}
    output = binary.eval()(torch.randn(2, 3, 64, 64, dtype=dtype))
    assert output.dtype == dtype
    assert output.isfinite().all()


def test_channels_last_and_autocast_train() -> None:
    torch.manual_seed(0)
    binary = binarize(timm.create_model("resnet18", num_classes=4))
    binary = binary.to(memory_format=torch.channels_last)
    input = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        loss = binary(input).float().square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in binary.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda() -> None:
    binary = binarize(timm.create_model("resnet18", num_classes=4).cuda())
    assert {p.device.type for p in binary.parameters()} == {"cuda"}
    binary(torch.randn(2, 3, 64, 64, device="cuda")).sum().backward()
    assert all(p.grad is not None for p in binary.parameters())


def test_other_trained_weights_of_an_architecture_are_the_same_model(tmp_path: Path) -> None:
    model = timm.create_model("resnet18.tv_in1k", num_classes=10)
    model(torch.randn(2, 3, 64, 64))
    save(binarize(model), tmp_path / "bnn.pt")
    assert str(source_of(load(tmp_path / "bnn.pt"))) == "timm/resnet18"
