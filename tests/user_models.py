"""Models as people bring them: what they take and give, and how their forwards branch."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def unit(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A convolution without bias, its norm and a ReLU: the convolution is "0"."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def head(channels: int, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Net(nn.Module):
    """What most models below consist of; their forwards differ."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.tail = unit(3, 8), unit(8, 8), unit(8, 16, 2)
        self.head = head(16)

    def features(self, image: Tensor) -> Any:
        return self.tail(self.body(self.stem(image)))

    def forward(self, image: Tensor) -> Any:
        return self.head(self.features(image))


# What a forward takes.


class TwoImages(nn.Module):
    """Colour and depth, a stem each, then one body."""

    def __init__(self) -> None:
        super().__init__()
        self.colour, self.depth = unit(3, 8), unit(1, 8)
        self.body = nn.Sequential(unit(16, 16), unit(16, 8))
        self.head = head(8)

    def forward(self, colour: Tensor, depth: Tensor) -> Any:
        return self.head(self.body(torch.cat([self.colour(colour), self.depth(depth)], 1)))


class Conditioned(nn.Module):
    """An image and a vector that scales its channels, as in FiLM."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = unit(3, 8), unit(8, 8), head(8)
        self.film = nn.Linear(4, 16)

    def forward(self, image: Tensor, vector: Tensor) -> Any:
        scale, shift = self.film(vector)[:, :, None, None].chunk(2, 1)
        return self.head(self.body(self.stem(image) * scale + shift))


class Masked(nn.Module):
    """A mask of the image, brought along and applied between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = unit(3, 8), unit(8, 8), head(16)
        self.tail = nn.Sequential(unit(8, 8), unit(8, 16))

    def forward(self, image: Tensor, mask: Tensor) -> Any:
        x = self.body(self.stem(image) * mask)
        return self.head(self.tail(x * mask))


class KeywordOnly(Net):
    """Options by name only; what they switch on depends on the data."""

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, return_features: bool = False
    ) -> Any:
        x = self.body(self.stem(x))
        if mask is not None and mask.any():
            x = x * mask
        x = self.tail(x)
        return {"scores": self.head(x), "features": x} if return_features else self.head(x)


class FromDict(TwoImages):
    def forward(self, batch: dict[str, Tensor]) -> Any:  # type: ignore[override]
        return {"scores": super().forward(batch["colour"], batch["depth"])}


class FromList(nn.Module):
    """Images of different sizes, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, images: list[Tensor]) -> Any:
        return torch.cat([self.net(image) for image in images])


class AnyArguments(nn.Module):
    """A wrapper that hands everything on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = KeywordOnly()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


# How a forward branches.


class Flags(nn.Module):
    """Python flags, a loop over a ModuleList and one over the names of a ModuleDict."""

    def __init__(self) -> None:
        super().__init__()
        self.residual, self.drop, self.head = True, 0.1, head(8)
        self.stages = nn.ModuleDict({"stem": unit(3, 8), "low": unit(8, 8), "high": unit(8, 8)})
        self.refine = nn.ModuleList([unit(8, 8), nn.Dropout(self.drop), unit(8, 8)])

    def forward(self, x: Tensor) -> Any:
        for name in self.stages:
            x = self.stages[name](x)
        for block in self.refine:
            x = x + block(x) if self.residual else block(x)
        return self.head(x) if self.drop else x


class DeepSupervision(Net):
    """A head that only training calls, and a dropout by `self.training`."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Sequential(unit(8, 8), head(8))

    def forward(self, image: Tensor) -> Any:
        x = self.body(self.stem(image))
        x = nn.functional.dropout(x, 0.2, self.training)
        scores = self.head(self.tail(x))
        return (scores, self.auxiliary(x)) if self.training else scores


class DataBranch(nn.Module):
    """One of two branches, by a value; the stem is a bare convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.light, self.dark, self.head = unit(8, 8), unit(8, 8), head(8)

    def forward(self, x: Tensor) -> Any:
        x = self.act(self.stem(x))
        return self.head(self.light(x) if x.mean() > 0 else self.dark(x))


class EarlyExit(nn.Module):
    """Stops at the first head that is sure enough."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 8)
        self.stages = nn.ModuleList([unit(8, 8), unit(8, 8), unit(8, 8)])
        self.heads = nn.ModuleList([head(8), head(8), head(8)])

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for stage, exit in zip(self.stages, self.heads, strict=True):
            scores = exit(x := stage(x))
            if scores.softmax(1).amax() > 0.99:
                break
        return scores


class Asserts(nn.Module):
    """Checks its input first; a bare convolution reads the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), head(8)
        self.body = nn.Sequential(nn.ReLU(), unit(8, 8), unit(8, 8, 2))

    def forward(self, x: Tensor) -> Any:
        assert x.dim() == 4, "a batch of images"
        assert x.shape[1] == 3, f"three channels, not {x.shape[1]}"
        return self.head(self.body(self.norm(self.stem(x))))


