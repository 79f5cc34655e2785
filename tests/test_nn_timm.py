"""Binary forms of timm's and torchvision's own convolution classes, against those classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import first_tensor, seed_norms
from timm.layers import cond_conv2d, std_conv
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same as timm_pad_same
from torch import Tensor, nn
from torchvision.models.video.resnet import Conv3DNoTemporal, Conv3DSimple

from el_convert.convert import binarize, conversion_of
from el_convert.errors import ConversionError
from el_convert.functional import pad_same
from el_convert.graphs import link_nodes, to_graph
from el_convert.nn import BinaryConv2d, BinaryConv3d, BinaryLayer
from el_convert.nn_timm import BinaryCondConv2d, BinaryConv2dSame, BinaryStdConv2d
from el_convert.patterns import first_match
from el_convert.recipes import RECIPES
from el_convert.sites import Site
from el_convert.zoo import create, find_source

SAME: list[type[nn.Module]] = [
    Conv2dSame,
    std_conv.StdConv2dSame,
    std_conv.ScaledStdConv2dSame,
]
OTHER: list[type[nn.Module]] = [std_conv.StdConv2d, std_conv.ScaledStdConv2d]


def signs(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1.0, -1.0)


def converted(conv: nn.Module, recipe: str) -> Any:
    """The layer that the table makes of a convolution."""
    site = Site("conv", (), conv)  # type: ignore[arg-type]
    row = first_match(site, RECIPES[recipe])
    assert row.build is not None, row.name
    return row.build(conv, RECIPES[recipe])


@pytest.mark.parametrize("size", [(7, 8), (8, 9), (5, 5), (1, 2)])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 2, 1), (5, 3, 1), (3, 1, 2), (2, 2, 1)]
)
def test_same_padding_is_timms(
    size: tuple[int, int], kernel: int, stride: int, dilation: int
) -> None:
    input = torch.randn(2, 3, *size)
    geometry = ((kernel, kernel), (stride, stride), (dilation, dilation))
    assert torch.equal(pad_same(input, *geometry), timm_pad_same(input, *map(list, geometry)))


@pytest.mark.parametrize("kind", SAME + OTHER, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("stride", [1, 2])
def test_identity_is_the_class_itself(kind: Any, stride: int) -> None:
    conv = kind(6, 8, 3, stride=stride)
    input = torch.randn(2, 6, 9, 8)
    assert torch.equal(converted(conv, "identity")(input), conv(input))


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "identity"])
@pytest.mark.parametrize("kind", SAME + OTHER, ids=lambda kind: kind.__name__)
def test_every_recipe_trains(kind: Any, recipe: str) -> None:
    layer = converted(kind(6, 8, 3, stride=2), recipe)
    assert isinstance(layer, BinaryConv2d)
    output = layer(torch.randn(2, 6, 9, 8))
    assert output.shape == (2, 8, 5, 4)
    output.square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_same_padding_follows_the_sign() -> None:
    conv = Conv2dSame(4, 4, 3, stride=2, bias=False)
    layer = converted(conv, "plain")
    assert type(layer) is BinaryConv2dSame
    input = torch.randn(1, 4, 8, 8)
    padded = F.pad(signs(input), (0, 1, 0, 1))
    scale = conv.weight.abs().mean((1, 2, 3)).view(-1, 1, 1)
    expected = F.conv2d(padded, signs(conv.weight), stride=2) * scale
    assert torch.allclose(layer(input), expected)


def test_same_link_pools_from_the_border() -> None:
    layer = converted(Conv2dSame(4, 4, 5, stride=2), "elastic-link")
    input = torch.randn(1, 4, 7, 7)
    expected = F.max_pool2d(input, 2, 2, ceil_mode=True)
    assert torch.equal(layer.link.align(input, layer(input)), expected)


def cond_conv(**options: Any) -> tuple[nn.Module, Tensor, Tensor]:
    conv = cond_conv2d.CondConv2d(6, 8, 3, padding="", num_experts=4, **options)
    return conv, torch.randn(3, 6, 7, 8), torch.rand(3, 4)


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"bias": True}, {"stride": 2}], ids=str)
def test_cond_conv_identity(options: dict[str, Any]) -> None:
    conv, input, routing = cond_conv(**options)
    assert torch.equal(converted(conv, "identity")(input, routing), conv(input, routing))


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"bias": True}, {"stride": 2}], ids=str)
def test_cond_conv_is_a_loop_over_samples(options: dict[str, Any]) -> None:
    conv, input, routing = cond_conv(**options)
    conv_: Any = conv
    output = converted(conv, "plain")(input, routing)
    for sample in range(3):
        kernel = (routing[sample] @ conv_.weight).view(conv_.weight_shape)
        counts = F.conv2d(
            signs(input[sample]), signs(kernel), None, conv_.stride, conv_.padding, 1, conv_.groups
        )
        expected = counts * kernel.abs().mean((1, 2, 3)).view(-1, 1, 1)
        if conv_.bias is not None:
            expected = expected + (routing[sample] @ conv_.bias).view(-1, 1, 1)
        assert torch.allclose(output[sample], expected, atol=1e-5)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "identity"])
def test_cond_conv_trains_in_every_recipe(recipe: str) -> None:
    conv, input, routing = cond_conv(bias=True)
    layer = converted(conv, recipe)
    assert isinstance(layer, BinaryCondConv2d)
    layer(input, routing).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_learned_scale_of_experts() -> None:
    conv, input, routing = cond_conv()
    recipe = RECIPES["plain"].with_options({"weight.scale": "learned"})
    layer = BinaryCondConv2d.from_float(conv, recipe)
    assert layer.learned_scale is not None
    assert layer.learned_scale.shape == (8,)
    assert layer(input, routing).shape == (3, 8, 7, 8)


@pytest.mark.parametrize("kind", [Conv3DSimple, Conv3DNoTemporal])
def test_video_convolutions(kind: Any) -> None:
    conv = kind(4, 6, stride=2)
    layer = converted(conv, "plain")
    assert isinstance(layer, BinaryConv3d)
    input = torch.randn(1, 4, 4, 7, 7)
    counts = F.conv3d(signs(input), signs(conv.weight), None, conv.stride, conv.padding)
    scale = conv.weight.abs().mean((1, 2, 3, 4)).view(-1, 1, 1, 1)
    assert torch.allclose(layer(input), counts * scale, atol=1e-5)


def test_wrong_kinds_are_refused() -> None:
    with pytest.raises(ConversionError, match="Conv2d has no eps"):
        BinaryStdConv2d.from_float(nn.Conv2d(2, 2, 1), "plain")
    with pytest.raises(ConversionError, match="Conv2d has no num_experts"):
        BinaryCondConv2d.from_float(nn.Conv2d(2, 2, 1), "plain")
    with pytest.raises(ConversionError, match="Conv1d is no Conv2d"):
        BinaryConv2d.from_float(nn.Conv1d(2, 2, 1), "plain")


@pytest.mark.parametrize(
    ("name", "pattern", "count", "side"),
    [
        ("timm/tf_mobilenetv3_small_minimal_100", "conv2d-same", 4, 64),
        ("timm/efficientnet_cc_b0_4e", "cond-conv2d", 24, 64),
        ("timm/dm_nfnet_f0", "scaled-std-conv2d-same", 56, 64),
        ("timm/resnetv2_50x1_bit", "std-conv2d", 52, 64),
        ("timm/vit_small_r26_s32_224", "std-conv2d-same", 28, 224),
    ],
)
def test_models_that_use_them(name: str, pattern: str, count: int, side: int) -> None:
    torch.manual_seed(0)
    model = seed_norms(create(find_source(name, num_classes=4))).eval()
    input = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(binarize(model, "identity")(input), model(input))
    binary = binarize(model)
    decisions = conversion_of(binary).decisions
    assert sum(decision.pattern == pattern for decision in decisions) == count
    with torch.no_grad():
        assert torch.equal(to_graph(binary)(input), first_tensor(binary(input)))
    layers = sum(isinstance(m, BinaryLayer) for m in binary.modules())
    assert len(link_nodes(to_graph(binary))) == layers
