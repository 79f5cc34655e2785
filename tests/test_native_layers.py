"""Packed layers on the native engine give what the binary layers give, and know when not to."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import LAST, Calls, agrees, by_torch, everything, layer, near, needs_engine
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from el_convert.fast_path import FastPath
from el_convert.packed import PackedConv
from el_convert.tail import Tail

pytestmark = needs_engine
NATIVE_RECIPES = ["elastic-link", "plain", "bi-real", "reactnet", "elastic-reactnet"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


SHAPES: list[dict[str, Any]] = [
    {"args": (16, 16, 3), "padding": 1, "bias": False},
    {"args": (8, 24, 3), "padding": 1, "stride": 2},
    {"args": (40, 10, 1)},
    {"args": (6, 9, 1), "stride": 2},
    {"args": (9, 6, 5), "padding": 2, "dilation": 2},
    {"args": (12, 12, 3), "padding": 1, "groups": 12},
    {"args": (12, 36, (3, 1)), "padding": (0, 1), "groups": 3, "stride": (1, 2)},
    {"args": (5, 70, (2, 4)), "padding": "same"},
    {"args": (130, 130, 3)},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape["args"])))
@pytest.mark.parametrize("recipe", NATIVE_RECIPES)
def test_recipes_and_shapes(calls: Calls, recipe: str, shape: dict[str, Any]) -> None:
    shape = dict(shape)
    binary = layer(*shape.pop("args"), recipe=recipe, **shape)
    packed = PackedConv(binary)
    for size in ((2, 9, 12), (1, 11, 9)):
        x = torch.randn(size[0], binary.in_channels, *size[1:])
        agrees(packed, binary, x)
        agrees(packed, binary, x.to(memory_format=LAST))
        assert calls.take() == 2


LINKS = {
    "link.squeeze": ["mean", "sum", "slice"],
    "link.expand": ["repeat", "tile", "zero"],
    "link.downsample": ["average", "max", "slice"],
    "link.gamma": ["channel", "scalar", "fixed"],
    "link.where": ["all", "equal"],
}


@pytest.mark.parametrize("place", ["before-norm", "after-norm"])
@pytest.mark.parametrize(("name", "choice"), [(n, c) for n, cs in LINKS.items() for c in cs])
def test_link_options(calls: Calls, name: str, choice: str, place: str) -> None:
    for channels in ((8, 8), (8, 32), (32, 8), (8, 12), (12, 8), (1, 5), (24, 8)):
        for stride in (1, 2):
            options: Any = {name: choice, "link.place": place, "link.gamma_init": 0.75}
            norm = place == "after-norm"
            binary = layer(*channels, 3, padding=1, stride=stride, norm=norm, **options)
            agrees(PackedConv(binary), binary, torch.randn(2, channels[0], 7, 6))
            assert calls.take() == 1


@pytest.mark.parametrize("native", [False, True])
def test_bad_inputs_are_refused(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    packed, x = PackedConv(layer(8, 12, 3, padding=1)), torch.randn(2, 8, 9, 9)
    if not native:
        monkeypatch.setattr("el_convert.fast_path.engine", lambda: None)
        monkeypatch.setattr("el_convert.kernels.operator.engine", lambda: None)
    for _ in range(2):
        for bad in (x[:, :7], x.repeat(1, 2, 1, 1), x[:, :, :0], x[:, 0]):
            with pytest.raises((RuntimeError, ValueError)):
                packed(bad)
        with pytest.raises((RuntimeError, ValueError)):
            PackedConv(layer(8, 12, 5))(x[:, :, :3])
        assert packed(x).shape == (2, 12, 9, 9)


@pytest.mark.parametrize("scale", ["mean", "mean-detached", "learned", "none"])
def test_scales(calls: Calls, scale: str) -> None:
    options: Any = {"weight.scale": scale}
    binary = layer(8, 12, 3, **options)
    agrees(PackedConv(binary), binary, torch.randn(2, 8, 7, 6))
    assert calls.take() == 1


def test_awkward_values(calls: Calls) -> None:
    binary = layer(8, 12, 3, padding=1, recipe="elastic-reactnet")
    x = torch.randn(2, 8, 7, 6)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0])
    x.flatten()[::7] = special.repeat(20)[: len(x.flatten()[::7])]
    x[0, :, 2, 3] = binary.threshold.detach()  # none of these is above it
    result, packed = PackedConv(binary)(x), PackedConv(binary)
    assert calls.take() == 1
    for expected in (binary(x), by_torch(packed, x)):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_what_the_engine_cannot_do_runs_in_torch(calls: Calls) -> None:
    x = torch.randn(2, 8, 9, 9)
    after_norm: Any = {"link.place": "after-norm"}
    real_input: Any = {"input.binary": False}
    group_norm = layer(8, 12, 3, **after_norm)
    group_norm.norm = nn.GroupNorm(3, 12)
    for binary in (
        layer(8, 12, 3, recipe="xnor"),
        layer(8, 12, 3, padding=1, padding_mode="circular"),
        layer(8, 12, 3, padding=2, padding_mode="reflect"),
        layer(8, 12, 3, **real_input),
        group_norm,
    ):
        near(PackedConv(binary)(x), binary(x))
    binary = layer(8, 12, 3, padding=1)
    packed = PackedConv(binary)
    assert torch.equal(packed(x[0]), by_torch(packed, x[0]))
    assert packed(x[:0]).shape == (0, 12, 9, 9)
    assert torch.equal(packed(nn.Parameter(x)), by_torch(packed, nn.Parameter(x)))
    assert calls.take() == 0
    near(packed(x), binary(x))
    assert calls.take() == 1


def test_gradients_go_through_torch(calls: Calls) -> None:
    binary = layer(8, 12, 3, padding=1, recipe="elastic-reactnet")
    packed, x = PackedConv(binary), torch.randn(2, 8, 7, 6)
    grads = []
    for module in (packed, binary):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(module(leaf).square().sum(), leaf)
        grads.append(grad)
    near(*grads)
    assert calls.take() == 0
    with torch.no_grad():
        near(packed(leaf), binary(leaf))
    assert calls.take() == 1
    residual = torch.randn(2, 12, 7, 6, requires_grad=True)
    packed(x, residual=residual).sum().backward()
    assert calls.take() == 0
    assert torch.equal(residual.grad, torch.ones_like(residual))  # type: ignore[arg-type]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each run of a layer was native."""
    seen: list[bool] = []
    original = FastPath.run

    def spy(*args: Any) -> Tensor | None:
        result = original(*args)
        seen.append(result is not None)
        return result

    monkeypatch.setattr(FastPath, "run", spy)
    return seen


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("how", ["compile", "export", "fx"])
def test_graphs_hold_no_native_call(calls: Calls, how: str, warm: bool) -> None:
    packed, x = everything(), torch.randn(2, 8, 7, 6)
    expected = by_torch(packed, x)
    if warm:
        packed(x)
        assert calls.take() == 1
    run: Any
    with torch.no_grad():
        if how == "compile":
            torch.compiler.reset()
            run = torch.compile(packed, fullgraph=True, backend="aot_eager")
        elif how == "export":
            run = torch.export.export(packed, (x,)).module()
        else:
            run = make_fx(packed)(x)
        near(run(x), expected)
    assert calls.take() == 0
    if how == "fx":
        assert "el_convert.binary_conv2d" in run.code


