"""Packed layers and models give what the binarized ones give, bit for bit."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CASES, Case, flat_tensors
from torch import Tensor, nn

from el_convert import RECIPES, binarize, summarize
from el_convert.bits import pack_bits, unpack_bits
from el_convert.errors import ConversionError
from el_convert.nn import (
    BinaryConv1d,
    BinaryConv2d,
    BinaryConv3d,
    BinaryConvTranspose1d,
    BinaryConvTranspose2d,
    BinaryConvTranspose3d,
)
from el_convert.packed import PackedConv
from el_convert.packing import pack

CONVS: tuple[Any, ...] = (BinaryConv1d, BinaryConv2d, BinaryConv3d)
TRANSPOSES: tuple[Any, ...] = (
    BinaryConvTranspose1d,
    BinaryConvTranspose2d,
    BinaryConvTranspose3d,
)
pytestmark = pytest.mark.filterwarnings(
    "ignore:the model looks untrained",
    "ignore:the model was in training mode",
    "ignore:Using padding='same' with even kernel",
)


@given(st.lists(st.lists(st.floats(width=32), min_size=19, max_size=19), min_size=1, max_size=3))
def test_bits_are_those_of_numpy(rows: list[list[float]]) -> None:
    values = torch.tensor(rows)
    bits = pack_bits(values)
    expected = np.packbits(values.numpy() > 0, axis=-1, bitorder="little")
    assert np.array_equal(bits.numpy(), expected)
    assert torch.equal(unpack_bits(bits, 19), torch.where(values > 0, 1.0, -1.0))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16])
def test_tail_bits_are_zero(count: int) -> None:
    bits = pack_bits(torch.ones(2, count))
    assert bits.shape == (2, -(-count // 8))
    assert bits.dtype == torch.uint8
    assert [bin(int(b)).count("1") for b in bits.flatten()].count(0) == 0
    assert sum(bin(int(b)).count("1") for b in bits.flatten()) == 2 * count
    assert unpack_bits(bits, count, torch.float64).tolist() == torch.ones(2, count).tolist()


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A trained-looking layer of any geometry, and an input with awkward values."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = (groups * draw(st.integers(1, 5)) for _ in range(2))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    recipe = RECIPES[draw(st.sampled_from(["elastic-link", "plain", "xnor", "elastic-reactnet"]))]
    scale = draw(st.sampled_from(["mean", "learned", "none", "mean-detached"]))
    options: dict[str, Any] = {
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "recipe": recipe.with_options({"weight.scale": scale}),
    }
    if draw(st.booleans()):
        options["padding"] = draw(st.integers(0, 2))
        options["output_padding"] = draw(st.integers(0, max(stride, dilation) - 1))
        layer = TRANSPOSES[dims - 1](inputs, outputs, kernel, **options)
    else:
        same = stride == 1 and draw(st.booleans())
        options["padding"] = "same" if same else draw(st.integers(0, 2))
        options["padding_mode"] = draw(st.sampled_from(["zeros", "zeros", "circular", "reflect"]))
        layer = CONVS[dims - 1](inputs, outputs, kernel, **options)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(draw(st.integers(0, 2)), inputs, *[8] * dims, generator=generator)
    for value in (0.0, -0.0, float("nan"), float("inf")):
        x.flatten()[draw(st.integers(0, 99)) : 100 : 97] = value
    return layer.eval(), x


def agree(given: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether two results are the same but for rounding."""
    error = (given.double() - expected.double()).norm()
    return given.shape == expected.shape and bool(error <= tolerance * expected.double().norm())


@settings(max_examples=150)
@given(layers())
def test_any_layer_gives_the_same(drawn: tuple[nn.Module, Tensor]) -> None:
    layer, x = drawn
    packed = PackedConv(layer)  # type: ignore[arg-type]
    before = copy.deepcopy(layer.state_dict())
    assert agree(packed(x).nan_to_num(7.5), layer(x).nan_to_num(7.5), 1e-6)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert torch.equal(packed.signs(), torch.where(layer.latent_weight() > 0, 1.0, -1.0))  # type: ignore[operator]


