"""Convolutions and packed layers for the tests of kernels, and what they give in plain torch."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from el_convert.bits import pack_bits
from el_convert.kernels import ConvGeometry, engine, engine_notice
from el_convert.kernels.native import NativeConv
from el_convert.nn import BinaryConv2d
from el_convert.packed import PackedConv
from el_convert.recipes import RECIPES

ISAS: tuple[str, ...] = () if (ENGINE := engine()) is None else ENGINE.isas
needs_engine = pytest.mark.skipif(
    ENGINE is None, reason=engine_notice() or "EL_CONVERT_ISA asks for plain torch"
)
every_isa = pytest.mark.parametrize("isa", ISAS or [pytest.param("", marks=needs_engine)])
LAST = torch.channels_last
INF, NAN = float("inf"), float("nan")
SPECIAL = torch.tensor([NAN, INF, -INF, -0.0, 0.0, 1e-45, -1e-45])
OP = torch.ops.el_convert.binary_conv2d


@dataclass(frozen=True)
class Case:
    """A convolution and its input; `minus` are the shares of -1 in the input and the weight."""

    geometry: ConvGeometry
    size: tuple[int, int]
    batch: int = 1
    minus: tuple[float, float] = (0.5, 0.5)
    layout: str = "plain"
    threshold: bool = False
    seed: int = 0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, real-valued weight, threshold."""
        g = self.geometry
        r = torch.Generator().manual_seed(self.seed)
        x = signed((self.batch, g.in_channels, *self.size), self.minus[0], r)
        if self.minus[0] == 0.5:
            x = sprinkled(x, r)
        weight = signed((g.out_channels, g.in_channels // g.groups, *g.kernel), self.minus[1], r)
        t = sprinkled(signed((g.in_channels,), 0.5, r), r) if self.threshold else None
        return laid_out(x, self.layout), weight, t


def signed(shape: tuple[int, ...], minus: float, r: torch.Generator) -> Tensor:
    """Few distinct values, so that many meet their threshold exactly."""
    sign = torch.where(torch.rand(shape, generator=r) < minus, -1.0, 1.0)
    return torch.randint(1, 4, shape, generator=r) / 2 * sign


def sprinkled(x: Tensor, r: torch.Generator) -> Tensor:
    special = SPECIAL[torch.randint(len(SPECIAL), x.shape, generator=r)]
    return torch.where(torch.rand(x.shape, generator=r) < 0.2, special, x)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """About the same values at other strides."""
    if layout == "last":
        return x.to(memory_format=LAST)
    if layout == "sliced":
        return F.pad(x, (1, 2, 0, 1, 1, 0)).repeat_interleave(2, 2)[
            :, 1:, : 2 * x.shape[2] : 2, 1:-2
        ]
    if layout == "expanded":
        return x[:, :1].expand_as(x)
    return x.transpose(2, 3).contiguous().transpose(2, 3) if layout == "turned" else x


def truth(x: Tensor, weight: Tensor, g: ConvGeometry, threshold: Tensor | None = None) -> Tensor:
    """In double precision, where every sum is exact."""
    limit = torch.zeros(()) if threshold is None else threshold.view(-1, 1, 1)
    signs, kernel = ((x > limit).double() * 2 - 1), ((weight > 0).double() * 2 - 1)
    top, bottom, left, right = g.padding
    padded = F.pad(signs, (left, right, top, bottom))
    return F.conv2d(padded, kernel, None, g.stride, 0, g.dilation, g.groups)


def prepare(g: ConvGeometry, weight: Tensor, isa: str | None = None) -> NativeConv | None:
    assert ENGINE is not None
    return ENGINE.prepare(g, pack_bits(weight.flatten(1)), isa)


def prepared(g: ConvGeometry, weight: Tensor, isa: str) -> NativeConv:
    conv = prepare(g, weight, isa)
    assert conv is not None
    return conv


def too_large(g: ConvGeometry) -> bool:
    """Whether the engine's counters could overflow."""
    depthwise = g.groups == g.in_channels == g.out_channels
    return g.kernel_area * g.in_channels // g.groups > (255 if depthwise else 65535)


def conv(
    inputs: int, outputs: int, kernel: tuple[int, int], around: int = 0, **options: Any
) -> ConvGeometry:
    g = ConvGeometry(inputs, outputs, 1, kernel, (1, 1), (1, 1), (around,) * 4)
    return replace(g, **options)


class Calls:
    """How often layers ran natively; their torch path's operator runs in plain torch meanwhile."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count, original = 0, NativeConv.__call__

        def spy(conv: NativeConv, *args: Any, **kwargs: Any) -> Tensor:
            self.count += 1
            return original(conv, *args, **kwargs)

        patch.setattr(NativeConv, "__call__", spy)
        patch.setattr("el_convert.kernels.operator.engine", lambda: None)

    def take(self) -> int:
        """How often since this was last asked."""
        count, self.count = self.count, 0
        return count


def layer(*args: Any, recipe: str = "elastic-link", norm: bool = False, **options: Any) -> Any:
    """A binary layer that looks trained; options with a dot are the recipe's."""
    dotted = {key: options.pop(key) for key in list(options) if "." in key}
    made: Any = BinaryConv2d(*args, recipe=RECIPES[recipe].with_options(dotted), **options)
    if norm:
        made.norm = nn.BatchNorm2d(made.out_channels)
        nn.init.uniform_(made.norm.running_mean, -3, 3)
        nn.init.uniform_(made.norm.running_var, 0.5, 20)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made.eval()


def by_torch(packed: PackedConv, *args: Any, **kwargs: Any) -> Tensor:
    """Its other path, of a copy that has prepared nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("el_convert.fast_path.engine", lambda: None)
        result: Tensor = copy.deepcopy(packed)(*args, **kwargs)
    return result


def near(result: Tensor, expected: Tensor) -> None:
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=2e-6 * scale)


def agrees(packed: PackedConv, binary: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = packed(x)
    near(result, binary(x))
    near(result, by_torch(packed, x))
    return result


def everything(**options: Any) -> PackedConv:
    """With every tensor a packed layer can have."""
    options = {"link.place": "after-norm", **options}
    return PackedConv(layer(8, 12, 3, padding=1, norm=True, recipe="elastic-reactnet", **options))
