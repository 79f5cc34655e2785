"""The formulas of el_convert.functional against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from el_convert.functional import (
    SignGradient,
    binarize_ste,
    sign_surrogate,
    weight_scale,
    xnor_activation_scale,
)

SPECIAL = [-math.inf, -2.0, -1.0, -0.5, -0.0, 0.0, 1e-45, 0.5, 1.0, 2.0, math.inf, math.nan]


def test_sign_is_strict() -> None:
    expected = [-1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, -1]
    assert binarize_ste(torch.tensor(SPECIAL)).tolist() == expected


@given(st.lists(st.floats(width=32), min_size=1))
def test_sign_of_relu_is_sign(values: list[float]) -> None:
    values = [value for value in values if not math.isnan(value)] or [0.0]
    input = torch.tensor(values)
    assert torch.equal(binarize_ste(input.relu()), binarize_ste(input))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sign_keeps_dtype_shape_and_layout(dtype: torch.dtype) -> None:
    input = torch.randn(2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last)
    output = binarize_ste(input)
    assert output.dtype == dtype
    assert output.stride() == input.stride()
    assert set(output.unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1, 1)])
def test_sign_of_odd_shapes(shape: tuple[int, ...]) -> None:
    assert binarize_ste(torch.ones(shape)).shape == shape


def surrogate_by_hand(x: float, gradient: str) -> float:
    if math.isnan(x):
        return 0.0 if gradient == "clip" else x
    if abs(x) > 1:
        return 0.0
    return 1.0 if gradient == "clip" else 2.0 - 2.0 * abs(x)


@pytest.mark.parametrize("gradient", ["approx", "clip"])
def test_gradient_is_the_formula(gradient: SignGradient) -> None:
    input = torch.tensor(SPECIAL, requires_grad=True)
    upstream = torch.arange(1.0, len(SPECIAL) + 1)
    (grad,) = torch.autograd.grad(binarize_ste(input, gradient), input, upstream)
    expected = [u * surrogate_by_hand(x, gradient) for u, x in zip(upstream, SPECIAL, strict=True)]
    torch.testing.assert_close(grad, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)
    slope = sign_surrogate(input.detach(), gradient)
    wanted = torch.tensor([surrogate_by_hand(x, gradient) for x in SPECIAL])
    torch.testing.assert_close(slope, wanted, rtol=0, atol=0, equal_nan=True)


def test_unknown_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="'approx' or 'clip'"):
        binarize_ste(torch.ones(1), "tanh")  # type: ignore[arg-type]


def test_sign_under_vmap_and_func_grad() -> None:
    input = torch.randn(4, 3)
    assert torch.equal(torch.vmap(binarize_ste)(input), binarize_ste(input))

    def total(x: Tensor) -> Tensor:
        return binarize_ste(x).sum()

    assert torch.allclose(torch.func.grad(total)(input), sign_surrogate(input, "approx"))


def test_weight_scale_by_hand() -> None:
    weight = torch.tensor([[[1.0, -2.0], [3.0, -4.0]], [[0.0, 0.0], [1.0, 1.0]]])
    assert weight_scale(weight).tolist() == [2.5, 0.5]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_transposed_weight_scale_is_a_loop(groups: int) -> None:
    weight = torch.randn(8, 3, 2, 2)
    scale = weight_scale(weight, groups=groups, transposed=True)
    assert scale.shape == (3 * groups,)
    for group in range(groups):
        rows = weight[group * 8 // groups : (group + 1) * 8 // groups]
        for channel in range(3):
            expected = rows[:, channel].abs().mean()
            assert torch.isclose(scale[group * 3 + channel], expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_xnor_scale_is_a_loop(groups: int) -> None:
    input = torch.randn(2, 4, 5, 5)
    scale = xnor_activation_scale(
        input,
        6,
        groups,
        lambda a, k: torch.nn.functional.conv2d(a, k, padding=1, stride=2, groups=groups),
        (3, 3),
    )
    padded = torch.nn.functional.pad(input.abs(), (1, 1, 1, 1))
    for group in range(groups):
        part = padded[:, group * 4 // groups : (group + 1) * 4 // groups].mean(1)
        for row in range(3):
            for column in range(3):
                window = part[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
                got = scale[:, group * 6 // groups if groups > 1 else 0, row, column]
                assert torch.allclose(got, window.sum((1, 2)) / 9, atol=1e-6)
