"""The users' models with what their plans must be, and what the tests look at."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
import user_layers as layers
import user_models as own
from models import seed_norms
from torch import Tensor, nn

from el_convert import binarize


def image(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one() -> tuple[Any, ...]:
    return (image(2, 3, 32, 32),)


def two() -> tuple[Any, ...]:
    return (image(2, 3, 32, 32), image(2, 3, 32, 32, seed=2))


def colour_and_depth() -> tuple[Any, ...]:
    return (image(2, 3, 32, 32), image(2, 1, 32, 32))


def both_in_a_dict() -> tuple[Any, ...]:
    return (dict(zip(("colour", "depth"), colour_and_depth(), strict=True)),)


def mask() -> Tensor:
    return (image(2, 1, 32, 32, seed=4) > 0).float()


@dataclass(frozen=True, eq=False)
class Case:
    """A model, what its plan must be, and how it is called.

    `kept` are the convolutions that must stay in float, of `convolutions` in all; the others are
    binarized. `graph` is "whole" where torch.fx can follow the whole forward and "refused" where
    it cannot; "either" where the forward is the object's, not its class's: torch.fx itself looks
    at the class, so a graph may be refused, but it must not be another function.
    """

    build: Callable[[], nn.Module]
    convolutions: int
    kept: str = "stem.0"
    args: Callable[[], tuple[Any, ...]] = one
    kwargs: dict[str, Any] = field(default_factory=dict)
    graph: Literal["whole", "refused", "either"] = "whole"

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return seed_norms(self.build())

    def both(self) -> tuple[nn.Module, nn.Module]:
        """The model and its binarized twin; copies, so that a test may do with them as it likes."""
        return copy.deepcopy(converted(self))

    def run(self, model: nn.Module, train: bool = False) -> list[Tensor]:
        """The outputs for the seeded input; the model is left in that mode."""
        model.train(train)
        torch.manual_seed(3)
        return list(tensors(model(*self.args(), **self.kwargs)))


@cache
def converted(case: Case) -> tuple[nn.Module, nn.Module]:
    model = case.model()
    return model, binarize(model)


CASES = {
    "two images": Case(own.TwoImages, 4, "colour.0 depth.0", colour_and_depth),
    "image and vector": Case(own.Conditioned, 2, args=lambda: (*one(), image(2, 4))),
    "image and mask": Case(own.Masked, 4, args=lambda: (*one(), mask())),
    "keywords left out": Case(own.KeywordOnly, 3),
    "keywords given": Case(own.KeywordOnly, 3, kwargs={"mask": mask(), "return_features": True}),
    "dict": Case(own.FromDict, 4, "colour.0 depth.0", both_in_a_dict),
    "list": Case(
        own.FromList,
        3,
        "net.stem.0",
        lambda: ([image(1, 3, 32, 32), image(1, 3, 24, 40)],),
        graph="refused",
    ),
    "any arguments": Case(own.AnyArguments, 3, "inner.stem.0", graph="refused"),
    "flags": Case(own.Flags, 5, "stages.stem.0"),
    "deep supervision": Case(own.DeepSupervision, 4),
    "data branch": Case(own.DataBranch, 3, "stem", graph="refused"),
    "early exit": Case(own.EarlyExit, 4, graph="refused"),
    "asserts": Case(own.Asserts, 3, "stem", graph="either"),  # fx's `trace_asserts` takes them
    "shape branch": Case(own.ShapeBranch, 3, graph="refused"),
    "checkpointed": Case(own.Checkpointed, 3),
    "recursive": Case(own.Recursive, 3),
    "recursive on data": Case(own.RecursiveOnData, 3, graph="refused"),
    "dataclass": Case(own.DataclassOutput, 3),
    "named tuple": Case(own.TupleOutput, 3),
    "many heads": Case(own.ManyHeads, 5, "stem.0 heat.1"),
    "delegates": Case(own.Delegates, 3, "inner.stem.0"),
    "caches": Case(own.Caches, 3),
    "remembers": Case(own.Remembers, 3),
    "mixin": Case(own.Mixed, 3),
    "hooked": Case(own.Hooked, 3, graph="refused"),
    "forward chosen": Case(own.Chosen, 2, "stem", graph="either"),
    "forward patched": Case(own.patched, 3, graph="either"),
    "nested": Case(layers.Nested, 6),
    "deep": Case(layers.Deep, 3),
    "shared convolution": Case(layers.SharedConv, 2),
    "shared block": Case(layers.SharedBlock, 4),
    "plain": Case(layers.plain, 4, "0"),
    "tied weights": Case(layers.TiedWeights, 4),
    "blocks in a list": Case(layers.BlocksInAList, 4),
    "convolutions in a list": Case(layers.ConvsInAList, 5),
    "siamese": Case(layers.Siamese, 3, "backbone.0.0", two),
    "u-net": Case(layers.UNet, 8, "enter.0 mask"),
    "audio": Case(layers.Audio, 5, "encode.0 decode.3", lambda: (image(2, 1, 64),)),
    "video": Case(layers.Video, 4, args=lambda: (image(2, 3, 4, 16, 16),)),
    "reader": Case(layers.Reader, 2, "convs.0.0"),
    "geometry": Case(layers.Geometry, 7),
    "own resnet": Case(layers.OwnResNet, 9, "conv1"),
    "on a backbone": Case(layers.OnBackbone, 12, "backbone.conv1 scores"),
    "timm wrapper": Case(layers.TimmWrapper, 15, "model.conv1.0"),
}


def tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor of an output, in order."""
    if isinstance(output, Tensor):
        yield output
    elif dataclasses.is_dataclass(output):
        yield from tensors(vars(output))
    else:
        for part in output.values() if isinstance(output, dict) else output:
            yield from tensors(part)


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) > 0 and all(map(torch.equal, left, right))


