"""Gates as nodes: to_graph, BinarizePass, and models whose forward does not trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

from el_convert.convert import binarize
from el_convert.errors import ConversionError
from el_convert.functional import binarize_ste, scaled_sign
from el_convert.graphs import BinarizePass, link_nodes, to_graph
from el_convert.nn import BinaryConv2d
from el_convert.recipes import RECIPES


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 8, 1),
        nn.Flatten(),
        nn.LazyLinear(4),
    )


def ready() -> nn.Sequential:
    model = net()
    model(torch.randn(2, 3, 8, 8))
    return model


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_graph(recipe: str) -> None:
    binary = binarize(ready(), recipe).eval()
    graph = to_graph(binary)
    graph.graph.lint()
    input = torch.randn(2, 3, 8, 8)
    assert torch.equal(graph(input), binary(input))
    shared = dict(graph.named_parameters())
    assert all(value is shared[name] for name, value in binary.named_parameters())


def test_the_parts_are_nodes() -> None:
    graph = to_graph(binarize(ready())).graph
    targets = [node.target for node in graph.nodes]
    assert targets.count(binarize_ste) == targets.count(scaled_sign) == 2  # inputs, weights
    targets = [node.target for node in to_graph(binarize(ready()).eval()).graph.nodes]
    assert targets.count(binarize_ste) == 4  # eval sums signs, then scales
    assert [t for t in targets if isinstance(t, str) and t.endswith("link")] == ["2.link", "5.link"]
    assert "0" in targets


def test_a_layer_by_itself() -> None:
    layer = BinaryConv2d(4, 8, 1)
    graph = to_graph(layer)
    input = torch.randn(1, 4, 3, 3)
    assert torch.equal(graph(input), layer(input))
    assert len(link_nodes(graph)) == 1


def test_the_graph_trains() -> None:
    binary = binarize(ready())
    to_graph(binary)(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in binary.parameters())


class Loops(nn.Module):
    """Holds a convolution and a traceable child, and does not trace itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
        self.more = nn.ModuleList([nn.Conv2d(8, 8, 1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() > 0 else self.more[0](x)


def test_what_does_not_trace_is_opened() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Loops(), nn.Flatten(), nn.Linear(32, 2))
    binary = binarize(model).eval()
    graph = to_graph(binary)
    assert len(link_nodes(graph)) == 2
    for sign in (1, -1):
        input = sign * torch.rand(1, 3, 2, 2)
        assert torch.equal(graph(input), binary(input))
    assert isinstance(binary[1].body, nn.Sequential)  # type: ignore[index]


def test_an_untraceable_root_is_refused_with_the_reason() -> None:
    with pytest.raises(ConversionError, match=r"Loops does not trace.*control flow"):
        to_graph(Loops())


def test_the_pass_does_what_binarize_does() -> None:
    model = ready().eval()
    binary = binarize(model, keep=["5"])
    traced = fx.symbolic_trace(model)
    result = BinarizePass(keep=["5"])(traced)
    assert result is not None
    assert result.modified
    input = torch.randn(2, 3, 8, 8)
    assert torch.equal(result.graph_module(input), binary(input))
    assert len(link_nodes(result.graph_module)) == 1
    assert list(result.graph_module.state_dict()) == list(binary.state_dict())


def test_the_pass_composes_and_stops() -> None:
    traced = fx.symbolic_trace(ready())
    once = PassManager([BinarizePass()])(traced)
    assert once.modified
    with pytest.raises(ConversionError, match="binarized already"):
        BinarizePass().call(once.graph_module)
    nothing = BinarizePass()(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))))
    assert nothing is not None
    assert not nothing.modified


def test_inductor_agrees() -> None:
    binary = binarize(ready()).eval()
    input = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(binary, fullgraph=True)
    assert torch.allclose(compiled(input), binary(input), atol=1e-5)