class ShapeBranch(nn.Module):
    """Pools what is large, then `view`s what is left into a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = unit(3, 8, 2), nn.Sequential(unit(8, 8), unit(8, 4))
        self.fc = nn.Linear(4 * 8 * 8, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        if x.shape[-1] > 8:
            x = nn.functional.max_pool2d(x, 2)
        return self.fc(self.body(x).view(x.size(0), -1))


class Checkpointed(Net):
    """Recomputes its inner layers in the backward pass."""

    def forward(self, image: Tensor) -> Any:
        x = checkpoint(self.body, self.stem(image), use_reentrant=False)
        return self.head(checkpoint(self.tail, x, use_reentrant=False))


class Recursive(Net):
    """Calls itself with another argument until none is left."""

    def forward(self, x: Tensor, rounds: int = 2, first: bool = True) -> Any:
        x = self.stem(x) if first else x
        if rounds == 0:
            return self.head(self.tail(x))
        return self(self.body(x), rounds - 1, first=False)


class RecursiveOnData(Net):
    """Looks once more, at half the size, where the image is bright."""

    def forward(self, x: Tensor, again: bool = True) -> Any:
        if not again and x.mean() > 5:
            x = x / 2
        scores = self.head(self.features(x))
        half = nn.functional.avg_pool2d(x, 2)
        return scores + self(half, again=False) if again else scores


# What a forward gives.


@dataclass
class Prediction:
    scores: Tensor
    box: Tensor


class DataclassOutput(Net):
    """Two heads, one dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.box = head(16, 4)

    def forward(self, image: Tensor) -> Any:
        x = self.features(image)
        return Prediction(self.head(x), box=self.box(x).sigmoid())


class Pair(NamedTuple):
    scores: Tensor
    features: tuple[Tensor, Tensor]


class TupleOutput(Net):
    """A NamedTuple that holds another tuple."""

    def forward(self, image: Tensor) -> Any:
        x = self.body(self.stem(image))
        y = self.tail(x)
        return Pair(self.head(y), (x, y))


class ManyHeads(Net):
    """A dict of a list of heads and of a map that a last convolution makes."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([head(16, 2), head(16, 3)])
        self.heat = nn.Sequential(unit(16, 8), nn.Conv2d(8, 1, 1))

    def forward(self, image: Tensor) -> Any:
        x = self.features(image)
        return {"scores": [one(x) for one in self.heads], "heat": self.heat(x).sigmoid()}


# What a module does besides.


class Delegates(nn.Module):
    """Looks up in the wrapped model what it lacks itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, image: Tensor) -> Any:
        return self.head(self.features(image))


class Caches(Net):
    """Builds what depends on the size at the first call."""

    size: Any = None
    grid: Any = None

    def forward(self, image: Tensor) -> Any:
        x = self.body(self.stem(image))
        if self.grid is None or self.size != x.shape[2:]:
            self.size = x.shape[2:]
            self.grid = torch.linspace(0, 1, x.shape[-1]).to(x)
        return self.head(self.tail(x + self.grid))


class Remembers(Net):
    """Keeps the last activation and a list of all on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Any = None
        self.seen: list[Any] = []

    def forward(self, image: Tensor) -> Any:
        self.last = self.body(self.stem(image))
        self.seen = [self.last, self.tail(self.last)]
        return self.head(self.seen[-1])


class Normalizes:
    """A mixin whose forward prepares the image, by plain tensors, for the next class's."""

    mean, deviation = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)

    def forward(self, image: Tensor) -> Any:
        return super().forward((image - self.mean) / self.deviation)  # type: ignore[misc]


class Mixed(Normalizes, Net):
    """Its forward is a mixin's, which calls the network's."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.rand(3, 1, 1)


class Hooked(Net):
    """Collects what its layers give by hooks of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Any] = {}
        for part in (self.body, self.tail):
            part.register_forward_hook(self.collect)

    def collect(self, part: nn.Module, _: Any, output: Tensor) -> None:
        self.found["body" if part is self.body else "tail"] = output

    def forward(self, image: Tensor) -> Any:
        scores = super().forward(image)
        return scores, self.found["body"].mean((2, 3)), self.found.pop("tail")


class Chosen(nn.Module):
    """Chooses its forward when it is made."""

    forward: Callable[..., Any]

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.body, self.head = unit(8, 8), head(8)
        self.forward = self._small

    def _small(self, image: Tensor) -> Any:
        return self.head(self.body(self.act(self.stem(image))))


def patched() -> Net:
    """A model whose forward somebody replaced from outside."""

    def forward(self: Net, image: Tensor) -> Any:
        return self.head(self.features(image)).softmax(1)

    net = Net()
    net.forward = types.MethodType(forward, net)  # type: ignore[method-assign]
    return net
