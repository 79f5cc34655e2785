"""Binary convolutions against plain torch on sign tensors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import el_convert.nn as bnn
from el_convert import nn_timm
from el_convert.errors import ConversionError
from el_convert.functional import binarize_ste, sign_surrogate
from el_convert.recipes import RECIPES, Recipe
from el_convert.slopes import RPReLU

PLAIN = RECIPES["plain"]
KINDS = [
    (nn.Conv1d, bnn.BinaryConv1d, F.conv1d),
    (nn.Conv2d, bnn.BinaryConv2d, F.conv2d),
    (nn.Conv3d, bnn.BinaryConv3d, F.conv3d),
    (nn.ConvTranspose1d, bnn.BinaryConvTranspose1d, F.conv_transpose1d),
    (nn.ConvTranspose2d, bnn.BinaryConvTranspose2d, F.conv_transpose2d),
    (nn.ConvTranspose3d, bnn.BinaryConvTranspose3d, F.conv_transpose3d),
]


def signs(x: Tensor) -> Tensor:
    """Written apart from the package: +1 above zero, else -1."""
    return torch.ones_like(x).masked_fill(~(x > 0), -1.0)


def broadcast(values: Tensor, dims: int) -> Tensor:
    return values.view(-1, *[1] * dims)


@pytest.mark.parametrize(("kind", "binary", "function"), KINDS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_convolution_of_signs(
    kind: Any, binary: Any, function: Any, groups: int, bias: bool
) -> None:
    conv = kind(4, 6, 3, stride=2, padding=1, groups=groups, bias=bias)
    layer = binary.from_float(conv, PLAIN)
    layer.eval()  # training multiplies the scale into the weight: other roundings
    dims = len(conv.kernel_size)
    input = torch.randn(2, 4, *[7] * dims)
    out_first = conv.weight
    if conv.transposed:  # (C_in, C_out / G, ...): bring each group's outputs to the front
        out_first = torch.cat([part.transpose(0, 1) for part in conv.weight.chunk(groups)])
    scale = out_first.abs().flatten(1).mean(1)
    expected = function(
        signs(input), signs(conv.weight), stride=2, padding=1, groups=groups
    ) * broadcast(scale, dims)
    if bias:
        expected = expected + broadcast(conv.bias, dims)
    assert torch.equal(layer(input), expected)


@settings(max_examples=80, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    groups=st.integers(1, 3),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.one_of(st.integers(0, 3), st.just("valid")),
    dilation=st.integers(1, 2),
    size=st.integers(7, 11),
    seed=st.integers(0, 99),
)
def test_any_geometry_counts_exactly(
    channels: tuple[int, int],
    groups: int,
    kernel: int,
    stride: int,
    padding: int | str,
    dilation: int,
    size: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    recipe = PLAIN.with_options({"weight.scale": "none"})
    layer = bnn.BinaryConv2d(
        channels[0] * groups,
        channels[1] * groups,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        bias=False,
        recipe=recipe,
    )
    input = torch.randn(2, layer.in_channels, size, size)
    expected = F.conv2d(
        signs(input).double(), signs(layer.weight).double(), None, stride, padding, dilation, groups
    )
    assert torch.equal(layer(input).double(), expected)
    assert torch.equal(expected, expected.round())


def test_padding_contributes_exactly_zero() -> None:
    layer = bnn.BinaryConv2d(1, 1, 3, padding=1, bias=False, recipe=PLAIN)
    nn.init.ones_(layer.weight)
    counts = [[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]
    assert layer(torch.ones(1, 1, 3, 3))[0, 0].tolist() == counts


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding_modes_pad_signs(mode: str) -> None:
    conv = nn.Conv2d(3, 2, 3, padding=1, padding_mode=mode, bias=False)
    layer = bnn.BinaryConv2d.from_float(conv, PLAIN)
    input = torch.randn(1, 3, 5, 5)
    padded = F.pad(signs(input), (1, 1, 1, 1), mode=mode)
    scale = broadcast(conv.weight.abs().flatten(1).mean(1), 2)
    assert torch.equal(layer(input), F.conv2d(padded, signs(conv.weight)) * scale)


@pytest.mark.parametrize(("kind", "binary", "function"), KINDS, ids=lambda k: k.__name__)
def test_gamma_zero_is_plain(kind: Any, binary: Any, function: Any) -> None:
    conv = kind(6, 4, 3, stride=2)
    input = torch.randn(2, 6, *[7] * len(conv.kernel_size))
    starts = [RECIPES["elastic-link"].with_options({"link.gamma_init": g}) for g in (0.0, 1.0)]
    zero, one = (binary.from_float(conv, recipe).eval() for recipe in starts)
    assert torch.equal(zero(input), binary.from_float(conv, PLAIN).eval()(input))
    assert torch.equal(one(input), zero(input) + one.link.align(input, zero(input)))


def test_threshold_shifts_the_input() -> None:
    conv = nn.Conv2d(3, 5, 1, bias=False)
    layer = bnn.BinaryConv2d.from_float(conv, PLAIN.with_options({"input.threshold": "learned"}))
    assert layer.threshold is not None
    assert layer.threshold.tolist() == [0.0] * 3
    with torch.no_grad():
        layer.threshold.copy_(torch.tensor([0.5, -0.5, 2.0]))
    input = torch.randn(2, 3, 4, 4)
    shifted = input - torch.tensor([0.5, -0.5, 2.0]).view(3, 1, 1)
    scale = broadcast(conv.weight.abs().flatten(1).mean(1), 2)
    assert torch.equal(layer(input), F.conv2d(signs(shifted), signs(conv.weight)) * scale)


@pytest.mark.parametrize("kind", ["mean", "mean-detached", "learned", "none"])
def test_weight_scales(kind: str) -> None:
    conv = nn.Conv2d(3, 5, 3, bias=False)
    layer = bnn.BinaryConv2d.from_float(conv, PLAIN.with_options({"weight.scale": kind}))
    input = torch.randn(1, 3, 6, 6)
    scale = 1.0 if kind == "none" else broadcast(conv.weight.abs().flatten(1).mean(1), 2)
    counts = F.conv2d(signs(input), signs(conv.weight))
    assert torch.allclose(layer(input), counts * scale)
    assert (layer.learned_scale is not None) == (kind == "learned")


@pytest.mark.parametrize("groups", [1, 2])
def test_xnor_scale(groups: int) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=groups)
    layer = bnn.BinaryConv2d.from_float(conv, RECIPES["xnor"])
    input = torch.randn(2, 4, 5, 5)
    magnitude = torch.stack([part.abs().mean(1) for part in input.chunk(groups, 1)], 1)
    box = F.conv2d(magnitude, torch.full((groups, 1, 3, 3), 1 / 9), padding=1, groups=groups)
    box = torch.cat([box[:, g : g + 1].expand(-1, 6 // groups, -1, -1) for g in range(groups)], 1)
    counts = F.conv2d(signs(input), signs(conv.weight), padding=1, groups=groups)
    scale = broadcast(conv.weight.abs().flatten(1).mean(1), 2)
    assert conv.bias is not None
    assert torch.allclose(layer(input), counts * scale * box + broadcast(conv.bias, 2), atol=1e-6)


@pytest.mark.parametrize("input_gradient", ["approx", "clip"])
@pytest.mark.parametrize("weight_gradient", ["approx", "clip"])
def test_gradients_are_the_surrogates(input_gradient: str, weight_gradient: str) -> None:
    recipe = PLAIN.with_options(
        {
            "input.gradient": input_gradient,
            "weight.gradient": weight_gradient,
            "weight.scale": "mean-detached",
        }
    )
    layer = bnn.BinaryConv2d(3, 4, 3, padding=1, bias=False, recipe=recipe)
    input = torch.randn(2, 3, 5, 5, requires_grad=True)
    layer(input).square().sum().backward()

    x, w = signs(input.detach()).requires_grad_(), signs(layer.weight.detach()).requires_grad_()
    scale = broadcast(layer.weight.detach().abs().flatten(1).mean(1), 2)
    (F.conv2d(x, w, padding=1) * scale).square().sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    by_input = x.grad * sign_surrogate(input.detach(), input_gradient)  # type: ignore[arg-type]
    by_weight = w.grad * sign_surrogate(layer.weight.detach(), weight_gradient)  # type: ignore[arg-type]
    assert torch.allclose(input.grad, by_input, atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(layer.weight.grad, by_weight, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "binary", "function"), KINDS, ids=lambda k: k.__name__)
def test_from_float_shares_and_keeps(kind: Any, binary: Any, function: Any) -> None:
    conv = kind(4, 4, 3).eval()
    conv.note = "kept"
    before, state = copy.deepcopy(conv), torch.get_rng_state()
    layer = binary.from_float(conv, "elastic-link")
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(layer, kind)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    assert layer.note == "kept"
    assert not any(module.training for module in layer.modules())
    assert not hasattr(conv, "link")
    assert list(conv.state_dict()) == list(before.state_dict()) == ["weight", "bias"]
    assert list(layer.state_dict()) == ["weight", "bias", "link.gamma"]


def test_identity_recipe_is_the_convolution_bit_for_bit() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    layer = bnn.BinaryConv2d.from_float(conv, "identity")
    input = torch.randn(2, 8, 9, 9)
    assert torch.equal(layer(input), conv(input))


def test_transposed_output_size() -> None:
    conv = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)
    layer = bnn.BinaryConvTranspose2d.from_float(conv, "elastic-link")
    input = torch.randn(1, 4, 5, 5)
    assert layer(input, output_size=(10, 10)).shape == conv(input, output_size=(10, 10)).shape


def test_unbatched_and_empty_inputs() -> None:
    layer = bnn.BinaryConv2d(6, 4, 3, stride=2, padding=1).eval()
    input = torch.randn(2, 6, 5, 5)
    assert torch.equal(layer(input[0]), layer(input)[0])
    assert layer(input[:0]).shape == (0, 4, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_other_dtypes(dtype: torch.dtype, recipe: str) -> None:
    layer = bnn.BinaryConv2d(4, 4, 3, padding=1, recipe=recipe).to(dtype)
    output = layer(torch.randn(1, 4, 5, 5, dtype=dtype))
    assert output.dtype == dtype
    assert output.isfinite().all()


def test_autocast_and_channels_last() -> None:
    layer = bnn.BinaryConv2d(6, 4, 1)
    input = torch.randn(2, 6, 5, 5)
    expected = layer(input)
    layer = layer.to(memory_format=torch.channels_last)
    last = layer(input.to(memory_format=torch.channels_last))
    assert torch.allclose(last, expected, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(layer(input).float(), expected, atol=0.1)


def test_nan_and_infinity_have_signs() -> None:
    layer = bnn.BinaryConv2d(3, 1, 1, bias=False, recipe=PLAIN)
    nn.init.ones_(layer.weight)
    input = torch.tensor([math.nan, math.inf, -math.inf]).view(1, 3, 1, 1)
    assert layer(input).item() == -1.0


def test_lazy_and_foreign_modules_are_refused() -> None:
    with pytest.raises(ConversionError, match="no weights yet"):
        bnn.BinaryConv2d.from_float(nn.LazyConv2d(4, 3), "plain")
    with pytest.raises(ConversionError, match="Linear is not a convolution"):
        bnn.BinaryConv2d.from_float(nn.Linear(2, 2), "plain")


def test_deepcopy_is_independent() -> None:
    layer = bnn.BinaryConv2d(4, 4, 1)
    twin = copy.deepcopy(layer)
    assert twin.weight is not layer.weight
    assert twin.recipe == layer.recipe
    assert torch.equal(twin(torch.ones(1, 4, 1, 1)), layer(torch.ones(1, 4, 1, 1)))


@pytest.mark.parametrize("scaled", [False, True])
def test_standardized_weights_are_binarized(scaled: bool) -> None:
    std_conv = pytest.importorskip("timm.layers.std_conv", reason="needs timm")
    kind = std_conv.ScaledStdConv2d if scaled else std_conv.StdConv2d
    conv = kind(4, 6, 3, padding=1)
    binary = nn_timm.BinaryScaledStdConv2d if scaled else nn_timm.BinaryStdConv2d
    input = torch.randn(2, 4, 5, 5)
    assert torch.equal(binary.from_float(conv, "identity")(input), conv(input))

    layer = binary.from_float(conv, PLAIN)
    flat = conv.weight.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    weight = centred / (flat.var(1, unbiased=False, keepdim=True) + conv.eps).sqrt()
    if scaled:
        weight = weight * conv.gain.view(-1, 1) * conv.scale
    scale = broadcast(weight.abs().mean(1), 2)
    counts = F.conv2d(signs(input), signs(weight).view_as(conv.weight), padding=1)
    expected = counts * scale + (0 if conv.bias is None else broadcast(conv.bias, 2))
    assert torch.allclose(layer(input), expected, atol=1e-5)
    layer(input).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_rprelu_by_hand() -> None:
    layer = RPReLU(2, slope=0.5)
    with torch.no_grad():
        layer.shift_in.copy_(torch.tensor([1.0, 0.0]))
        layer.shift_out.copy_(torch.tensor([0.0, 3.0]))
    output = layer(torch.tensor([[[0.0, 2.0], [-2.0, 2.0]]]))
    assert output.tolist() == [[[-0.5, 1.0], [2.0, 5.0]]]


def test_sign_of_weight_zero_is_minus_one() -> None:
    assert binarize_ste(torch.zeros(1)).item() == -1.0
    recipe: Recipe = PLAIN.with_options({"weight.scale": "none"})
    layer = bnn.BinaryConv2d(1, 1, 1, bias=False, recipe=recipe)
    nn.init.zeros_(layer.weight)
    assert layer(torch.ones(1, 1, 1, 1)).item() == -1.0
