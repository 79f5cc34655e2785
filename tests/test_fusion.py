"""What is fused into packed layers, what must not be, and that results stay the same."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from el_convert.convert import binarize
from el_convert.link import ElasticLink
from el_convert.packed import PackedConv
from el_convert.packing import pack
from el_convert.slopes import RPReLU
from el_convert.stem import StemTail

KEEP = {"activation.replacement": "keep"}


class Block(nn.Module):
    """Two convolutions of 8 channels; `rule` is the forward."""

    def __init__(self, rule: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.relu, self.inplace = nn.ReLU(), nn.ReLU(inplace=True)
        self.clamp, self.prelu, self.rprelu = nn.ReLU6(), nn.PReLU(8), RPReLU(8)
        self.silu, self.hardswish, self.gelu = nn.SiLU(), nn.Hardswish(), nn.GELU()
        self.drop = nn.Dropout(0.5)
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self, x)


class Net(nn.Module):
    def __init__(self, rule: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.block = Block(rule)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem_norm(self.stem(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def trained(model: nn.Module) -> Any:
    """Norms, gates and activations as if they had learned something."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            assert module.running_mean is not None and module.running_var is not None
            module.num_batches_tracked += 1  # type: ignore[operator]
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
        elif isinstance(module, (ElasticLink, RPReLU)):
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -1, 1)
    return model.eval()


def packed_and_checked(net: nn.Module, side: int = 7) -> Any:
    from el_convert.recipes import RECIPES

    model = trained(binarize(net, RECIPES["elastic-link"].with_options(KEEP)))
    packed, x = pack(model), torch.randn(3, 3, side, side)
    with torch.no_grad():
        expected = model(x)
        for again in (packed, packed.double()):
            given = again(x.to(next(again.parameters()).dtype))
            assert (given - expected).norm() <= 1e-5 * expected.norm()
    return packed.float()


def targets(packed: Any) -> list[str]:
    graph = packed.block
    assert isinstance(graph, fx.GraphModule)
    return [str(n.target) for n in graph.graph.nodes if n.op in ("call_module", "call_function")]


FUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[str]]] = {
    "norm": (lambda m, x: m.norm1(m.conv1(x)), ["conv1"]),
    "relu": (lambda m, x: m.relu(m.norm1(m.conv1(x))), ["conv1"]),
    "functional relu": (lambda m, x: F.relu(m.norm1(m.conv1(x))), ["conv1"]),
    "in-place relu": (lambda m, x: m.inplace(m.norm1(m.conv1(x))), ["conv1"]),
    "relu6": (lambda m, x: m.clamp(m.norm1(m.conv1(x))), ["conv1"]),
    "prelu": (lambda m, x: m.prelu(m.norm1(m.conv1(x))), ["conv1"]),
    "rprelu": (lambda m, x: m.rprelu(m.norm1(m.conv1(x))), ["conv1"]),
    "silu": (lambda m, x: m.silu(m.norm1(m.conv1(x))), ["conv1"]),
    "hardswish": (lambda m, x: m.hardswish(m.norm1(m.conv1(x))), ["conv1"]),
    "dropout": (lambda m, x: m.relu(m.drop(m.norm1(m.conv1(x)))), ["conv1"]),
    "sum": (lambda m, x: m.norm1(m.conv1(x)) + x, ["conv1"]),
    "sum the other way": (lambda m, x: x + m.norm1(m.conv1(x)), ["conv1"]),
    "torch.add": (lambda m, x: torch.add(x, m.norm1(m.conv1(x))), ["conv1"]),
    "sum in place": (lambda m, x: operator.iadd(m.norm1(m.conv1(x)), x), ["conv1"]),
    "sum, then relu": (lambda m, x: m.relu(m.norm1(m.conv1(x)) + x), ["conv1"]),
    "prelu, then sum": (lambda m, x: m.prelu(m.norm1(m.conv1(x))) + x, ["conv1"]),
    "both sides": (
        lambda m, x: m.relu(m.norm1(m.conv1(x)) + m.norm2(m.conv2(x))),
        ["conv2", "conv1"],
    ),
    "shared activation": (
        lambda m, x: m.relu(m.norm2(m.conv2(m.relu(m.norm1(m.conv1(x))))) + x),
        ["conv1", "conv2"],
    ),
    "a sum of another shape": (
        lambda m, x: m.norm1(m.conv1(x)) + x.mean((2, 3), keepdim=True),
        ["conv1"],
    ),
}
LEFT: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[str]]] = {
    "another activation": (lambda m, x: m.gelu(m.norm1(m.conv1(x))), ["conv1", "gelu"]),
    "an output used twice": (
        lambda m, x: (lambda y: m.relu(m.norm1(y)) * y)(m.conv1(x)),
        ["conv1", "norm1", "relu"],
    ),
    "a norm used twice": (
        lambda m, x: m.norm1(m.conv2(m.norm1(m.conv1(x)))),
        ["conv1", "norm1", "conv2", "norm1"],
    ),
    "a layer used twice": (
        lambda m, x: m.norm2(m.conv1(m.norm1(m.conv1(x)))),
        ["conv1", "norm1", "conv1", "norm2"],
    ),
    "a constant sum": (lambda m, x: m.norm1(m.conv1(x)) + 1.0, ["conv1"]),
}


