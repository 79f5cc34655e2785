"""The shape of a two-dimensional convolution, as every part of the kernels names it."""

from __future__ import annotations

from dataclasses import dataclass

Pair = tuple[int, int]


@dataclass(frozen=True)
class ConvGeometry:
    """A two-dimensional convolution without its weight.

    Attributes:
        in_channels, out_channels, groups: C_in, C_out, G.
        kernel, stride, dilation: (vertical, horizontal).
        padding: (top, bottom, left, right), of zeros.

    Example:
        >>> ConvGeometry(8, 16, 1, (3, 3), (2, 2), (1, 1), (1, 1, 1, 1)).output_size((7, 8))
        (4, 4)
    """

    in_channels: int
    out_channels: int
    groups: int
    kernel: Pair
    stride: Pair
    dilation: Pair
    padding: tuple[int, int, int, int]

    def output_size(self, size: Pair) -> Pair:
        """(OH, OW) for an input of (H, W); below 1 where the kernel does not fit."""
        top, bottom, left, right = self.padding
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        height = (size[0] + top + bottom - spans[0]) // self.stride[0] + 1
        width = (size[1] + left + right - spans[1]) // self.stride[1] + 1
        return height, width

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved alone, and gives one."""
        return self.in_channels == self.out_channels == self.groups

    @property
    def kernel_area(self) -> int:
        """KH * KW."""
        return self.kernel[0] * self.kernel[1]

    @property
    def bytes_per_output(self) -> int:
        """Packed weights of one output channel."""
        return -(-self.in_channels // self.groups * self.kernel_area // 8)

    def multiply_adds(self, size: Pair) -> int:
        """Of one image of (H, W)."""
        height, width = self.output_size(size)
        per_pixel = self.in_channels // self.groups * self.out_channels * self.kernel_area
        return per_pixel * height * width