def test_script_traces_without_links_warn_of_nothing() -> None:
    packed, x = PackedConv(layer(8, 12, 3, recipe="plain")), torch.randn(2, 8, 7, 6)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trace: Any = torch.jit.trace
        traced = trace(packed, x, check_trace=False)
    assert [str(w.message) for w in seen if w.category.__name__ == "TracerWarning"] == []
    near(traced(x), by_torch(packed, x))


# Links read the sizes of their input.
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("warm", [False, True])
def test_script_traces_hold_no_native_call(ran: list[bool], warm: bool) -> None:
    packed, x = everything(), torch.randn(2, 8, 7, 6)
    if warm:
        packed(x)
    ran.clear()
    trace: Any = torch.jit.trace
    traced = trace(packed, x, check_trace=False)
    assert not any(ran)
    assert "binary_conv2d" in str(traced.graph)
    for size in (7, 9):
        y = torch.randn(1, 8, size, size)
        near(traced(y), by_torch(packed, y))


@pytest.mark.parametrize("warm", [False, True])
def test_fake_tensors(calls: Calls, warm: bool) -> None:
    packed, x = everything(), torch.randn(2, 8, 7, 6)
    if warm:
        packed(x)
        calls.take()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert packed(mode.from_tensor(x)).shape == (2, 12, 7, 6)
    assert copy.deepcopy(packed).to("meta")(x.to("meta")).shape == (2, 12, 7, 6)
    assert calls.take() == 0


