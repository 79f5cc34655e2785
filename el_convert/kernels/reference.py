"""The truth: the binary convolution in plain torch, on sign tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from el_convert.bits import unpack_bits
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

    Raises:
        ValueError: the arguments do not fit together.
    """
    check_arguments(input, bits, threshold, geometry)
    per_group = geometry.in_channels // geometry.groups
    count = per_group * geometry.kernel_area
    weight = unpack_bits(bits, count, input.dtype)
    weight = weight.view(geometry.out_channels, per_group, *geometry.kernel)
    if threshold is not None:
        input = input - threshold.to(input.dtype).view(-1, 1, 1)
    top, bottom, left, right = geometry.padding
    signs = (input > 0).to(input.dtype).mul_(2).sub_(1)
    padding: tuple[int, int] = (top, left)
    if (top, left) != (bottom, right):
        signs, padding = F.pad(signs, (left, right, top, bottom)), (0, 0)
    return F.conv2d(
        signs, weight, None, geometry.stride, padding, geometry.dilation, geometry.groups
    )


def check_arguments(
    input: Tensor, bits: Tensor, threshold: Tensor | None, geometry: ConvGeometry
) -> None:
    """Refuse what does not fit together, before any memory is read.

    Raises:
        ValueError: says what is wrong.
    """
    if input.dim() != 4 or input.shape[1] != geometry.in_channels:
        wanted = f"(N, {geometry.in_channels}, H, W)"
        raise ValueError(f"the input is {tuple(input.shape)}, not {wanted}")
    shape = (geometry.out_channels, geometry.bytes_per_output)
    if tuple(bits.shape) != shape or bits.dtype != torch.uint8:
        raise ValueError(f"packed weights are {tuple(bits.shape)} {bits.dtype}, not {shape} uint8")
    if threshold is not None and tuple(threshold.shape) != (geometry.in_channels,):
        raise ValueError(
            f"the threshold is {tuple(threshold.shape)}, not ({geometry.in_channels},)"
        )
    if min(geometry.output_size((input.shape[2], input.shape[3]))) < 1:
        raise ValueError(f"the kernel {geometry.kernel} does not fit on {tuple(input.shape)}")
