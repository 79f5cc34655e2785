"""On images: no layer is blind, and one step teaches every parameter.

Set EL_CONVERT_IMAGES to a folder or tar of images, one folder per class, to use real ones;
without it, images with the statistics of natural ones are made up.
"""

from __future__ import annotations

import os

import pytest
import timm
import torch
from torch import Tensor, nn

from el_convert.convert import binarize
from el_convert.nn import BinaryConv

COUNT, SIDE = 64, 64


def natural_noise() -> Tensor:
    """(64, 3, 64, 64) images whose spectrum falls like 1/f, as photographs' does."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(COUNT, 3, SIDE, SIDE, generator=generator)
    rows, columns = torch.fft.fftfreq(SIDE)[:, None], torch.fft.fftfreq(SIDE)[None]
    frequency = (rows**2 + columns**2).sqrt().clamp_min(1 / SIDE)
    images = torch.fft.ifft2(torch.fft.fft2(noise) / frequency).real
    return images / images.std()


def real_images(source: str) -> Tensor:
    data = timm.data.create_dataset("", source)
    transform = timm.data.create_transform((3, SIDE, SIDE), is_training=False)
    step = max(1, len(data) // COUNT)
    return torch.stack([transform(data[index * step][0]) for index in range(COUNT)])


@pytest.fixture(scope="module")
def images() -> Tensor:
    source = os.environ.get("EL_CONVERT_IMAGES")
    return real_images(source) if source else natural_noise()


def signs_seen(model: nn.Module, images: Tensor) -> dict[str, tuple[float, float]]:
    """Least and greatest share of +1 among the batches of each layer's input, by path."""
    seen: dict[str, tuple[float, float]] = {}

    def watch(path: str) -> None:
        def hook(layer: BinaryConv, inputs: tuple[Tensor, ...]) -> None:
            positive = (inputs[0] > 0).float().mean().item()
            low, high = seen.get(path, (1.0, 0.0))
            seen[path] = (min(low, positive), max(high, positive))

        model.get_submodule(path).register_forward_pre_hook(hook)  # type: ignore[arg-type]

    paths = [path for path, module in model.named_modules() if isinstance(module, BinaryConv)]
    for path in paths:
        watch(path)
    with torch.no_grad():
        for part in images.split(16):
            model(part)
    assert set(seen) == set(paths)
    return seen


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # timm leaves tar files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenetv1_100"])
def test_no_layer_is_blind_and_all_learn(name: str, images: Tensor) -> None:
    torch.manual_seed(0)
    model = binarize(timm.create_model(name, num_classes=10)).train()
    for path, (low, high) in signs_seen(model, images).items():
        assert 0.0 < low <= high < 1.0, f"{path} sees only one sign"
    target = torch.arange(COUNT) % 10
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = nn.functional.cross_entropy(model(images), target)
    before.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    optimizer.step()
    after = nn.functional.cross_entropy(model(images), target)
    assert after.item() != before.item()
    assert after.isfinite()
