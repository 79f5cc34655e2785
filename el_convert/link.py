"""The Elastic-Link gate and the alignment it needs (Hu et al., AAAI 2022, arXiv 2112.10149).

Known of the paper are its abstract and its figure of the gate; how sizes are aligned here is
written down in `align_space` and `align_channels`, and each choice is a field of `LinkOptions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from el_convert.channels import gate, repeat_channels, squeeze_gate, sum_channels
from el_convert.recipes import LinkOptions

_POOLS: dict[str, tuple[Callable[..., Tensor], ...]] = {
    "average": (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    "max": (F.max_pool1d, F.max_pool2d, F.max_pool3d),
}


@dataclass(frozen=True)
class LinkGeometry:
    """The part of a convolution's geometry its link must follow.

    Attributes:
        in_channels, out_channels: C_in, C_out.
        stride: per spatial dimension.
        offset: per spatial dimension, the input index where the first window of `stride` pixels
            starts (negative: outside); for transposed convolutions the output index where the
            first input pixel's block starts.
        transposed: whether the convolution is a transposed one.
    """

    in_channels: int
    out_channels: int
    stride: tuple[int, ...]
    offset: tuple[int, ...]
    transposed: bool = False


def link_geometry(conv: Any) -> LinkGeometry:
    r"""The geometry of a convolution's link: windows centred on the receptive fields.

    Output i sees the input around `i * stride - padding + dilation * (kernel - 1) / 2`; a window
    of `stride` pixels centred there starts, rounded up, at

    .. math:: i \cdot s + \lceil (d (k - 1) - (s - 1)) / 2 \rceil - p

    so "same" padding gives plain pooling by the stride, patch embeddings pool their own patch,
    and "valid" padding crops the border that the kernel cannot centre on. Transposed convolutions
    use the same formula the other way round: input i fills the `stride` pixels from there.
    """
    spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    excess = [span - (s - 1) for span, s in zip(spans, conv.stride, strict=True)]
    if isinstance(conv.padding, str):
        offset = [0 if conv.padding == "same" else math.ceil(e / 2) for e in excess]
    else:
        offset = [math.ceil(e / 2) - int(p) for e, p in zip(excess, conv.padding, strict=True)]
    return LinkGeometry(
        conv.in_channels, conv.out_channels, tuple(conv.stride), tuple(offset), conv.transposed
    )


def align_space(
    input: Tensor, size: Sequence[int], geometry: LinkGeometry, downsample: str = "average"
) -> Tensor:
    """Bring the spatial size to the convolution's output size.

    Stride pools over windows of `stride` pixels, the last one over what is left (`ceil_mode`);
    transposed convolutions repeat each pixel `stride` times. What the windows do not cover is
    cropped; positions that see only padding are 0.

    Args:
        input: (N, C, ...) or (C, ...), any number of spatial dimensions.
        size: spatial size to reach.
        geometry: of the convolution.
        downsample: "average", "max" or "slice" (the window's first pixel).

    Returns:
        (N, C, *size) or (C, *size)
    """
    if geometry.transposed:
        return _upsample(input, size, geometry)
    pads: list[int] = []
    dims = zip(input.shape[-len(size) :], size, geometry.stride, geometry.offset, strict=True)
    for have, want, stride, offset in dims:
        left = have - offset
        short = -(-left // stride) != want
        pads = [-offset, want * stride - left if short else 0, *pads]  # F.pad: last dimension first
    if any(pads):
        input = F.pad(input, pads)
    return _pool(input, geometry.stride, downsample) if max(geometry.stride) > 1 else input


def _pool(input: Tensor, stride: tuple[int, ...], downsample: str) -> Tensor:
    if downsample == "slice":
        window: tuple[Any, ...] = (Ellipsis, *(slice(None, None, step) for step in stride))
        return input[window]
    # 3d pooling refuses windows larger than its input, ceil_mode or not.
    window_size = [min(s, n) for s, n in zip(stride, input.shape[-len(stride) :], strict=True)]
    pool = _POOLS[downsample][len(stride) - 1]
    if len(stride) == 3 and input.is_cpu and input.dtype in (torch.float16, torch.bfloat16):
        # torch has no 3d pooling of these on the CPU.
        return pool(input.float(), window_size, stride, ceil_mode=True).to(input.dtype)
    return pool(input, window_size, stride, ceil_mode=True)


def _upsample(input: Tensor, size: Sequence[int], geometry: LinkGeometry) -> Tensor:
    pads: list[int] = []
    spatial = len(size)
    dims = zip(range(-spatial, 0), size, geometry.stride, geometry.offset, strict=True)
    for dim, want, stride, offset in dims:
        input = input.repeat_interleave(stride, dim) if stride > 1 else input
        pads = [offset, want - offset - input.shape[dim], *pads]
    return F.pad(input, pads) if any(pads) else input


def align_channels(
    input: Tensor, channels: int, dim: int = 1, squeeze: str = "mean", expand: str = "repeat"
) -> Tensor:
    r"""Bring the number of channels from C to C'.

    *Squeeze*: output c summarizes the inputs from :math:`\lfloor cC/C' \rfloor` up to
    :math:`\lceil (c+1)C/C' \rceil`, groups of C / C' where that is a whole number, overlapping by
    one channel where it is not. *Expand*: output c copies input :math:`\lfloor cC/C' \rfloor`
    ("repeat") or :math:`c \bmod C` ("tile"), or is 0 from C on ("zero"). Both stay inside the
    groups of a grouped convolution.

    Args:
        input: any shape with C channels at `dim`.
        channels: C'.
        dim: where the channels are.
        squeeze: "mean", "sum", or "slice" (the group's first channel).
        expand: "repeat", "tile" or "zero".

    Returns:
        The shape of `input` with C' channels at `dim`.

    Example:
        >>> align_channels(torch.tensor([[1.0, 3.0, 5.0, 7.0]]), 2)
        tensor([[2., 6.]])
    """
    have = input.shape[dim]
    if have == channels:
        return input
    if have < channels and expand == "zero":
        padding = input.new_zeros(()).expand(_with_size(input, dim, channels - have))
        return torch.cat([input, padding], dim)
    if have < channels or squeeze == "slice":
        tile = have < channels and expand == "tile"
        return _pick_channels(input, channels, dim, tile)
    return _squeeze(input, channels, dim, squeeze)


def _with_size(input: Tensor, dim: int, size: int) -> list[int]:
    shape = list(input.shape)
    shape[dim] = size
    return shape


def _pick_channels(input: Tensor, channels: int, dim: int, tile: bool) -> Tensor:
    have = input.shape[dim]
    if not tile and channels % have == 0:
        return repeat_channels(input, dim, channels // have)
    target = torch.arange(channels, device=input.device)
    return input.index_select(dim, target % have if tile else target * have // channels)


def _squeeze(input: Tensor, channels: int, dim: int, squeeze: str) -> Tensor:
    dim %= input.dim()
    lead, have, trail = input.shape[:dim], input.shape[dim], input.shape[dim + 1 :]
    if have % channels == 0:
        total = sum_channels(input, dim, have // channels)
        return total * (channels / have) if squeeze == "mean" else total
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        total, sizes = _sum_bins(input, channels, dim)
        return total / sizes if squeeze == "mean" else total
    # Adaptive pooling bins exactly as documented; channels stand in for the height of an image.
    if input.numel() == 0:  # which adaptive pooling refuses
        return input.new_zeros((*lead, channels, *trail))
    # Not Size.numel, which would fix the batch size of an exported graph.
    image = input.reshape(math.prod(lead), 1, have, math.prod(trail))
    mean = F.adaptive_avg_pool2d(image, (channels, math.prod(trail)))
    mean = mean.reshape(*lead, channels, *trail)
    if squeeze == "mean":
        return mean
    return mean * bin_sizes(have, channels).to(mean).view(-1, *[1] * len(trail))


def _sum_bins(input: Tensor, channels: int, dim: int) -> tuple[Tensor, Tensor]:
    """Sums and sizes of the bins, for graphs: there adaptive pooling would index each pixel."""
    have, shape = int(input.shape[dim]), (-1, *[1] * (input.dim() - dim - 1))
    firsts, sizes = _bins(have, channels)

    def values(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=input.dtype, device=input.device).view(shape)

    def part(place: int) -> Tensor:
        index = [min(first + place, have - 1) for first in firsts]
        picked = input.index_select(dim, torch.tensor(index, device=input.device))
        inside = [int(place < size) for size in sizes]
        return picked if all(inside) else picked * values(inside)

    total = part(0)
    for place in range(1, max(sizes)):
        total = total + part(place)
    return total, values(sizes)


def _bins(have: int, channels: int) -> tuple[list[int], list[int]]:
    """The first of `have` channels that each of `channels` outputs summarizes, and how many."""
    firsts = [c * have // channels for c in range(channels)]
    ends = [-(-(c + 1) * have // channels) for c in range(channels)]
    return firsts, [end - first for first, end in zip(firsts, ends, strict=True)]


def bin_sizes(have: int, channels: int) -> Tensor:
    """How many of `have` channels each of `channels` outputs summarizes: (channels,) integers."""
    return torch.tensor(_bins(have, channels)[1])


class ElasticLink(nn.Module):
    r"""The gate: :math:`y + \gamma \cdot \text{align}(x)` (Elastic-Link, arXiv 2112.10149).

    Args:
        geometry: of the convolution it goes around.
        options: alignment and gamma; see `LinkOptions`.
        like: a tensor whose device and dtype gamma takes.

    Shape:
        input (N, C_in, ...) and the convolution's output (N, C_out, ...) to (N, C_out, ...);
        the batch dimension may be missing from both. `gamma` is (C_out,) or (1,).

    Example:
        >>> link = ElasticLink(link_geometry(nn.Conv2d(8, 4, 1)))
        >>> link.kind, tuple(link.gamma.shape)
        ('squeeze', (4,))
    """

    gamma: nn.Parameter | None

    def __init__(
        self,
        geometry: LinkGeometry,
        options: LinkOptions | None = None,
        like: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.options = options = options or LinkOptions()
        like = torch.empty(()) if like is None else like
        size = geometry.out_channels if options.gamma == "channel" else 1
        gamma = torch.full((size,), options.gamma_init, dtype=like.dtype, device=like.device)
        self.register_parameter("gamma", nn.Parameter(gamma) if options.gamma != "fixed" else None)

    @property
    def kind(self) -> str:
        """How channels are matched: "identity", "squeeze" or "expand"."""
        have, want = self.geometry.in_channels, self.geometry.out_channels
        return "identity" if have == want else "squeeze" if have > want else "expand"

    @property
    def spatial_kind(self) -> str:
        """How space is matched: "" when sizes agree, else "pooled", "upsampled" or "cropped"."""
        if max(self.geometry.stride) > 1:
            return "upsampled" if self.geometry.transposed else "pooled"
        return "cropped" if any(self.geometry.offset) else ""

    def align(self, input: Tensor, output: Tensor) -> Tensor:
        """`input` brought to the shape of `output`, without gamma."""
        return self._align_channels(self._align_space(input, output))

    def _align_space(self, input: Tensor, output: Tensor) -> Tensor:
        size = output.shape[-len(self.geometry.stride) :]
        return align_space(input, size, self.geometry, self.options.downsample)

    def _align_channels(self, input: Tensor) -> Tensor:
        options, channel_dim = self.options, -1 - len(self.geometry.stride)
        return align_channels(
            input, self.geometry.out_channels, channel_dim, options.squeeze, options.expand
        )

    def forward(self, input: Tensor, output: Tensor) -> Tensor:
        spaced = self._align_space(input, output)
        if self.gamma is None:
            return output + self.options.gamma_init * self._align_channels(spaced)
        gamma = self.gamma.view(-1, *[1] * len(self.geometry.stride))
        if not self.training:
            return torch.addcmul(output, gamma, self._align_channels(spaced))
        return self._fused(output, gamma, spaced)

    def _fused(self, output: Tensor, gamma: Tensor, input: Tensor) -> Tensor:
        """Channels matched, scaled and added in one function, where there is one."""
        have, want = self.geometry.in_channels, self.geometry.out_channels
        if self.options.expand == "repeat" and have < want and want % have == 0:
            return gate(output, gamma, input, -gamma.dim(), want // have)
        if self.options.squeeze != "slice" and have > want and have % want == 0:
            factor = want / have if self.options.squeeze == "mean" else 1.0
            return squeeze_gate(output, gamma, input, -gamma.dim(), factor)
        return gate(output, gamma, self._align_channels(input), -gamma.dim())

    def extra_repr(self) -> str:
        channels = f"{self.geometry.in_channels} -> {self.geometry.out_channels}"
        kinds = ", ".join(filter(None, (self.kind, self.spatial_kind)))
        return f"{channels}, {kinds}, gamma={self.options.gamma}"
