"""The truth: the binary convolution in plain torch, on sign tensors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from el_convert.functional import binarize_ste, unpack_bits
from el_convert.kernels.geometry import ConvGeometry


def reference_conv2d(
    input: Tensor, bits: Tensor, threshold: Tensor | None, geometry: ConvGeometry
) -> Tensor:
    """The convolution of the input's signs with packed weights, zero-padded after the sign.

    Args:
        input: (N, C_in, H, W), floating point.
        bits: (C_out, ceil(C_in / G * KH * KW / 8)) uint8, see `pack_bits`.
        threshold: (C_in,) or None; the sign of input - threshold is taken.
        geometry: of the convolution.

    Returns:
        (N, C_out, OH, OW) of the input's dtype: whole numbers.
    """
    per_group = geometry.in_channels // geometry.groups
    count = per_group * geometry.kernel_area
    weight = unpack_bits(bits, count, input.dtype)
    weight = weight.view(geometry.out_channels, per_group, *geometry.kernel)
    if threshold is not None:
        input = input - threshold.view(-1, 1, 1)
    top, bottom, left, right = geometry.padding
    signs = binarize_ste(input)
    padding: tuple[int, int] = (top, left)
    if (top, left) != (bottom, right):
        signs, padding = F.pad(signs, (left, right, top, bottom)), (0, 0)
    return F.conv2d(
        signs, weight, None, geometry.stride, padding, geometry.dilation, geometry.groups
    )
