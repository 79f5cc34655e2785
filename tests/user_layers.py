"""Models as people bring them: how their layers are kept, shared, shaped and stacked."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from user_models import head, unit

# Where the layers are kept.


class Nested(nn.Module):
    """Dicts of lists of dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = unit(3, 8), head(8)
        self.branches = nn.ModuleDict(
            {
                "near": nn.ModuleList([self.pair(), unit(8, 8)]),
                "far": nn.ModuleList([self.pair(), nn.Identity()]),
            }
        )

    @staticmethod
    def pair() -> nn.ModuleDict:
        return nn.ModuleDict({"left": unit(8, 8), "right": unit(8, 8)})

    def forward(self, x: Tensor) -> Any:
        start = self.stem(x)
        total = start
        for branch in self.branches.values():
            pair, last = list[Any](branch.children())
            total = total + last(pair["left"](start) * pair["right"](start).sigmoid())
        return self.head(total)


class Wrapped(nn.Module):
    """One more class around a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = unit(channels, channels), unit(channels, channels)

    def forward(self, x: Tensor) -> Any:
        return x + self.second(self.first(x))


class Deep(nn.Module):
    """Classes four deep, and a residual block below."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = unit(3, 8), head(8)
        self.body = Wrapped(Wrapped(Wrapped(Wrapped(Residual(8)))))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(self.stem(x)))


class SharedConv(nn.Module):
    """One convolution under two names, called under both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = unit(3, 8), head(8)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.again = self.first
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])

    def forward(self, x: Tensor) -> Any:
        x = self.norms[0](self.first(self.stem(x))).relu()
        return self.head(self.norms[1](self.again(x)).relu())


class SharedBlock(nn.Module):
    """One block in two places, as in recurrent refinement."""

    def __init__(self) -> None:
        super().__init__()
        block = Residual(8)
        self.stem, self.body = unit(3, 8), nn.Sequential(block, unit(8, 8), block)
        self.refine, self.head = nn.ModuleDict({"again": block}), head(8)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.refine["again"](self.body(self.stem(x))))


def plain() -> nn.Sequential:
    inner = nn.Sequential(unit(8, 8), nn.MaxPool2d(2), nn.Sequential(unit(8, 16), unit(16, 16)))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), inner, head(16))


class TiedWeights(nn.Module):
    """Two convolutions with one weight, and a transposed one that decodes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = unit(3, 8), head(8)
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 1, 2, 2)
        self.back, self.norm = nn.ConvTranspose2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second.weight = self.back.weight = self.first.weight

    def forward(self, x: Tensor) -> Any:
        return self.head(self.norm(self.back(self.second(self.first(self.stem(x))))))


class BlocksInAList(nn.Module):
    """Loops over a Python list of the blocks that a ModuleList holds too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = unit(3, 8), head(8)
        self.blocks = [unit(8, 8), Residual(8)]
        self.registered = nn.ModuleList(self.blocks)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ConvsInAList(nn.Module):
    """A feature pyramid that loops over Python lists of its convolutions, as detectron2's does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.head = unit(3, 8), unit(8, 16, 2), head(8)
        self.lateral: list[nn.Module] = []
        for index, channels in enumerate((16, 8)):
            conv = nn.Conv2d(channels, 8, 1)
            self.add_module(f"lateral{index}", conv)
            self.lateral.append(conv)
        self.smooth = unit(8, 8)

    def forward(self, x: Tensor) -> Any:
        high = self.stem(x)
        low = self.down(high)
        upper, lower = (conv(value) for conv, value in zip(self.lateral, (low, high), strict=True))
        return self.head(self.smooth(lower + F.interpolate(upper, scale_factor=2.0)))


# Well-known shapes of networks.


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(unit(3, 8), unit(8, 8, 2), unit(8, 16), head(16, 6))
        self.same = nn.Linear(6, 1)

    def forward(self, left: Tensor, right: Tensor) -> Any:
        return self.same((self.backbone(left) - self.backbone(right)).abs()).squeeze(1)