@pytest.mark.parametrize("warm", [False, True])
def test_function_transforms(ran: list[bool], warm: bool) -> None:
    packed, x = everything(), torch.randn(3, 2, 8, 7, 6)
    expected = torch.stack([by_torch(packed, part) for part in x])
    if warm:
        packed(x[0])
    ran.clear()
    near(torch.func.vmap(packed)(x), expected)
    near(torch.func.vmap(packed)(x[:, 0]), expected[:, 0])
    leaf = x[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(by_torch(packed, leaf).sum(), leaf)
    near(torch.func.grad(lambda y: packed(y).sum())(x[0]), grad)
    assert not any(ran)


def test_functional_call(calls: Calls) -> None:
    packed, x = everything(), torch.randn(2, 8, 7, 6)
    packed(x)
    result = torch.func.functional_call(packed, {"link.gamma": torch.zeros(12)}, x)
    with torch.no_grad():
        packed.get_parameter("link.gamma").zero_()
    near(result, by_torch(packed, x))
    assert calls.take() == 2


def test_layouts_follow_the_input(calls: Calls) -> None:
    for binary in (layer(8, 12, 3, padding=1), layer(8, 12, 1, stride=2)):
        packed, x = PackedConv(binary), torch.randn(2, 8, 7, 6)
        wide = torch.randn(2, 8, 7, 12)[..., ::2]
        for given in (x, wide, x[:, :, 1:], x[:1].expand(2, -1, -1, -1)):
            result = agrees(packed, binary, given)
            assert result.is_contiguous()
            result = agrees(packed, binary, given.to(memory_format=LAST))
            assert result.is_contiguous(memory_format=LAST)
            assert not result.is_contiguous()
        assert calls.take() == 8


def test_negated_views(calls: Calls) -> None:
    """torch negates some tensors lazily: their memory holds the opposite signs."""
    binary, x = layer(8, 12, 3, padding=1), torch.randn(2, 8, 7, 6)
    for given in (x, x.to(memory_format=LAST)):
        lazy = torch.complex(given, given).conj().imag
        assert lazy.is_neg()
        agrees(PackedConv(binary), binary, lazy)
        agrees(PackedConv(binary), binary, torch._neg_view(given))


def test_sizes_one_after_another(calls: Calls) -> None:
    binary = layer(8, 12, 3, stride=2, padding=1, recipe="elastic-reactnet")
    packed = PackedConv(binary)
    sizes = [(1, 1), (7, 6), (2, 9), (7, 6), (1, 30), (40, 33), (6, 7), (1, 1)]
    for count, size in enumerate(sizes):
        agrees(packed, binary, torch.randn(1 + count % 3, 8, *size))
    assert calls.take() == len(sizes)


TAILS = {
    "none": Tail(),
    "relu": Tail("clamp"),
    "relu6": Tail("clamp", 0.0, 6.0),
    "hardtanh": Tail("clamp", -1.0, 2.0),
    "prelu": Tail("prelu"),
    "rprelu": Tail("rprelu"),
    "silu": Tail("silu"),
    "hardswish": Tail("hardswish"),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", TAILS)
def test_tails(calls: Calls, name: str, last: bool) -> None:
    packed = everything(stride=2)
    packed.tail = replace(TAILS[name], residual_last=last)
    x, residual = torch.randn(2, 8, 9, 8), torch.randn(2, 12, 5, 4)
    slope, shifts = torch.randn(12), [torch.randn(12), torch.randn(12)]
    plain = PackedConv.__new__(PackedConv)
    plain.__dict__.update(copy.deepcopy(packed).__dict__, tail=Tail())
    for given in (residual, residual.to(memory_format=LAST), residual[:1, :, :1]):
        for gate in (slope, slope[:1]):
            tensors = [gate] if "prelu" in name else []
            tensors += shifts if name == "rprelu" else []
            result = packed(x, None, given, *tensors)
            y = by_torch(plain, x)
            y = y if last else y + given
            near(result, activated(name, y, tensors) + (given if last else 0))
    assert calls.take() == 4  # a residual that is smaller than the output is torch's


def activated(name: str, y: Tensor, tensors: list[Tensor]) -> Tensor:
    if name in ("relu", "relu6", "hardtanh"):
        return y.clamp(TAILS[name].low, TAILS[name].high)
    if not tensors:
        smooth = {"silu": functional.silu, "hardswish": functional.hardswish}
        return smooth[name](y) if name in smooth else y
    shifts = [t.view(-1, 1, 1) for t in tensors[1:]] or [torch.zeros(()), torch.zeros(())]
    y, slope = y - shifts[0], tensors[0].view(-1, 1, 1)
    return torch.where(y > 0, y, y * slope) + shifts[1]


def test_default_dtype_and_device_do_not_matter(calls: Calls) -> None:
    packed, x = everything(), torch.randn(2, 8, 7, 6)
    torch.set_default_dtype(torch.float64)
    try:
        result = packed(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert calls.take() == 1
    near(result, by_torch(packed, x))
    # In a process of its own: memory of another device would end it.
    code = """
import torch
from el_convert.nn import BinaryConv2d
from el_convert.packed import PackedConv
packed, x = PackedConv(BinaryConv2d(8, 8, 3).eval()), torch.randn(1, 8, 5, 5)
expected = packed(x)
with torch.device("meta"):
    assert torch.equal(packed(x), expected)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