def counted(model: nn.Module, kind: type[nn.Module], run: Callable[[], object]) -> Counter[str]:
    """How often a run calls each module of a kind, by the module's name."""
    calls: Counter[str] = Counter()

    def count(path: str) -> Callable[..., None]:
        return lambda *_: calls.update([path])

    named = [(path, m) for path, m in model.named_modules() if isinstance(m, kind)]
    handles = [module.register_forward_pre_hook(count(path)) for path, module in named]
    run()
    for handle in handles:
        handle.remove()
    return calls


def graded(model: nn.Module, run: Callable[[], list[Tensor]]) -> set[str]:
    """Names of the parameters a run gives a gradient, all of which must be finite."""
    total = torch.stack([output.square().sum() for output in run()]).sum()
    torch.autograd.backward(total)
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for _, grad in named)
    return {name for name, _ in named}


class Snapshot:
    """Structure, modes, hooks, attributes and state of a model, to compare with later."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parts = self._parts()
        self.state = {key: value.clone() for key, value in model.state_dict().items()}

    def _parts(self) -> list[tuple[Any, ...]]:
        return [
            (path, type(module), module.training, key, type(value), held)
            for path, module in self.model.named_modules(remove_duplicate=False)
            for key, value in vars(module).items()
            for held in (list(value) if isinstance(value, (list, dict, set)) else [value])
        ]

    def holds(self) -> bool:
        """Whether all is as it was; objects by identity, or equal where they are plain values."""
        now, state = self._parts(), self.model.state_dict()
        return (
            len(now) == len(self.parts)
            and all(map(_unchanged, now, self.parts))
            and list(state) == list(self.state)
            and all(torch.equal(state[key], value) for key, value in self.state.items())
        )


def _unchanged(now: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    plain = isinstance(now[-1], (bool, int, float, str, tuple)) and now[-1] == before[-1]
    return now[:-1] == before[:-1] and (plain or now[-1] is before[-1])
