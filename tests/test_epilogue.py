"""What follows the sums, in one pass: against the formulas of `engine.h` in double precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from kernel_cases import INF, LAST, NAN, Case, conv, every_isa, prepared, truth
from torch import Tensor
from torch.nn import functional

from el_convert.kernels import ConvGeometry
from el_convert.kernels.native import Epilogue

STEPS: dict[str, dict[str, Any]] = {
    "scale": {"scale": True},
    "bias": {"bias": True},
    "norm": {"norm_scale": True, "norm_shift": True},
    "threshold": {"threshold": True},
    "link": {"link": "identity"},
    "residual": {"residual": True},
    "clamp": {"activation": "clamp", "low": -3.0, "high": 6.0},
    "relu": {"activation": "clamp"},
    "prelu": {"activation": "prelu", "slope": True},
    "rprelu": {"activation": "prelu", "slope": True, "act_in": True, "act_out": True},
    "silu": {"activation": "silu"},
    "hardswish": {"activation": "hardswish"},
}
ALL: dict[str, Any] = {
    key: True for step in ("scale", "bias", "norm", "threshold") for key in STEPS[step]
}
ALL |= {"residual": True, "link": "identity"}
STEPS |= {
    f"all-{act}-{link}{last}": {
        **ALL, **STEPS[act], "link_after_norm": bool(link), "residual_last": bool(last)
    }
    for act, link, last in product(["clamp", "rprelu", "silu", "hardswish"], [0, 1], [0, 1])
}  # fmt: skip
NAMES = ["threshold", "scale", "bias", "norm_scale", "norm_shift", "slope", "act_in", "act_out"]
Parts = tuple[Tensor, Epilogue, Tensor | None, Tensor | None]


def with_epilogue(g: ConvGeometry, x: Tensor, weight: Tensor, **o: Any) -> tuple[Parts, Tensor]:
    """What a native convolution is called with, and what `engine.h` says comes out."""
    v: dict[str, Tensor] = {
        name: torch.randn(g.in_channels if name == "threshold" else g.out_channels)
        for name in NAMES
        if o.pop(name, False)
    }
    exact = truth(x, weight, g, v.get("threshold"))
    has_residual, kind = o.pop("residual", False), o.get("link", "none")
    residual = torch.randn(exact.shape).to(memory_format=LAST) if has_residual else None
    link = None
    if kind != "none":
        v["gamma"] = torch.randn(g.out_channels)
        channels = g.out_channels if kind == "identity" else g.in_channels
        link = torch.randn(len(x), channels, *exact.shape[2:]).to(memory_format=LAST)
    given: dict[str, Any] = {**v, **o}
    parts = (x.contiguous(memory_format=LAST), Epilogue(**given), link, residual)
    d = {name: value.double().view(-1, 1, 1) for name, value in v.items()}
    added = 0 if link is None else d["gamma"] * matched(link.double(), g.out_channels, kind)
    y = exact * d.get("scale", 1) + d.get("bias", 0)
    y = y if o.get("link_after_norm") else y + added
    y = y * d.get("norm_scale", 1) + d.get("norm_shift", 0)
    y = y + added if o.get("link_after_norm") else y
    y = y if residual is None or o.get("residual_last") else y + residual.double()
    y = y + d.get("act_in", 0)
    if o.get("activation") == "clamp":
        y = y.clamp(o.get("low", 0.0), o.get("high", INF))
    smooth = {"silu": functional.silu, "hardswish": functional.hardswish}
    y = smooth[o["activation"]](y) if o.get("activation") in smooth else y
    y = torch.where(y > 0, y, y * d["slope"]) if "slope" in d else y
    y = y + d.get("act_out", 0)
    return parts, y + residual.double() if o.get("residual_last") and residual is not None else y


def matched(link: Tensor, channels: int, kind: str) -> Tensor:
    if kind == "expand":
        return torch.repeat_interleave(link, channels // link.shape[1], 1)
    groups = torch.unflatten(link, 1, (channels, -1)).sum(2)
    return groups * channels / link.shape[1] if kind == "mean" else groups


def assert_near(result: Tensor, expected: Tensor) -> None:
    assert result.is_contiguous(memory_format=LAST)
    scale = float(expected.abs().max())
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6 * scale)


@every_isa
@pytest.mark.parametrize("step", STEPS)
def test_epilogue_steps(step: str, isa: str) -> None:
    for channels in (1, 5, 17, 33, 70, 130):
        for g in (
            conv(6, channels, (3, 3), 1),
            conv(7, channels, (1, 1), stride=(1, 2)),
            conv(channels, channels, (3, 3), 1, groups=channels),
        ):
            x, weight, _ = Case(g, (3, 37), 2, seed=channels).tensors()
            parts, expected = with_epilogue(g, x, weight, **STEPS[step])
            assert_near(prepared(g, weight, isa)(*parts), expected)


@every_isa
@pytest.mark.parametrize(
    ("kind", "times"),
    [*product(["expand"], [2, 3, 4, 5, 8]), *product(["mean", "sum"], [2, 3, 4, 6, 8])],
)
def test_links_that_match_channels(kind: str, times: int, isa: str) -> None:
    for few, kernel, after in product((1, 5, 17, 33, 70), (1, 3), (False, True)):
        channels = (few, few * times) if kind == "expand" else (few * times, few)
        g = conv(*channels, (kernel, kernel), kernel // 2)
        x, weight, _ = Case(g, (2, 19), 2, seed=few).tensors()
        options = {**ALL, "link": kind, "link_after_norm": after}
        parts, expected = with_epilogue(g, x, weight, **options)
        assert_near(prepared(g, weight, isa)(*parts), expected)


@every_isa
def test_not_a_number_goes_through(isa: str) -> None:
    g = conv(5, 5, (1, 1))
    x, weight, _ = Case(g, (1, 1)).tensors()
    given = x.contiguous(memory_format=LAST)
    slope, awkward = torch.ones(5) / 2, torch.tensor([NAN, INF, -INF, 1000.0, -1000.0])
    clamp = Epilogue(bias=awkward, activation="clamp", low=-5.0, high=6.0)
    result = prepared(g, weight, isa)(given, clamp).flatten()
    assert torch.equal(result.nan_to_num(7.0), torch.tensor([7.0, 6.0, -5.0, 6.0, -5.0]))
    prelu = Epilogue(bias=awkward, activation="prelu", slope=slope)
    result = prepared(g, weight, isa)(given, prelu).flatten()
    expected = (truth(x, weight, g).flatten() + awkward) * torch.tensor([1.0, 1.0, 0.5, 1.0, 0.5])
    assert torch.equal(result.nan_to_num(7.0), expected.float().nan_to_num(7.0))
    far = torch.tensor([NAN, INF, -INF, 1e4, -1e4])
    for name, formula in (("silu", functional.silu), ("hardswish", functional.hardswish)):
        result = prepared(g, weight, isa)(given, Epilogue(bias=far, activation=name)).flatten()
        expected = formula(truth(x, weight, g).float().flatten() + far)
        torch.testing.assert_close(result, expected, equal_nan=True)


BUSY = {
    "3x3": conv(20, 70, (3, 3), 1),
    "pointwise": conv(140, 70, (1, 1), stride=(2, 1)),
    "depthwise": conv(70, 70, (5, 5), 2, groups=70),
    "grouped": conv(40, 70, (3, 3), 1, groups=5),
}


def busy(name: str) -> tuple[ConvGeometry, Tensor, Parts]:
    g = BUSY[name]
    x, weight, _ = Case(g, (31, 33), 3).tensors()
    return g, weight, with_epilogue(g, x, weight, **STEPS["all-rprelu-10"])[0]


@contextmanager
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@every_isa
@pytest.mark.parametrize("name", BUSY)
def test_threads_and_batches_change_nothing(name: str, isa: str) -> None:
    g, weight, (x, epilogue, link, residual) = busy(name)
    assert link is not None
    assert residual is not None
    run = prepared(g, weight, isa)
    results: list[Tensor] = []
    with threads_restored():
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(run(x, epilogue, link, residual))
    single = [
        run(x[i : i + 1], epilogue, link[i : i + 1], residual[i : i + 1]) for i in range(len(x))
    ]
    for result in (*results[1:], torch.cat(single)):
        assert torch.equal(result.nan_to_num(7.0), results[0].nan_to_num(7.0))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="prelu needs a slope"):
        Epilogue(activation="prelu")
    for kind in ("identity", "expand", "mean", "sum"):
        with pytest.raises(ValueError, match="link needs its gamma"):
            Epilogue(link=kind)
