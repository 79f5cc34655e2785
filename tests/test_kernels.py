"""The 1-bit convolution against plain torch on sign tensors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    ENGINE,
    INF,
    ISAS,
    LAST,
    NAN,
    Case,
    conv,
    needs_engine,
    prepare,
    prepared,
    too_large,
    truth,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode

from el_convert.bits import pack_bits
from el_convert.kernels import ConvGeometry, Engine, binary_conv2d, reference_conv2d
from el_convert.kernels.native import Epilogue
from el_convert.nn import BinaryConv2d
from el_convert.packed import PackedConv

OP = torch.ops.el_convert.binary_conv2d


def check(case: Case) -> None:
    g, (x, weight, t) = case.geometry, case.tensors()
    bits, expected = pack_bits(weight.flatten(1)), truth(x, weight, case.geometry, t).float()
    assert torch.equal(reference_conv2d(x, bits, t, g), expected)
    result = binary_conv2d(x, bits, t, g)
    assert torch.equal(result, expected)
    assert result.is_contiguous(memory_format=LAST)
    given = x.contiguous(memory_format=LAST)
    for isa in ISAS:
        conv = prepare(g, weight, isa)
        assert (conv is None) == too_large(g)
        if conv is not None:
            assert torch.equal(conv(given, Epilogue(threshold=t)), expected), isa


AWKWARD = {
    "pointwise": Case(conv(13, 70, (1, 1)), (7, 5), 3),
    "pointwise-strided": Case(conv(64, 33, (1, 1), stride=(2, 3)), (7, 5), 2),
    "pointwise-padded": Case(conv(9, 17, (1, 1), 1), (4, 3), 2),
    "pointwise-padded-after": Case(conv(9, 17, (1, 1), padding=(0, 1, 0, 2)), (4, 3), 2),
    "pointwise-grouped": Case(conv(12, 6, (1, 1), groups=3), (17, 19), threshold=True),
    "odd-2099": Case(conv(2099, 3, (3, 3), 1), (3, 3), threshold=True),
    "outputs-2100": Case(conv(3, 2100, (2, 1), 1), (2, 2)),
    "kernel-7-dilated": Case(conv(17, 9, (7, 7), 3, dilation=(2, 2)), (9, 8), 2),
    "kernel-1x7": Case(conv(33, 65, (1, 7), padding=(0, 0, 3, 3)), (3, 40)),
    "kernel-7x1": Case(conv(33, 65, (7, 1), padding=(3, 1, 0, 0), stride=(3, 2)), (20, 3)),
    "one-pixel": Case(conv(5, 5, (7, 5), 3), (1, 1), 3),
    "mostly-padding": Case(conv(20, 31, (2, 2), 3, stride=(2, 1)), (1, 2), 2),
    "depthwise": Case(conv(130, 130, (3, 3), 1, groups=130), (9, 8), 2, threshold=True),
    "depthwise-7x5": Case(conv(33, 33, (7, 5), padding=(3, 0, 2, 1), groups=33), (9, 33), 2),
    "depthwise-strided": Case(conv(65, 65, (3, 3), 1, groups=65, stride=(2, 3)), (9, 40)),
    "depthwise-times-3": Case(conv(11, 33, (3, 3), 1, groups=11), (6, 6), 2),
    "grouped": Case(conv(51, 102, (3, 2), 1, groups=3, dilation=(1, 2)), (8, 9), 2),
    "many-strips": Case(conv(24, 130, (3, 3), 1), (40, 41), 2),
    "wide": Case(conv(3, 5, (3, 3), 1), (2, 700)),
    "tall": Case(conv(3, 5, (3, 3), 1, stride=(3, 1)), (700, 2)),
    "no-images": Case(conv(3, 5, (3, 3), 1), (4, 4), 0),
    "all-disagree": Case(conv(65535, 2, (1, 1)), (1, 3), minus=(0, 1)),
    "all-agree": Case(conv(1337, 2, (7, 7)), (7, 9), minus=(1, 1)),
    "too-many-terms": Case(conv(65536, 2, (1, 1)), (1, 3), minus=(0, 1)),
    "too-many-taps": Case(conv(1338, 2, (7, 7)), (7, 9), minus=(1, 1)),
    "depthwise-255": Case(conv(3, 3, (15, 17), groups=3), (16, 18), minus=(0, 1)),
    "depthwise-256": Case(conv(3, 3, (16, 16), groups=3), (16, 18), minus=(0, 1)),
    "single-channel-256": Case(conv(1, 2, (16, 16)), (16, 18), minus=(0, 1)),
    "grouped-256": Case(conv(3, 6, (16, 16), groups=3), (16, 18), minus=(0, 1)),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_shapes(name: str) -> None:
    for layout in ("plain", "last", "sliced", "expanded", "turned"):
        check(replace(AWKWARD[name], layout=layout, seed=len(layout)))


CHANNELS = st.one_of(
    st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 129, 255, 257, 500, 1023, 1025, 2100])
)
SHARES = st.sampled_from([0.5, 0.5, 0.5, 0.0, 1.0])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kernel = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    top, bottom, left, right = (draw(st.integers(0, 3)) for _ in range(4))
    kind = draw(st.sampled_from(["dense", "dense", "grouped", "depthwise"]))
    inputs = draw(CHANNELS)
    if kind == "depthwise":
        groups = min(inputs, 130)
        inputs, outputs = groups, groups * draw(st.sampled_from([1, 1, 2]))
    else:
        groups = draw(st.integers(2, 4)) if kind == "grouped" else 1
        inputs = -(-inputs // groups)
        # So that a case takes milliseconds.
        most = max(1, 100_000 // (inputs * kernel[0] * kernel[1] * groups))
        inputs, outputs = inputs * groups, min(draw(CHANNELS), most) * groups
    pads = (top + bottom, left + right)
    size = [
        max(1, d * (k - 1) + 1 - p) + draw(st.integers(0, 5))
        for d, k, p in zip(dilation, kernel, pads, strict=True)
    ]
    geometry = ConvGeometry(
        inputs, outputs, groups, kernel, stride, dilation, (top, bottom, left, right)
    )
    return Case(
        geometry,
        (size[0], size[1]),
        draw(st.integers(0, 3)),
        (draw(SHARES), draw(SHARES)),
        draw(st.sampled_from(["plain", "last", "sliced", "expanded", "turned"])),
        draw(st.booleans()),
        draw(st.integers(0, 99)),
    )


@settings(max_examples=300, deadline=None)
@given(cases())
def test_any_shape(case: Case) -> None:
    check(case)


def test_threshold_is_strict_and_per_channel() -> None:
    g, weight = conv(8, 8, (1, 1), groups=8), torch.ones(8, 1, 1, 1)
    t = torch.tensor([0.0, 1.0, -1.0, 1.0, INF, -INF, NAN, 1e-45])
    x = torch.tensor([-0.0, 1.0, -0.5, 0.5, INF, INF, INF, 3e-45]).view(1, 8, 1, 1)
    expected = [-1, -1, 1, -1, -1, 1, -1, 1]
    bits = pack_bits(weight.flatten(1))
    assert binary_conv2d(x, bits, t, g).flatten().tolist() == expected
    every_second = t.repeat_interleave(2)[::2]
    assert binary_conv2d(x, bits, every_second, g).flatten().tolist() == expected


def arguments(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    g, (x, weight, t) = case.geometry, case.tensors()
    t = None if t is None else t.to(dtype)
    shape = (g.kernel, g.stride, g.padding, g.dilation, g.groups)
    return (x.to(dtype), pack_bits(weight.flatten(1)), t, *shape)


OPERATOR_CASES = [
    Case(conv(9, 12, (3, 2), groups=3, padding=(1, 0, 2, 1), stride=(2, 1)), (6, 5), 2),
    Case(conv(9, 12, (1, 1)), (1, 1), 1, threshold=True),
    Case(conv(1, 1, (3, 3), 1), (6, 5), 2, threshold=True),
    Case(conv(8, 8, (3, 3), 1, groups=8), (6, 1), 2),
]
each_call = pytest.mark.parametrize(
    ("case", "layout", "dtype"),
    [
        *product(OPERATOR_CASES, ["plain", "last", "sliced"], [torch.float32]),
        *product(OPERATOR_CASES[:2], ["plain", "last"], [torch.float64, torch.float16]),
        (OPERATOR_CASES[1], "plain", torch.bfloat16),
    ],
)


@each_call
def test_operator_is_sound(case: Case, layout: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(OP.default, arguments(replace(case, layout=layout), dtype))


@each_call
def test_fake_results_are_like_real_ones(case: Case, layout: str, dtype: torch.dtype) -> None:
    case = replace(case, layout=layout)
    given, (_, weight, _) = arguments(case, dtype), case.tensors()
    expected = truth(given[0], weight, case.geometry, given[2]).to(dtype)
    assert torch.equal(OP(*given), expected)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in given]
        fake = OP(*fakes)
    metas = [a.to("meta") if isinstance(a, Tensor) else a for a in given]
    for result in (fake, OP(*metas)):
        assert result.shape == expected.shape
        assert result.dtype == dtype
        assert significant(result) == significant(OP(*given))
    assert (fake.device.type, OP(*metas).device.type) == ("cpu", "meta")


def significant(x: Tensor) -> list[int]:
    """The strides that decide where elements lie."""
    return [step for step, n in zip(x.stride(), x.shape, strict=True) if n > 1]


def at_once(functions: list[Callable[[Tensor], Tensor]], inputs: list[Tensor]) -> None:
    """Each of them in its own thread, 20 rounds."""
    serial = [f(x) for f, x in zip(functions, inputs, strict=True)]

    def rounds(index: int) -> bool:
        with torch.no_grad():
            results = [functions[index](inputs[index]) for _ in range(20)]
        return all(torch.equal(result, serial[index]) for result in results)

    with ThreadPoolExecutor(len(inputs)) as pool:
        assert all(pool.map(rounds, range(len(inputs))))


@pytest.mark.parametrize("sizes", [[16] * 4, [16, 9, 12, 16]], ids=["same", "sizes"])
def test_reentrant(sizes: list[int]) -> None:
    inputs = [torch.randn(2, 24, n, n).to(memory_format=LAST) for n in sizes]
    g, weight = conv(24, 70, (3, 3), 1), torch.randn(70, 24, 3, 3)
    for isa in ISAS:
        native, epilogue = prepared(g, weight, isa), Epilogue(bias=torch.randn(70))
        at_once([lambda x, n=native, e=epilogue: n(x, e)] * 4, inputs)  # type: ignore[misc]
    packed = PackedConv(BinaryConv2d(24, 48, 3, padding=1).eval())
    at_once([packed] * 4, inputs)
    # Four weights in one memory.
    bits = pack_bits(torch.randn(4, 70, 24 * 9)).unbind()
    at_once([lambda x, b=b: binary_conv2d(x, b, None, g) for b in bits], inputs)  # type: ignore[misc]


@needs_engine
def test_weights_of_another_shape_are_refused() -> None:
    assert ENGINE is not None
    g, bits = conv(9, 4, (3, 3)), torch.zeros(4, 11, dtype=torch.uint8)
    assert ENGINE.prepare(g, bits) is not None
    for bad in (bits[:3], bits[:, :10], bits.flatten(), bits.int(), bits.bool(), bits.float()):
        with pytest.raises(ValueError, match=r"packed weights are .*, not \(4, 11\) uint8"):
            ENGINE.prepare(g, bad)


def test_arguments_that_do_not_fit_are_refused() -> None:
    g, x, bits = conv(9, 4, (3, 3)), torch.randn(2, 9, 5, 5), torch.zeros(4, 11, dtype=torch.uint8)
    for bad_x, bad_bits, t in (
        (x, bits, torch.zeros(3)),
        (x, bits[:, :10], None),
        (x[:, :7], bits, None),
        (x[..., :2], bits, None),
    ):
        for function in (binary_conv2d, reference_conv2d):
            with pytest.raises((RuntimeError, ValueError)):
                function(bad_x, bad_bits, t, g)


PLAIN = conv(16, 4, (1, 1))


def right(x: Tensor, bits: Tensor) -> bool:
    """Against the bits as they are now."""
    weight = torch.stack([bits >> i & 1 for i in range(8)], -1).flatten(1).float() - 0.5
    expected = truth(x, weight.view(4, 16, 1, 1), PLAIN).float()
    return torch.equal(binary_conv2d(x, bits, None, PLAIN), expected)


def random_bits(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def test_changed_weights_are_seen() -> None:
    x, bits = torch.randn(2, 16, 3, 3), random_bits(4, 2)
    assert right(x, bits)
    bits.copy_(random_bits(4, 2))
    assert right(x, bits)
    bits[1] = 255 - bits[1]
    assert right(x, bits)
    with torch.inference_mode():
        bits.bitwise_not_()
        assert right(x, bits)
    bits.data = random_bits(4, 2)
    assert right(x, bits)


def test_changed_weights_of_inference_mode_are_seen() -> None:
    with torch.inference_mode():
        x, bits = torch.randn(2, 16, 3, 3), random_bits(4, 2)
        assert right(x, bits)
        bits.bitwise_not_()
        assert right(x, bits)


def test_views_of_one_memory_do_not_mix() -> None:
    x, base = torch.randn(2, 16, 3, 3), random_bits(16, 2)
    views = [base[:4], base[4:8], base[12:], base[1:5], base[:4]]
    assert all(right(x, view) for view in views)
    # From the same first byte on, at other strides.
    assert all(right(x, view) for view in (base[::4], base[:4], base[:8:2]))


@needs_engine
def test_weights_are_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[ConvGeometry] = []
    original = Engine.prepare

    def spy(self: Engine, g: ConvGeometry, bits: Tensor, isa: str | None = None) -> Any:
        calls.append(g)
        return original(self, g, bits, isa)

    monkeypatch.setattr(Engine, "prepare", spy)
    x, bits = torch.randn(2, 16, 3, 3), random_bits(4, 2)
    assert all(right(x, bits) for _ in range(3))
    assert len(calls) == 1


def test_default_dtype_and_device_do_not_matter() -> None:
    x, bits = torch.randn(2, 16, 3, 3), random_bits(4, 2)
    torch.set_default_dtype(torch.float64)
    try:
        result = binary_conv2d(x, bits, None, PLAIN)
    finally:
        torch.set_default_dtype(torch.float32)
    assert result.dtype == torch.float32
    assert torch.equal(result, binary_conv2d(x, bits, None, PLAIN))
    # In a process of its own: memory of another device would end it.
    code = """
import torch
from el_convert.kernels import ConvGeometry, binary_conv2d
g = ConvGeometry(8, 2, 1, (1, 1), (1, 1), (1, 1), (0, 0, 0, 0))
x, bits = torch.ones(1, 8, 2, 2), torch.tensor([[255], [0]], dtype=torch.uint8)
with torch.device("meta"):
    assert binary_conv2d(x, bits, None, g).flatten().tolist() == [8.0] * 4 + [-8.0] * 4
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