def test_layouts_dtypes_and_sizes() -> None:
    layer = BinaryConv2d(6, 10, 3, stride=2, padding=1).eval()
    x = torch.randn(2, 6, 9, 7)
    for view in (x.to(memory_format=torch.channels_last), x[:, :, ::2, 1:], x[:0], x[0]):
        assert agree(PackedConv(layer)(view), layer(view), 1e-6)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        other = copy.deepcopy(layer).to(dtype)
        assert torch.equal(PackedConv(other)(x.to(dtype)), other(x.to(dtype)))
    up = BinaryConvTranspose2d(6, 10, 3, stride=2).eval()
    assert torch.equal(PackedConv(up)(x, [20, 16]), up(x, [20, 16]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_models_give_the_same(case: Case) -> None:
    # With gates at 3, outputs of deep networks whose norms saw no images are beyond all numbers.
    gates_at_1 = RECIPES["elastic-link"].with_options({"link.gamma_init": 1.0})
    model = binarize(case.build(), gates_at_1).eval()
    before = copy.deepcopy(model)
    packed = pack(model)
    layers = [module for module in packed.modules() if isinstance(module, PackedConv)]
    assert len(layers) == case.binarized
    assert type(packed) is type(model)
    assert not packed.training
    assert str(model) == str(before)  # a copy was packed
    with torch.no_grad():
        assert agree(packed(case.input()), model(case.input()))
    stored = sum(t.numel() * t.element_size() for t in packed.state_dict().values())
    summary = summarize(packed, (3, case.side, case.side))
    assert summary.ops == summarize(model, (3, case.side, case.side)).ops
    assert summary.stored_bytes == summary.packed_bytes == stored


def small() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    return binarize(net).eval()


def test_in_place_and_shared_layers() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
            self.again, self.listed = self.conv, [self.conv]
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.listed[0](self.again(self.conv(self.stem(x))))
            return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]

    model, x = binarize(Twice()).eval(), torch.randn(2, 3, 9, 9)
    expected = model(x)
    packed = pack(model, inplace=True)
    assert packed is model
    assert packed.conv is packed.again is packed.listed[0]
    assert isinstance(packed.conv, PackedConv)
    assert agree(packed(x), expected)


def test_copies_graphs_and_exports() -> None:
    model, x = small(), torch.randn(2, 3, 9, 9)
    packed = pack(model)
    with torch.no_grad():
        expected = model(x)
        assert agree(copy.deepcopy(packed)(x), expected)
        assert agree(torch.compile(packed, backend="eager", fullgraph=True)(x), expected)
        assert agree(torch.export.export(packed, (x,)).module()(x), expected)
        other = pack(small())
        other.load_state_dict(packed.state_dict())
        assert agree(other(x), expected)


def test_doubts_are_said() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        pack(small().train())
    assert [str(w.message).split(";")[0] for w in seen] == [
        "the model was in training mode",
        "the model looks untrained: its gates or norms are as they started",
    ]
    assert all(w.filename == __file__ for w in seen)
    trained: Any = small().train()
    trained[2].link.gamma.data += 0.1
    trained(torch.randn(2, 3, 9, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack(trained.eval())


def test_refusals() -> None:
    packed = pack(small())
    with pytest.raises(ConversionError, match="packed already"):
        pack(packed)
    with pytest.raises(ConversionError, match="binarized already"):
        binarize(packed)
    with pytest.raises(ConversionError, match=r"call binarize\(model\) first"):
        pack(nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(ConversionError, match="nothing to pack"):
        pack(binarize(nn.Conv2d(8, 8, 3), "identity"))
    with pytest.raises(ConversionError, match="real-valued"):
        PackedConv(BinaryConv2d(8, 8, 3, recipe="identity"))
    with pytest.raises(ConversionError, match=r"does not train: call eval\(\)"):
        packed.train()(torch.randn(2, 3, 9, 9))


def test_mixed_kernels_stay_as_they_are() -> None:
    import timm

    model = binarize(timm.create_model("tf_efficientnet_cc_b0_4e", num_classes=4)).eval()
    packed, x = pack(model), torch.randn(1, 3, 64, 64)
    kinds = {type(module).__name__ for module in packed.modules()}
    assert {"PackedConv", "BinaryCondConv2d"} <= kinds
    assert agree(flat_tensors(packed(x))[0], flat_tensors(model(x))[0])
