"""Classifiers read fast: compared with `nn.Linear`, whose results and habits they keep."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import needs_engine
from torch import Tensor, nn

from el_convert.benchmark import pack_untrained
from el_convert.kernels import engine
from el_convert.linear import LargeLinear, large_linear


def pair(
    inputs: int = 640, outputs: int = 500, *, bias: bool = True
) -> tuple[nn.Linear, LargeLinear]:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False).eval()
    return linear, LargeLinear(linear)


def exact(linear: nn.Linear, input: Tensor) -> Tensor:
    """In double precision."""
    return copy.deepcopy(linear).double()(input.double())


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 4), st.integers(1, 700), st.integers(1, 300), st.booleans(), st.integers(1, 2)
)
def test_few_inputs(batch: int, inputs: int, outputs: int, bias: bool, threads: int) -> None:
    linear, fast = pair(inputs, outputs, bias=bias)
    input = torch.randn(batch, inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        output = fast(input)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(output.double(), exact(linear, input), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "input",
    [
        torch.randn(5, 640),
        torch.randn(0, 640),
        torch.randn(640),
        torch.randn(2, 3, 640),
        torch.randn(1, 640).requires_grad_(),
    ],
    ids=["many", "none", "vector", "more dimensions", "gradient"],
)
def test_others_are_left_to_torch(input: Tensor) -> None:
    linear, fast = pair()
    assert torch.equal(fast(input), linear(input))


def test_inputs_that_lie_apart_in_memory() -> None:
    linear, fast = pair()
    wide = torch.randn(3, 1280)
    torch.testing.assert_close(fast(wide[:, ::2]), linear(wide[:, ::2]), rtol=1e-5, atol=1e-5)


def test_inf_and_nan_pass() -> None:
    _, fast = pair()
    input = torch.randn(2, 640)
    input[0, 3], input[1, 639] = float("inf"), float("nan")
    output = fast(input)
    assert bool(output[0].isinf().all()) and bool(output[1].isnan().all())


@pytest.mark.parametrize("moved", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_copies(moved: object) -> None:
    _, fast = pair()
    other, input = moved(fast), torch.randn(1, 640)  # type: ignore[operator]
    assert type(other) is LargeLinear
    assert torch.equal(other(input), fast(input))


def test_gradients_flow_and_weights_may_change() -> None:
    linear, fast = pair()
    fast.requires_grad_(True)
    input = torch.randn(2, 640)
    fast(input).sum().backward()
    assert fast.weight.grad is not None and fast.bias.grad is not None
    with torch.no_grad():
        fast.weight.mul_(2)
        torch.testing.assert_close(fast(input), linear(input), rtol=1e-5, atol=1e-5)


def test_autocast_and_other_types() -> None:
    _, fast = pair()
    input = torch.randn(1, 640)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast(input).dtype is torch.bfloat16
    assert fast.double()(input.double()).dtype is torch.float64


def test_packed_classifiers() -> None:
    packed = pack_untrained(timm.create_model("resnet18", num_classes=1000))
    assert isinstance(packed.fc, LargeLinear)
    assert [n for n, _ in packed.fc.named_parameters()] == ["weight", "bias"]
    assert type(pack_untrained(timm.create_model("resnet18", num_classes=10)).fc) is nn.Linear


def test_a_hooked_one_stays() -> None:
    linear = nn.Linear(1024, 1000)
    assert large_linear(linear)
    linear.register_forward_hook(lambda *_: None)
    assert not large_linear(linear)
    assert not large_linear(nn.Linear(16, 16))


@needs_engine
def test_the_engine_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = pair()
    called: list[int] = []
    library = engine()
    assert library is not None
    real = library.linear
    monkeypatch.setattr(library, "linear", lambda *a: called.append(1) or real(*a))
    fast(torch.randn(1, 640))
    assert called


def test_compiled() -> None:
    linear, fast = pair()
    input = torch.randn(1, 640)
    with torch.no_grad():
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(input), linear(input), rtol=1e-5, atol=1e-5)