class UNet(nn.Module):
    """One level by a transposed convolution, one by interpolation, both with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down, self.deep = unit(3, 8), unit(8, 16, 2), unit(16, 32, 2)
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.mid, self.narrow, self.last = unit(32, 16), nn.Conv2d(16, 8, 1), unit(16, 8)
        self.mask = nn.Conv2d(8, 2, 1)

    def forward(self, image: Tensor) -> Any:
        high = self.enter(image)
        low = self.down(high)
        x = self.mid(torch.cat([self.up(self.deep(low)), low], 1))
        x = F.interpolate(self.narrow(x), size=high.shape[2:], mode="bilinear", align_corners=False)
        return self.mask(self.last(torch.cat([x, high], dim=1)))


class Audio(nn.Module):
    """Encodes a waveform and decodes it again."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv1d(1, 8, 7, 2, 3),
            nn.ELU(),
            nn.Conv1d(8, 16, 5, 2, 2),
            nn.GroupNorm(4, 16),
            nn.ELU(),
            nn.Conv1d(16, 16, 3, padding=2, dilation=2),
            nn.ELU(),
        )
        self.decode = nn.Sequential(
            nn.ConvTranspose1d(16, 8, 4, 2, 1),
            nn.BatchNorm1d(8),
            nn.LeakyReLU(0.1),
            nn.ConvTranspose1d(8, 1, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, wave: Tensor) -> Any:
        return self.decode(self.encode(wave))


class Video(nn.Module):
    """Space and time by turns, then a 3d convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU())
        self.space = nn.Conv3d(8, 12, (1, 3, 3), (1, 2, 2), padding=(0, 1, 1), bias=False)
        self.time = nn.Conv3d(12, 8, (3, 1, 1), padding=(1, 0, 0))
        self.norm, self.act = nn.BatchNorm3d(8), nn.ReLU()
        self.both, self.fc = nn.Conv3d(8, 16, 3, 2, 1), nn.Linear(16, 5)

    def forward(self, clip: Tensor) -> Any:
        x = self.norm(self.time(self.space(self.stem(clip))))
        return self.fc(self.both(self.act(x)).mean((2, 3, 4)))


class Reader(nn.Module):
    """Convolutions, then an LSTM over the columns of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(unit(3, 8), nn.MaxPool2d(2), unit(8, 16))
        self.lstm = nn.LSTM(16, 8, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(16, 11)

    def forward(self, image: Tensor) -> Any:
        columns, _ = self.lstm(self.convs(image).mean(2).transpose(1, 2))
        return self.fc(columns).log_softmax(-1)


class Geometry(nn.Module):
    """Every padding and kernel that convolutions offer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = unit(3, 8), head(8)
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 5, 2, padding=2, padding_mode="reflect"),
            nn.ReLU6(),
            nn.Conv2d(8, 12, 3, padding="same", dilation=2, padding_mode="replicate"),
            nn.InstanceNorm2d(12),
            nn.Conv2d(12, 12, (1, 7), padding="same", groups=3),
            nn.Hardswish(),
            nn.Conv2d(12, 12, (7, 1), padding=(3, 0), groups=12),
            nn.GroupNorm(3, 12),
            nn.Conv2d(12, 8, (2, 3), (2, 1), padding="valid", dilation=(1, 2)),
            nn.PReLU(),
        )

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(self.stem(x)))


# Networks of the libraries with something of one's own.


class OwnResNet(ResNet):  # type: ignore[misc]
    """torchvision's class, one stage shorter, with a head and a forward of one's own."""

    def __init__(self) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1], num_classes=7)
        self.layer4 = nn.Identity()
        self.fc = nn.Sequential(nn.Dropout(0.2), nn.Linear(256, 9))

    def forward(self, x: Tensor) -> Any:
        return self._forward_impl(2 * x - 1).log_softmax(1)


class OnBackbone(nn.Module):
    """timm's maps of features, two of them brought together."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("resnet18", features_only=True, out_indices=(1, 2))
        self.mix = unit(64 + 128, 32)
        self.scores = nn.Conv2d(32, 6, 1)

    def forward(self, image: Tensor) -> Any:
        high, low = self.backbone(image)
        low = F.interpolate(low, size=high.shape[-2:])
        return self.scores(self.mix(torch.cat([high, low], 1)))


class TimmWrapper(nn.Module):
    """A timm model inside, and all of its attributes outside."""

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("test_resnet", num_classes=4)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, image: Tensor) -> Any:
        return self.model(image).softmax(1)
