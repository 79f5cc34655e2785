"""`torch.ops.el_convert.binary_conv2d`: the integer convolution as torch's compilers see it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from el_convert.kernels.geometry import ConvGeometry
from el_convert.kernels.native import Epilogue, NativeConv, engine
from el_convert.kernels.passes import one_by_one
from el_convert.kernels.reference import check_arguments, reference_conv2d
from el_convert.kernels.version import Marks

_SCHEMA = (
    "(Tensor input, Tensor bits, Tensor? threshold, int[2] kernel, int[2] stride, int[4] padding, "
    "int[2] dilation, int groups) -> Tensor"
)
_library = torch.library.Library("el_convert", "DEF")  # type: ignore[no-untyped-call]
_library.define(f"binary_conv2d{_SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Prepared:
    """Weights in the engine's layout, and what tells whether they still hold."""

    geometry: ConvGeometry
    marks: Marks
    place: tuple[int, tuple[int, ...], tuple[int, ...]]
    native: NativeConv | None


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
    check_arguments(input, bits, threshold, geometry)
    native = _prepared_for(bits, geometry) if input.dtype == torch.float32 else None
    if native is None:
        return _any_device(input, bits, threshold, *shape)
    threshold = None if threshold is None else threshold.float().contiguous()
    channels_last = input.contiguous(memory_format=torch.channels_last)
    return native(channels_last, Epilogue(threshold=threshold))


def _size(input: Tensor) -> tuple[int, int]:
    return input.shape[2], input.shape[3]


def _prepared_for(bits: Tensor, geometry: ConvGeometry) -> NativeConv | None:
    """The weights in the engine's layout, kept as long as the tensor's memory lives."""
    library = engine()
    if library is None:
        return None
    place = (int(bits.storage_offset()), tuple(bits.shape), tuple(bits.stride()))
    known = _prepared.get(storage := bits.untyped_storage())
    same = known is not None and (known.geometry, known.place) == (geometry, place)
    if known is not None and same and known.marks.hold([bits]):
        return known.native
    native = library.prepare(geometry, bits)
    _prepared[storage] = _Prepared(geometry, Marks([bits]), place, native)
    return native


@torch.library.register_fake("el_convert::binary_conv2d", lib=_library)  # type: ignore[untyped-decorator]
def _fake(input: Tensor, bits: Tensor, threshold: Tensor | None, *shape: object) -> Tensor:
    geometry = _geometry(input, bits, *shape)  # type: ignore[arg-type]
    size = (input.shape[0], geometry.out_channels, *geometry.output_size(_size(input)))
    return torch.empty(
        size, dtype=input.dtype, device=input.device, memory_format=torch.channels_last
    )


@torch.library.register_vmap("el_convert::binary_conv2d", lib=_library)  # type: ignore[untyped-decorator]
def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    operator = torch.ops.el_convert.binary_conv2d
    input, *rest = args
    # Of the lists among the arguments no part is batched.
    batched = [isinstance(dim, int) for dim in in_dims]
    if batched[0] and not any(batched[1:]):
        samples = input.movedim(in_dims[0], 0)
        output = operator(samples.flatten(0, 1), *rest)
        return output.unflatten(0, samples.shape[:2]), 0
    return torch.stack(one_by_one(operator, info.batch_size, in_dims, args)), 0
