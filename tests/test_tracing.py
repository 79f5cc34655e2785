"""Finding every convolution: leaves, regions, and nothing disturbed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from el_convert.sites import find_sites
from el_convert.tracing import Region, trace_regions


def conv(inputs: int = 8, outputs: int = 8) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Branches(nn.Module):
    """Does not trace: its path depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), nn.Sequential(conv(), nn.ReLU(), conv())

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


class Optional(nn.Module):
    """Traces only while its optional argument stays None."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3), conv()

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        x = self.a(x)
        if mask is not None and mask.sum() > 0:
            x = x * mask
        return self.b(x) * scale


class AuxiliaryHead(nn.Module):
    """Calls a head in training only, and a list of blocks by loop."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([conv(3), conv(), Branches()])
        self.heads = nn.ModuleDict({"aux": nn.Sequential(conv(), nn.ReLU(), conv())})

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return (x, self.heads["aux"](x)) if self.training else x


class Unreachable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = AuxiliaryHead()

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [self.inner(image) for image in images]


def found(model: nn.Module) -> set[int]:
    """Ids of all convolutions that some region shows or is."""
    seen = set()
    for region in trace_regions(model):
        seen.add(id(region.module))
        for node in region.graph.nodes if region.graph else ():
            if node.op == "call_module":
                seen.add(id(region.module.get_submodule(node.target)))
    return seen


@pytest.mark.parametrize("kind", [Branches, Optional, AuxiliaryHead, Unreachable])
def test_every_convolution_is_found(kind: type[nn.Module]) -> None:
    model = kind()
    convs = {id(m) for m in model.modules() if isinstance(m, _ConvNd)}
    assert convs <= found(model)
    assert {id(site.conv) for site in find_sites(model)} == convs


def by_path(regions: list[Region]) -> dict[str, Region]:
    return {region.path: region for region in regions}


def test_regions_say_why() -> None:
    regions = by_path(trace_regions(Unreachable()))
    assert regions[""].graph is None
    assert "iterated" in regions[""].opened[""]
    assert regions["inner"].graph is not None
    assert "control flow" in regions["inner"].opened["inner.blocks.2"]
    assert regions["inner.blocks.2.a"].graph is None
    assert regions["inner.blocks.2.b"].graph is not None
    assert regions["inner.heads"].graph is None
    assert regions["inner.heads.aux"].graph is not None


def test_a_failed_module_leaves_no_nodes() -> None:
    model = nn.Sequential(conv(3), Branches(), conv())
    graph = trace_regions(model)[0].graph
    assert graph is not None
    graph.lint()
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    assert called == ["0", "1", "2"]


def test_modes_hooks_and_randomness_are_left() -> None:
    model = AuxiliaryHead()
    model.blocks[0].eval()
    calls: list[nn.Module] = []
    for module in model.modules():
        module.register_forward_hook(lambda m, i, o: calls.append(m))
    modes = [module.training for module in model.modules()]
    state, python = torch.get_rng_state(), random.getstate()
    trace_regions(model)
    assert [module.training for module in model.modules()] == modes
    assert calls == []
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python


def test_modes_come_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("el_convert.tracing._trace_one", stop)
    model = nn.Sequential(conv())
    with pytest.raises(KeyboardInterrupt):
        trace_regions(model)
    assert all(module.training for module in model.modules())


def test_overridden_train_is_not_called() -> None:
    class Counting(nn.Sequential):
        calls = 0

        def train(self, mode: bool = True) -> Counting:
            type(self).calls += 1
            return self

    trace_regions(Counting(conv(), conv()))
    assert Counting.calls == 0


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = conv()
        self.b = self.a
        self.nested = nn.ModuleList([self.a])

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.nested[0](self.a(x)))


def test_shared_convolutions_are_one_site() -> None:
    (site,) = find_sites(Shared())
    assert (site.path, site.aliases, site.calls) == ("a", ("b", "nested.0"), 3)


class Residual(nn.Module):
    """A bottleneck with squeeze-excite and a projection, then a convolutional classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, stride=2, padding=3)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.conv1, self.conv2 = conv(8, 8), conv(8, 16)
        self.se = nn.Conv2d(16, 16, 1)
        self.pool = nn.AvgPool2d(2)
        self.down = nn.Conv2d(8, 16, 1)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        y = self.conv2(self.relu(self.conv1(x)))
        y = y * self.se(y.mean((2, 3), keepdim=True)).sigmoid()
        y = self.pool(y) + self.down(self.pool(x))
        return self.head(y.relu()).mean((2, 3))


def test_sites_know_their_surroundings() -> None:
    sites = {site.path: site for site in find_sites(Residual())}

    def holding(fact: str) -> set[str]:
        return {path for path, site in sites.items() if getattr(site, fact)}

    assert holding("reads_image") == {"stem"}
    assert holding("feeds_output") == {"head"}
    assert holding("single_pixel") == {"se"}
    assert holding("on_shortcut") == {"down"}
    assert holding("nonnegative_input") == {"conv1", "conv2", "down", "head"}
    assert sites["conv1"].producer is not None
    assert sites["conv1"].producer.target == "relu"
    assert [node.target for node in sites["conv1"].consumers] == ["relu"]
    assert all(site.calls == 1 and site.node is not None for site in sites.values())


def test_headless_features_do_not_feed_the_output() -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    for name in ("resnet18", "nf_resnet26", "mobilenetv1_100"):
        model = timm.create_model(name, num_classes=0)
        assert not any(site.feeds_output for site in find_sites(model)), name


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("fcos_resnet50_fpn", 3),
        ("ssdlite320_mobilenet_v3_large", 12),
        ("maskrcnn_resnet50_fpn", 3),
        ("raft_small", 1),
    ],
)
def test_predictions_of_models_that_do_not_trace(name: str, heads: int) -> None:
    from zoo_sweep import build

    from el_convert.planning import plan

    kept = [d.path for d in plan(build(f"torchvision/{name}")) if d.pattern == "prediction-head"]
    assert len(kept) == heads
    assert all("head" in path or "predictor" in path for path in kept)


class Remembers(nn.Module):
    """Stores what passes through it, as feature extractors and caches do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3), conv()
        self.seen: dict[Any, Any] = {}
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.a(x)
        self.seen[x.device] = self.last
        return self.b(self.last)


def test_what_a_forward_stores_stays_out_of_the_model() -> None:
    model = Remembers()
    sites = find_sites(model)
    assert model.seen == {}
    assert model.last is None
    assert [site.conv for site in sites] == [model.a, model.b]