def into_another(m: Any, x: Tensor) -> Tensor:
    kept = y = m.conv2(x)
    y += m.norm1(m.conv1(x))
    return kept * 2 + y


def input_changed_meanwhile(m: Any, x: Tensor) -> Tensor:
    y = m.norm1(m.conv1(x))
    return y + m.inplace(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", FUSED)
def test_fused(name: str) -> None:
    rule, left = FUSED[name]
    found = targets(packed_and_checked(Net(rule)))
    modules = [target for target in found if "." not in target and not target.startswith("<")]
    assert modules[: len(left)] == left
    assert not {"norm1", "norm2", "relu", "inplace", "clamp", "prelu", "rprelu"} & set(modules)


@pytest.mark.parametrize("name", LEFT)
def test_left(name: str) -> None:
    rule, left = LEFT[name]
    packed = packed_and_checked(Net(rule))
    if isinstance(packed.block, fx.GraphModule):
        assert [target for target in targets(packed) if not target.startswith("<")] == left
    else:
        assert any(target.startswith("norm") for target in left)


@pytest.mark.parametrize("rule", [into_another, input_changed_meanwhile])
def test_in_place_changes_are_respected(rule: Callable[[Any, Tensor], Tensor]) -> None:
    packed_and_checked(Net(rule))


def test_hooks_are_kept() -> None:
    net = trained(binarize(Net(FUSED["relu"][0])))
    seen: list[str] = []
    for name in ("norm1", "relu"):
        net.block.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    packed, x = pack(net), torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        assert torch.allclose(packed(x), net(x), rtol=1e-5, atol=1e-6)
    assert seen == ["norm1", "relu"] * 2 or "norm1" in seen


class Stem(nn.Module):
    def __init__(self, act: nn.Module, pool: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act, self.pool = (
            nn.Conv2d(3, 21, 3),
            nn.BatchNorm2d(21),
            act,
            pool,
        )
        self.body, self.head = nn.Conv2d(21, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.pool(self.act(self.norm(self.conv(x)))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


POOLS = [
    nn.MaxPool2d(3, 2, 1),
    nn.MaxPool2d(2),
    nn.MaxPool2d((3, 1), (1, 2), (1, 0)),
    nn.Identity(),
    nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    nn.MaxPool2d(2, dilation=2),
    nn.AvgPool2d(2),
]


STEM_ACTIVATIONS = [
    nn.ReLU(), nn.PReLU(), nn.PReLU(21), nn.ReLU6(), RPReLU(21), nn.SiLU(), nn.Hardswish(),
]  # fmt: skip


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("act", STEM_ACTIVATIONS)
def test_stems(act: nn.Module, pool: nn.Module) -> None:
    packed = packed_and_checked(Stem(act, pool), side=12)
    tails = [module for module in packed.modules() if isinstance(module, StemTail)]
    assert len(tails) == 1
    layers = [module for module in packed.modules() if isinstance(module, PackedConv)]
    assert len(layers) == 1


@pytest.mark.parametrize("pool", POOLS[:4], ids=str)
def test_stems_with_values_that_are_no_numbers(pool: nn.MaxPool2d) -> None:
    norm = trained(nn.BatchNorm2d(21))
    x = torch.randn(2, 21, 9, 10).to(memory_format=torch.channels_last)
    for value in (float("nan"), float("inf"), float("-inf"), -0.0):
        x[:, ::3, 4, 5] = value
        tail = StemTail(norm, nn.PReLU(), pool if isinstance(pool, nn.MaxPool2d) else None).eval()
        expected = pool(F.prelu(norm(x), torch.tensor([0.25])))
        with torch.no_grad():
            assert torch.allclose(tail(x), expected, rtol=1e-5, equal_nan=True)


def test_a_flat_network_folds_its_norms() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    packed = packed_and_checked(net)
    assert isinstance(packed, nn.Sequential)
    assert isinstance(packed[2], nn.Identity)


def test_blocks_that_can_be_called_in_several_ways_are_left() -> None:
    def by_type(m: Any, x: Any) -> Tensor:
        first = x[0] if isinstance(x, list) else x
        return m.relu(m.norm1(m.conv1(first)))  # type: ignore[no-any-return]

    class Listing(Block):
        def forward(self, x: Any) -> Tensor:
            first = x[0] if isinstance(x, list) else x
            return self.relu(self.norm1(self.conv1(first)))  # type: ignore[no-any-return]

    class Optional(Block):
        def forward(self, x: Tensor, twice: bool = False) -> Tensor:
            y: Tensor = self.relu(self.norm1(self.conv1(x)))
            return y * 2 if twice else y

    class Calls(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem_norm(self.stem(x))
            x = self.block([x]) if type(self.block) is Listing else self.block(x, twice=True)
            return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]

    for kind in (Listing, Optional):
        net = Calls(by_type)
        net.block = kind(by_type)
        assert type(packed_and_checked(net).block) is kind
