"""The models that conversion is tested on, small inputs included."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from el_convert.zoo import create, find_source


@dataclass(frozen=True)
class Case:
    """A zoo model with what its plan must be.

    `side` is the smallest input on which all of its layers see more than one pixel or so.
    """

    name: str
    convolutions: int
    binarized: int
    side: int = 64

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torchvision on its own defaults
            model = create(find_source(self.name, num_classes=10))
        return seed_norms(model)

    def input(self, batch: int = 2, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 3, self.side, self.side, generator=generator)


def seed_norms(model: nn.Module) -> nn.Module:
    """Give norms uneven statistics and no zero scales, so that a lost one shows."""
    generator = torch.Generator().manual_seed(7)
    for name, value in sorted([*model.named_parameters(), *model.named_buffers()]):
        owner = model.get_submodule(name.rpartition(".")[0])
        if "Norm" not in type(owner).__name__ or not value.is_floating_point():
            continue
        with torch.no_grad():
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(noise - 0.5 if name.endswith(("bias", "mean")) else noise + 0.5)
    return model


CASES = (
    Case("timm/resnet18", 20, 19),
    Case("timm/resnet26", 29, 28),
    Case("timm/resnet50", 53, 52),
    Case("timm/mobilenetv1_100", 27, 26),
    Case("timm/mobilenetv3_large_100", 63, 45),
    Case("timm/efficientnet_b0", 81, 48),
    Case("timm/convnext_atto", 40, 39),
    Case("timm/regnety_002", 70, 43),
    Case("timm/nf_resnet26", 29, 28),
    Case("timm/vgg11_bn", 10, 9),
    Case("timm/ghostnet_100", 95, 79),
    Case("torchvision/googlenet", 59, 58),
    Case("torchvision/densenet121", 120, 119),
    Case("torchvision/inception_v3", 96, 95, side=299),
    Case("torchvision/squeezenet1_1", 26, 24),
    Case("torchvision/shufflenet_v2_x0_5", 56, 55),
    Case("torchvision/mnasnet0_5", 52, 51),
    Case("torchvision/mobilenet_v2", 52, 51),
)
BY_NAME = {case.name: case for case in CASES}


def first_tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """googlenet and inception return their auxiliary logits too, in training."""
    return output if isinstance(output, Tensor) else output[0]


def flat_tensors(output: Any) -> list[Tensor]:
    """Every floating-point tensor of a nested output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, Mapping) else output
    return [tensor for part in parts for tensor in flat_tensors(part)]
