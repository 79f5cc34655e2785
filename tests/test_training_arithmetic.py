"""The fused functions of training against the plain composition of torch's, gradients included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from el_convert.channels import gate, repeat_channels, sum_channels
from el_convert.functional import SignGradient, binarize_ste, prelu, scaled_sign, weight_scale
from el_convert.nn import BinaryConv2d
from el_convert.recipes import RECIPES
from el_convert.slopes import ChannelPReLU

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The value and the gradients of a weighted sum of it."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    output = function(*leaves)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), leaves)]


def agree(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("gradient", ["clip", "approx"])
@pytest.mark.parametrize("shape", [(5, 3), (4, 6, 3, 3), (2, 3, 1, 2, 2)])
def test_scaled_sign_is_the_product(gradient: SignGradient, shape: tuple[int, ...]) -> None:
    latent = torch.randn(shape, dtype=torch.float64)
    scale = torch.rand(shape[0], dtype=torch.float64) + 0.1

    def product(latent: Tensor, scale: Tensor) -> Tensor:
        return binarize_ste(latent, gradient) * scale.view(-1, *[1] * (latent.dim() - 1))

    agree(
        gradients(lambda w, s: scaled_sign(w, s, gradient), latent, scale),
        gradients(product, latent, scale),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_a_mean_scale_reaches_the_latent_weight(
    layout: torch.memory_format,
) -> None:
    latent = torch.randn(4, 6, 3, 3, dtype=torch.float64).to(memory_format=layout)
    latent[1] = 0  # a dead channel: its scale is 0

    def product(latent: Tensor) -> Tensor:
        return binarize_ste(latent, "clip") * weight_scale(latent).view(-1, 1, 1, 1)

    def fused(latent: Tensor) -> Tensor:
        return scaled_sign(latent)

    agree(gradients(fused, latent), gradients(product, latent))


def test_gradients_of_the_sign_are_zero_outside_one() -> None:
    for gradient in ("clip", "approx"):
        _, slope = gradients(
            lambda x, g=gradient: binarize_ste(x, g), torch.tensor([-1.5, 1.5, 9.0])
        )
        assert slope.tolist() == [0, 0, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 5])
def test_prelu_is_torchs(layout: torch.memory_format, channels: int) -> None:
    input = torch.randn(3, 5, 4, 4, dtype=torch.float64).to(memory_format=layout)
    input[0, 0] = 0
    slope = torch.randn(channels, dtype=torch.float64)
    agree(gradients(prelu, input, slope), gradients(F.prelu, input, slope))


def test_channel_prelu_takes_the_place_of_torchs() -> None:
    ours, theirs = ChannelPReLU(3), nn.PReLU(3)
    theirs.load_state_dict(ours.state_dict())
    input = torch.randn(2, 3, 4)
    assert torch.equal(ours(input), theirs(input))
    assert repr(ours) == "ChannelPReLU(num_parameters=3)"


@given(
    st.integers(1, 3), st.integers(1, 5), st.integers(2, 12), st.integers(1, 4), st.booleans(),
    st.sampled_from([1, -3]),
)  # fmt: skip
def test_channels_are_summed_and_repeated(
    batch: int, channels: int, group: int, side: int, last: bool, dim: int
) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    wide = torch.randn(batch, channels * group, side, 2, dtype=torch.float64).to(
        memory_format=layout
    )
    narrow = torch.randn(batch, channels, side, 2, dtype=torch.float64).to(memory_format=layout)
    agree(
        gradients(lambda x: sum_channels(x, dim, group), wide),
        gradients(lambda x: x.unflatten(1, (channels, group)).sum(2), wide),
    )
    agree(
        gradients(lambda x: repeat_channels(x, dim, group), narrow),
        gradients(lambda x: x.repeat_interleave(group, 1), narrow),
    )
    if channels > 1:  # one channel lies the same either way
        assert repeat_channels(narrow, dim, group).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_expanding_gate_is_its_formula(layout: torch.memory_format) -> None:
    output = torch.randn(2, 6, 3, 3, dtype=torch.float64).to(memory_format=layout)
    input = torch.randn(2, 2, 3, 3, dtype=torch.float64).to(memory_format=layout)
    for gamma in (torch.randn(6, 1, 1).double(), torch.randn(1, 1, 1).double()):
        agree(
            gradients(lambda y, g, x: gate(y, g, x, -3, 3), output, gamma, input),
            gradients(lambda y, g, x: y + g * x.repeat_interleave(3, 1), output, gamma, input),
        )


@pytest.mark.parametrize(
    "recipe", ["elastic-link", "reactnet", "elastic-reactnet", "plain", "xnor"]
)
def test_a_layer_trains_as_it_evaluates(recipe: str) -> None:
    conv = nn.Conv2d(6, 6, 3, padding=1, bias=recipe == "plain")
    layer = BinaryConv2d.from_float(conv, RECIPES[recipe])
    parameters = [p for p in layer.parameters() if p.requires_grad]
    input = torch.randn(2, 6, 5, 5)
    found = []
    for mode in (True, False):
        output = layer.train(mode)(input)
        weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
        found.append([output, *torch.autograd.grad((output * weights).sum(), parameters)])
    for trained, evaluated in zip(*found, strict=True):
        torch.testing.assert_close(trained, evaluated, rtol=1e-4, atol=1e-5)


def test_sums_of_exactly_zero_stay_zero_in_training() -> None:
    # The next sign may read them as they are: eval would take -1, rounding errors anything.
    layer = BinaryConv2d(4, 4, 1, bias=False, recipe="plain").train()
    nn.init.uniform_(layer.weight, 0.1, 0.3)
    input = torch.tensor([1.0, 1.0, -1.0, -1.0]).view(1, 4, 1, 1)
    assert layer(input).eq(0).all()


def test_the_fused_functions_compile() -> None:
    layer = BinaryConv2d(4, 8, 1)
    model = nn.Sequential(layer, ChannelPReLU(8)).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    input = torch.randn(2, 4, 3, 3)
    for run in (model, compiled):
        layer.weight.grad = None
        run(input).square().sum().backward()
        if run is model:
            expected = layer.weight.grad
    torch.testing.assert_close(layer.weight.grad, expected)
