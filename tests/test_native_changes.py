"""A packed layer that ran natively sees every change of its tensors, and copies are apart."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kernel_cases import Calls, by_torch, everything, layer, near, needs_engine
from torch import nn

from el_convert.packed import PackedConv
from el_convert.tail import Tail

pytestmark = needs_engine


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@dataclass(frozen=True)
class Change:
    """Something done to a packed layer after it ran once."""

    name: str
    apply: Callable[[PackedConv], object]


def halved(packed: PackedConv) -> None:
    packed.half().float()


def _load(packed: PackedConv) -> None:
    packed.load_state_dict({k: v + 1 for k, v in packed.state_dict().items()})


def _assign(packed: PackedConv) -> None:
    packed.load_state_dict({k: v + 1 for k, v in packed.state_dict().items()}, assign=True)


def _in_inference_mode(packed: PackedConv) -> None:
    with torch.inference_mode():
        packed.link.gamma.mul_(3)  # type: ignore[union-attr]


def _set_data(packed: PackedConv) -> None:
    packed.link.gamma.data = torch.ones(12) * 3  # type: ignore[union-attr]


def _in_place(name: str) -> Change:
    def apply(packed: PackedConv) -> None:
        with torch.no_grad():
            value = packed.get_parameter(name) if "." in name else packed.get_buffer(name)
            value.bitwise_not_() if name == "bits" else value.mul_(-1.5)

    return Change(f"in-place-{name}", apply)


def _replaced(name: str) -> Change:
    return Change(
        f"replaced-{name}", lambda packed: setattr(packed, name, -packed.get_buffer(name) + 1)
    )


TENSORS = ["bits", "scale", "bias", "threshold", "norm_scale", "norm_shift"]
CHANGES = [
    *map(_in_place, [*TENSORS, "link.gamma"]),
    *map(_replaced, TENSORS),
    Change("replaced-gamma", lambda p: setattr(p.link, "gamma", nn.Parameter(torch.ones(12) * 3))),
    Change("data-of-gamma", _set_data),
    Change("no-gamma", lambda p: setattr(p, "link", None)),
    Change("no-bias", lambda p: setattr(p, "bias", None)),
    Change("inference-mode", _in_inference_mode),
    Change("load", _load),
    Change("load-assign", _assign),
    Change("half-and-back", halved),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_changes_are_seen(calls: Calls, change: Change) -> None:
    packed, x = everything(), torch.randn(2, 8, 7, 6)
    before = packed(x)
    change.apply(packed)
    result = packed(x)
    assert calls.take() == 2
    near(result, by_torch(packed, x))
    assert not torch.equal(result, before)


@pytest.mark.parametrize("gamma", ["channel", "scalar", "fixed"])
def test_changes_of_a_layer_with_a_gate_alone(calls: Calls, gamma: str) -> None:
    options: Any = {"weight.scale": "none", "link.gamma": gamma, "link.gamma_init": 1.23456789}
    packed = PackedConv(layer(8, 12, 3, bias=False, **options))
    x = torch.randn(2, 8, 7, 6)
    for change in (halved, lambda p: setattr(p, "link", None)):
        packed(x)
        change(packed)
        near(packed(x), by_torch(packed, x))
    assert calls.take() == 4


def test_changes_of_inference_tensors_are_seen() -> None:
    with torch.inference_mode():
        packed, x = everything(), torch.randn(2, 8, 7, 6)
        packed(x)
        packed.bits.bitwise_not_()
        near(packed(x), by_torch(packed, x))


def test_other_dtypes(calls: Calls) -> None:
    binary, x = layer(8, 12, 3, padding=1), torch.randn(2, 8, 7, 6)
    packed = PackedConv(binary)
    packed(x)
    assert calls.take() == 1
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        other = copy.deepcopy(packed).to(dtype)
        result, expected = other(x.to(dtype)), binary(x.to(dtype).float())
        assert calls.take() == 0
        assert result.dtype == dtype
        tolerance = max(1e-5, 4 * torch.finfo(dtype).eps)
        error = (result.double() - expected.double()).norm()
        assert error <= tolerance * expected.norm()
    back = packed.double()
    near(back(x.double()), binary.double()(x.double()))
    assert calls.take() == 0
    near(back.float()(x), binary.float()(x))
    assert calls.take() == 1


def through_file(packed: PackedConv) -> PackedConv:
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    loaded: PackedConv = torch.load(file, weights_only=False)
    return loaded


def test_copies(calls: Calls) -> None:
    packed, x = everything(), torch.randn(2, 8, 7, 6)
    expected = packed(x)
    copies = [copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), through_file(packed)]  # noqa: S301
    copies.append(everything())
    assert not torch.equal(copies[-1](x), expected)
    copies[-1].load_state_dict(packed.state_dict())
    calls.take()
    for other in copies:
        assert torch.equal(other(x), expected)
        other.get_parameter("link.gamma").data.zero_()
    assert calls.take() == len(copies)
    assert torch.equal(packed(x), expected)  # nothing is shared
    assert not any("fast" in key for key in packed.state_dict())


def test_changed_slopes_are_seen(calls: Calls) -> None:
    packed, x = everything(), torch.randn(2, 8, 7, 6)
    packed.tail = Tail("rprelu")
    tensors = [torch.randn(12) for _ in range(3)]
    before = packed(x, None, None, *tensors)
    for tensor in tensors:
        tensor.neg_()
        result = packed(x, None, None, *tensors)
        near(result, by_torch(packed, x, None, None, *tensors))
        assert not torch.equal(result, before)
        before = result
    assert calls.take() == 4
