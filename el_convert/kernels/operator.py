"""`torch.ops.el_convert.binary_conv2d`: the integer convolution as torch's compilers see it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from el_convert.kernels.geometry import ConvGeometry
from el_convert.kernels.native import Epilogue, NativeConv, engine
from el_convert.kernels.reference import reference_conv2d

_SCHEMA = (
    "(Tensor input, Tensor bits, Tensor? threshold, int[2] kernel, int[2] stride, int[4] padding, "
    "int[2] dilation, int groups) -> Tensor"
)
_library = torch.library.Library("el_convert", "DEF")  # type: ignore[no-untyped-call]
_library.define(f"binary_conv2d{_SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
_Prepared = tuple[ConvGeometry, int, int, NativeConv | None]
_prepared: weakref.WeakKeyDictionary[torch.UntypedStorage, _Prepared] = weakref.WeakKeyDictionary()


def binary_conv2d(
    input: Tensor, bits: Tensor, threshold: Tensor | None, geometry: ConvGeometry
) -> Tensor:
    """`reference_conv2d`, by the native engine where it can be, and one node for compilers.

    Args:
        input: (N, C_in, H, W), floating point.
        bits: (C_out, ceil(C_in / G * KH * KW / 8)) uint8, see `pack_bits`.
        threshold: (C_in,) or None.
        geometry: of the convolution.

    Returns:
        (N, C_out, OH, OW) of the input's dtype, channels_last: whole numbers. No gradient flows.

    Example:
        >>> geometry = ConvGeometry(2, 1, 1, (1, 1), (1, 1), (1, 1), (0, 0, 0, 0))
        >>> bits = torch.tensor([[3]], dtype=torch.uint8)  # both weights +1
        >>> binary_conv2d(torch.tensor([[[[0.5]], [[-2.0]]]]), bits, None, geometry).item()
        0.0
    """
    result: Tensor = torch.ops.el_convert.binary_conv2d(
        input,
        bits,
        threshold,
        geometry.kernel,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
    )
    return result


def _geometry(
    input: Tensor,
    bits: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvGeometry:
    top, bottom, left, right = padding
    return ConvGeometry(
        in_channels=input.shape[1],
        out_channels=bits.shape[0],
        groups=groups,
        kernel=(kernel[0], kernel[1]),
        stride=(stride[0], stride[1]),
        dilation=(dilation[0], dilation[1]),
        padding=(top, bottom, left, right),
    )


@torch.library.impl(_library, "binary_conv2d", "CompositeExplicitAutograd")
def _any_device(input: Tensor, bits: Tensor, threshold: Tensor | None, *shape: object) -> Tensor:
    sums = reference_conv2d(input, bits, threshold, _geometry(input, bits, *shape))  # type: ignore[arg-type]
    return sums.contiguous(memory_format=torch.channels_last)


@torch.library.impl(_library, "binary_conv2d", "CPU")
def _cpu(input: Tensor, bits: Tensor, threshold: Tensor | None, *shape: object) -> Tensor:
    geometry = _geometry(input, bits, *shape)  # type: ignore[arg-type]
    native = None
    plain = threshold is None or threshold.dtype == torch.float32
    if input.dtype == torch.float32 and plain and min(geometry.output_size(_size(input))) > 0:
        native = _prepared_for(bits, geometry)
    if native is None:
        return _any_device(input, bits, threshold, *shape)
    threshold = None if threshold is None else threshold.contiguous()
    channels_last = input.contiguous(memory_format=torch.channels_last)
    return native(channels_last, Epilogue(threshold=threshold))


def _size(input: Tensor) -> tuple[int, int]:
    return input.shape[2], input.shape[3]


def _prepared_for(bits: Tensor, geometry: ConvGeometry) -> NativeConv | None:
    """The weights in the engine's layout, kept as long as the tensor's memory lives."""
    library = engine()
    if library is None:
        return None
    version = 0 if bits.is_inference() else bits._version
    storage = bits.untyped_storage()
    key = (geometry, version, int(bits.storage_offset()))
    known = _prepared.get(storage)
    if known is not None and known[:3] == key:
        return known[3]
    native = library.prepare(geometry, bits)
    _prepared[storage] = (*key, native)
    return native


@torch.library.register_fake("el_convert::binary_conv2d", lib=_library)  # type: ignore[untyped-decorator]
def _fake(input: Tensor, bits: Tensor, threshold: Tensor | None, *shape: object) -> Tensor:
    geometry = _geometry(input, bits, *shape)  # type: ignore[arg-type]
    size = (input.shape[0], geometry.out_channels, *geometry.output_size(_size(input)))
    return torch.empty(
        size, dtype=input.dtype, device=input.device, memory_format=torch.channels_last
    )
