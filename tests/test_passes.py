"""The engine's fused passes of training against plain torch, on every instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from el_convert import binarize
from el_convert.functional import binarize_ste
from el_convert.kernels import Engine, engine, passes
from el_convert.kernels import native as native_module

ENGINE = engine()
pytestmark = pytest.mark.skipif(ENGINE is None, reason="installed without its native engine")
LAYOUTS = st.sampled_from([torch.contiguous_format, torch.channels_last])
BLOCK = 16384


@pytest.fixture(params=() if ENGINE is None else ENGINE.isas)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    assert ENGINE is not None
    name: str = request.param
    chosen = Engine(ENGINE.path, name)
    monkeypatch.setattr(passes, "engine", lambda: chosen)
    return name


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    torch.set_num_threads(count)
    return count


def maps(*shape: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.randn(shape).to(memory_format=layout)


def close(ours: Tensor, truth: Tensor) -> None:
    """As near as float32 sums in another order are."""
    size = truth.abs().max().item() if truth.numel() else 0.0
    torch.testing.assert_close(ours.double(), truth.double(), rtol=1e-5, atol=1e-5 * max(size, 1))


def truth_of(function: object, *inputs: Tensor, grad: Tensor) -> list[Tensor]:
    """Gradients by torch, in float64."""
    leaves = [value.double().requires_grad_() for value in inputs]
    output = function(*leaves)  # type: ignore[operator]
    return list(torch.autograd.grad(output, leaves, grad.double()))


def test_signs_and_their_gradients(isa: str, threads: int) -> None:
    x = torch.randn(3, 5, 41, 67) * 1.5
    x[0, 0, 0, :6] = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45])
    grad, other = torch.randn_like(x), torch.randn_like(x)
    assert torch.equal(passes.sign(x), torch.where(x > 0, 1.0, -1.0))
    x = x.nan_to_num(0.3, 1.0, -1.0)
    clip, approx = (x.abs() <= 1).float() * grad, (2 - 2 * x.abs()).clamp_min(0) * grad
    close(passes.sign_grad(x, grad, True), clip)
    close(passes.sign_grad(x, grad, False), approx)
    close(passes.sign_grad(x, grad, False, other), approx + other)


@pytest.mark.parametrize("shape", [(5, 3), (70, 24, 3, 3), (40, 700, 1, 1), (2, 3, 1, 2, 2)])
def test_scaled_signs(isa: str, threads: int, shape: tuple[int, ...]) -> None:
    latent, grad = torch.randn(shape), torch.randn(shape)
    latent[0] = 0  # a dead channel
    out, scale = passes.scaled_sign(latent, None)
    inner = tuple(range(1, len(shape)))
    close(scale, latent.double().abs().mean(inner))
    wide = scale.view(-1, *[1] * len(inner))
    signs = torch.where(latent > 0, 1.0, -1.0)
    assert torch.equal(out, signs * wide)
    given_out, given_scale = passes.scaled_sign(latent, scale)
    assert torch.equal(given_out, out)
    assert torch.equal(given_scale, scale)
    mask = (latent.abs() <= 1).double()
    total = (signs.double() * grad).sum(inner, keepdim=True) * (wide != 0)
    for through_mean in (False, True):
        ours, of_scale = passes.scaled_sign_grad(latent, scale, grad, True, through_mean)
        close(of_scale, total.flatten())
        truth = mask * wide * grad
        close(ours, truth + signs * total / latent[0].numel() if through_mean else truth)


@given(
    st.integers(0, 3), st.integers(1, 40), st.integers(1, 9), LAYOUTS, st.booleans(),
)  # fmt: skip
def test_prelu(
    batch: int, channels: int, side: int, layout: torch.memory_format, single: bool
) -> None:
    x, grad = (maps(batch, channels, side, 3, layout=layout) for _ in range(2))
    slope = torch.randn(1 if single else channels)
    for ours, truth in zip(
        passes.prelu_grad(x, slope, grad), truth_of(F.prelu, x, slope, grad=grad), strict=True
    ):
        close(ours, truth)


@given(
    st.integers(0, 3), st.integers(1, 140), st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 9),
    LAYOUTS, st.booleans(),
)  # fmt: skip
def test_gates(
    batch: int, channels: int, count: int, side: int, layout: torch.memory_format, single: bool
) -> None:
    narrow, narrow_grad = (maps(batch, channels, side, 2, layout=layout) for _ in range(2))
    wide, wide_grad = (maps(batch, channels * count, side, 2, layout=layout) for _ in range(2))
    gamma = torch.randn(1 if single else channels * count, 1, 1)

    def expand(x: Tensor, gamma: Tensor) -> Tensor:
        return gamma * x.repeat_interleave(count, 1)

    close(passes.expand(wide, gamma, narrow), wide + expand(narrow, gamma))
    for ours, truth in zip(
        passes.expand_grad(narrow, gamma, wide_grad),
        truth_of(expand, narrow, gamma, grad=wide_grad),
        strict=True,
    ):
        close(ours, truth)
    gamma = torch.randn(1 if single else channels, 1, 1)

    def squeeze(x: Tensor, gamma: Tensor) -> Tensor:
        return gamma * x.unflatten(1, (channels, count)).sum(2) / count

    out, added = passes.squeeze(narrow, gamma, wide, 1 / count)
    close(out, narrow + squeeze(wide, gamma))
    for ours, truth in zip(
        passes.squeeze_grad(added, gamma, narrow_grad, count, 1 / count),
        truth_of(squeeze, wide, gamma, grad=narrow_grad),
        strict=True,
    ):
        close(ours, truth)


def test_instruction_sets_and_threads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ENGINE is not None
    x, grad = (maps(4, 70, 23, 29, layout=torch.channels_last) for _ in range(2))
    slope = torch.randn(70)
    found = []
    for name in ENGINE.isas:
        chosen = Engine(ENGINE.path, name)
        monkeypatch.setattr(passes, "engine", lambda chosen=chosen: chosen)
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(
                [
                    *passes.prelu_grad(x, slope, grad),
                    *passes.expand_grad(x, slope, grad),
                    *passes.scaled_sign(x, None),
                    *passes.scaled_sign_grad(x, slope[:4], grad, False, True),
                ]
            )
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_operands_may_lie_in_memory_as_they_like() -> None:
    x = torch.randn(4, 30, 20, 12)[:, ::2, 1:, :]
    grad = maps(4, 15, 19, 12, layout=torch.channels_last)
    slope = torch.rand(30)[::2]
    assert torch.equal(passes.sign(x), torch.where(x > 0, 1.0, -1.0))
    close(passes.sign_grad(x, grad, True), (x.abs() <= 1) * grad)
    ours = passes.prelu_grad(x, slope, grad)
    for one, truth in zip(ours, truth_of(F.prelu, x, slope, grad=grad), strict=True):
        close(one, truth)


def arguments() -> dict[str, tuple[object, ...]]:
    x, grad = torch.randn(2, 6, 3, 3), torch.randn(2, 6, 3, 3)
    wide, vector = torch.randn(2, 12, 3, 3), torch.rand(6)
    return {
        "sign": (x,),
        "sign_grad": (x, grad, True, None),
        "scaled_sign": (x, None),
        "scaled_sign_grad": (x, torch.rand(2), grad, True, True),
        "prelu_grad": (x, vector, grad),
        "expand": (wide, torch.rand(12), x),
        "expand_grad": (x, torch.rand(12), wide),
        "squeeze": (x, vector, wide, 0.5),
        "squeeze_grad": (x, vector, grad, 2, 0.5),
    }


@pytest.mark.parametrize("name", sorted(arguments()))
def test_ops_are_what_compilers_expect(name: str) -> None:
    operator = getattr(torch.ops.el_convert, name).default
    torch.library.opcheck(
        operator, arguments()[name], test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("size", [24, 6])
def test_per_sample_gradients(size: int) -> None:
    """Through vmap, as torch.func takes them; large maps are the engine's, small ones torch's."""
    model = binarize(
        nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 1), nn.Conv2d(64, 32, 1)),
        keep=["0"],
    )
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    images = torch.randn(2, 3, size, size)

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(model, parameters, (image[None],))
        return output.square().mean()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    for i in range(2):
        alone = torch.func.grad(loss)(parameters, images[i])
        for name, gradient in alone.items():
            close(each[name][i], gradient)


def test_a_step_is_that_of_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 64, 1), nn.BatchNorm2d(64), nn.ReLU()]
    model = binarize(nn.Sequential(*layers, nn.Conv2d(64, 32, 1, stride=2), nn.BatchNorm2d(32)))
    images = torch.randn(4, 3, 34, 34)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(images).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    native = gradients()
    assert len(native) == len(list(model.parameters()))
    monkeypatch.setattr(passes, "engine", lambda: None)
    for ours, plain in zip(native, gradients(), strict=True):
        close(ours, plain)


def test_gradients_of_gradients() -> None:
    x = (torch.rand(2 * BLOCK) * 0.9 + 0.05).requires_grad_()
    (once,) = torch.autograd.grad(binarize_ste(x).square().sum() / 2, x, create_graph=True)
    (twice,) = torch.autograd.grad(once.sum(), x)
    # The sum of b^2 / 2 has the gradient b s(x) = 2 - 2x, with b = 1; of that, b' s + b s'.
    close(once.detach(), 2 - 2 * x.detach())
    close(twice, (2 - 2 * x.detach()) ** 2 - 2)


def test_no_engine_no_op(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        assert passes.runs_native(torch.zeros(2 * BLOCK))
        monkeypatch.setattr(passes, "engine", lambda: None)
        assert not passes.runs_native(torch.zeros(2 * BLOCK))
    with pytest.raises(RuntimeError, match="without its native engine"):
        passes.sign(torch.zeros(2))
    assert native_module.engine() is not None
