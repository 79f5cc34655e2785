"""Convolutions that are calls, not modules, are named with their line; weights read elsewhere."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import conv2d as renamed

from el_convert.calls import FunctionalConv
from el_convert.checkpoint import load, save
from el_convert.convert import binarize, conversion_of
from el_convert.errors import ConversionError
from el_convert.planning import plan, plan_conversion
from el_convert.report import summarize
from el_convert.sites import survey


class Kernel(nn.Module):
    """Holds a weight of its own and no convolution."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1)  # direct


class Renamed(Kernel):
    def forward(self, x: Tensor) -> Tensor:
        return renamed(x, self.weight * 2, padding=1)  # renamed


class ByTorch(Kernel):
    def forward(self, x: Tensor) -> Tensor:
        return torch.conv2d(x, weight=self.weight.tanh(), padding=1)  # torch


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """A helper outside of any class."""
    return F.conv2d(x, weight, padding=1)  # helper


class ByHelper(Kernel):
    def forward(self, x: Tensor) -> Tensor:
        return convolved(x, self.weight)


class Untraceable(Kernel):
    """Its path depends on the data, so that only its code can tell."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return F.conv_transpose2d(x, self.weight, padding=1)  # untraceable
        return x


class UntraceableHelper(Kernel):
    def forward(self, x: Tensor) -> Tensor:
        return next(convolved(x, self.weight) for _ in range(2 if x.sum() > 0 else 1))


class FromLinear(nn.Module):
    """The weight belongs to another kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.linear.weight[:, :, None, None])  # linear


class Dynamic(nn.Module):
    """The weight is computed from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(8, 64)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.make(x.mean((0, 2, 3))).view(8, 8, 1, 1)
        return F.conv2d(x, weight)  # dynamic


class Blur(nn.Module):
    """A fixed filter: no business of a conversion."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.ones(8, 1, 3, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, groups=8, padding=1)


class ScaledBlur(Blur):
    """A fixed filter beside a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, groups=8, padding=1) * self.scale


class NamedLikeOne(nn.Module):
    """`self.conv2d` is a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2d = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.conv2d(x.movedim(1, -1)).movedim(-1, 1)  # type: ignore[no-any-return]
        return x


class Net(nn.Module):
    """A stem, an inner convolution, and whatever is being looked at, in a Sequential."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.ReLU(), *inner)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.body(self.stem(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def line_of(remark: str) -> str:
    """Where this file has that remark, as "test_calls.py:12"."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    (number,) = [n for n, line in enumerate(lines, 1) if line.endswith(f"# {remark}")]
    return f"{Path(__file__).name}:{number}"


def found_in(model: nn.Module) -> tuple[FunctionalConv, ...]:
    return survey(model).functional


@pytest.mark.parametrize(
    ("inner", "function", "remark"),
    [
        (Kernel, "conv2d", "direct"),
        (Renamed, "conv2d", "renamed"),
        (ByTorch, "conv2d", "torch"),
        (ByHelper, "conv2d", "helper"),
        (Untraceable, "conv_transpose2d", "untraceable"),
        (UntraceableHelper, "conv2d", "helper"),
        (FromLinear, "conv2d", "linear"),
        (Dynamic, "conv2d", "dynamic"),
    ],
)
def test_named_by_module_function_and_line(
    inner: type[nn.Module], function: str, remark: str
) -> None:
    expected = FunctionalConv("body.1", inner.__name__, function, line_of(remark))
    assert found_in(Net(inner())) == (expected,)
    # Alone, inside a container of its own, and twice.
    assert [call.path for call in found_in(inner())] == [""]
    twice = Net(nn.Sequential(inner(), nn.ReLU(), inner()))
    assert {call.path for call in found_in(twice)} == {"body.1.0", "body.1.2"}


@pytest.mark.parametrize("inner", [Blur, ScaledBlur, NamedLikeOne])
def test_what_learns_no_filter_is_not_named(inner: type[nn.Module]) -> None:
    assert found_in(Net(inner())) == ()


class OwnForward(Net):
    """Calls one beside its modules, behind a flag, and one in training only."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.branch = branch
        self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.branch:
            x = F.conv2d(x, self.weight)  # branch
        x = self.conv(x)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_in_the_forward_of_the_model() -> None:
    (call,) = found_in(OwnForward(True))
    assert call == FunctionalConv("", "OwnForward", "conv2d", line_of("branch"))
    assert str(call) == f"the model (OwnForward): conv2d at {line_of('branch')}"
    assert found_in(OwnForward(False)) == ()  # traced: the call is never made


class UntraceableNet(OwnForward):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.sum() > 0:
            x = F.conv2d(x, self.weight)  # data
        return self.head(self.conv(x).mean((2, 3)))  # type: ignore[no-any-return]


def test_in_a_forward_that_does_not_trace() -> None:
    calls = found_in(UntraceableNet(True))
    # The code of a base class may be reached by super().forward, so it counts.
    assert FunctionalConv("", "UntraceableNet", "conv2d", line_of("data")) in calls
    assert {call.path for call in calls} == {""}


def test_users_are_told_once_and_the_rest_is_binarized() -> None:
    model = Net(Kernel(), Renamed())
    with pytest.warns(
        UserWarning, match=r"calls in a forward and no modules: body\.1 \(Kernel\): "
    ) as seen:
        binary = binarize(model)
    assert len(seen) == 1
    assert line_of("direct") in str(seen[0].message)
    assert seen[0].filename == __file__
    with pytest.warns(UserWarning, match="body.2"):
        decisions = plan(model)
    assert [d.path for d in decisions] == ["stem", "conv"]
    assert [d.action for d in decisions] == ["keep", "binarize"]
    x = torch.randn(2, 3, 16, 16)
    assert binary(x).isfinite().all()


def test_a_model_of_calls_alone_is_refused_with_their_names() -> None:
    with pytest.raises(ConversionError, match=r"Kernel\): conv2d at test_calls.py"):
        binarize(nn.Sequential(Kernel()))


def test_the_summary_and_the_file_name_them(tmp_path: Path) -> None:
    model = Net(Kernel())
    with pytest.warns(UserWarning, match="calls in a forward"):
        binary = binarize(model)
    text = str(summarize(binary, (3, 16, 16)))
    assert "not counted: convolutions left in float" in text
    assert f"body.1 (Kernel): conv2d at {line_of('direct')}" in text
    for name in ("a.pt", "a.safetensors"):
        save(binary, tmp_path / name)
        again = load(tmp_path / name, model=model)
        assert conversion_of(again).functional == conversion_of(binary).functional
        assert str(summarize(again, (3, 16, 16))) == text


class Tied(nn.Module):
    """One convolution's weight is used by a call, another's only looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tied = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.looked_at = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied(self.stem(x))
        x = x.to(self.looked_at.weight.device).to(self.looked_at.weight.dtype)
        x = self.looked_at(x.clamp(max=self.looked_at.weight.shape[1]))
        return F.conv_transpose2d(x, self.tied.weight).flatten(1)  # tied


def test_a_convolution_whose_weight_is_used_elsewhere_is_kept() -> None:
    with pytest.warns(UserWarning, match="calls in a forward"):
        decisions = {d.path: d for d in plan(Tied())}
    assert decisions["tied"].pattern == "weight-read"
    assert "conv.weight" in decisions["tied"].reason
    assert decisions["looked_at"].action == "binarize"
    with pytest.warns(UserWarning) as seen:
        binary = binarize(Tied())
    assert any("1 of 3 convolutions kept in float: tied: " in str(w.message) for w in seen)
    assert type(binary.tied) is nn.Conv2d


class Positions(nn.Module):
    """Adds a learned code of positions, as XCiT and EdgeNeXt do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.code = nn.Conv2d(3, 8, 3), nn.Conv2d(2, 8, 1)
        self.body, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        rows = x.new_ones(x.shape[0], x.shape[2], x.shape[3]).cumsum(1)
        columns = x.new_ones(x.shape[0], x.shape[2], x.shape[3]).cumsum(2)
        x = x + self.code(torch.stack([rows, columns], 1).sin())
        return self.head(self.body(x).mean((2, 3)))  # type: ignore[no-any-return]


def test_a_code_of_positions_is_kept() -> None:
    decisions = {d.path: d for d in plan(Positions())}
    assert decisions["code"].pattern == "position-code"
    assert decisions["body"].action == "binarize"
    off = plan_conversion(Positions(), _switched_off())
    assert {d.path: d.action for d in off.decisions}["code"] == "binarize"
    binary = binarize(Positions())
    assert binary(torch.randn(2, 3, 16, 16)).isfinite().all()


def _switched_off() -> Any:
    from el_convert.recipes import RECIPES

    return RECIPES["elastic-link"].with_options({"keep.position": False})


def test_lone_convolutions() -> None:
    """The model is the convolution: it was named by giving it, and there is no image."""
    conv = nn.Conv2d(8, 16, 3, padding=1)
    (decision,) = plan(conv)
    assert (decision.path, decision.action) == ("", "binarize")
    layer = binarize(conv)
    assert isinstance(layer, nn.Conv2d)
    assert layer.weight is not conv.weight
    x = torch.randn(2, 8, 9, 9)
    scale = conv.weight.abs().mean((1, 2, 3)).view(-1, 1, 1)
    sign = torch.where(x > 0, 1.0, -1.0)
    counted = F.conv2d(sign, torch.where(conv.weight > 0, 1.0, -1.0), padding=1) * scale
    expected = counted + x.repeat_interleave(2, 1) + conv.bias.view(-1, 1, 1)  # type: ignore[union-attr]
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(ConversionError, match="leave inplace out"):
        binarize(conv, inplace=True)


def test_a_lone_convolution_is_saved(tmp_path: Path) -> None:
    conv = nn.Conv1d(8, 16, 3)
    layer, x = binarize(conv), torch.randn(2, 8, 9)
    save(layer, tmp_path / "conv.pt")
    again = load(tmp_path / "conv.pt", model=conv)
    assert type(again) is type(layer)
    assert torch.equal(again(x), layer(x))
    assert "(the model)" in str(summarize(layer, (8, 9)))


def test_no_model_of_these_libraries_calls_a_function() -> None:
    """Anti-aliasing blurs are fixed, and weight-standardized layers are convolutions."""
    import timm

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("resnetblur18", "nf_resnet26", "tf_efficientnet_b0", "test_efficientnet"):
            if timm.is_model(name):
                assert found_in(timm.create_model(name)) == ()


def test_every_convolution_function_is_known() -> None:
    from el_convert.tracing import CONVOLUTION_FUNCTIONS

    names = {name for name, _ in inspect.getmembers(F) if name.startswith("conv")}
    assert {name for name in names if name != "conv_tbc"} == CONVOLUTION_FUNCTIONS
