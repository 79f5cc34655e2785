"""When and how a packed layer runs on the native engine, its whole epilogue in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from el_convert.functional import same_padding
from el_convert.kernels import ConvGeometry, engine
from el_convert.kernels.native import Epilogue, NativeConv
from el_convert.link import ElasticLink, align_channels, align_space

if TYPE_CHECKING:
    from el_convert.packed import PackedConv, Tail

_LAST = torch.channels_last


@dataclass(frozen=True)
class _Prepared:
    """A layer laid out for the engine, and what it was made from.

    Attributes:
        sources: the tensors it depends on, with the version each had.
        size: (H, W) of the input its geometry is for.
    """

    sources: tuple[tuple[Tensor | None, int], ...]
    size: tuple[int, int]
    native: NativeConv
    epilogue: Epilogue


class FastPath:
    """Runs one `PackedConv` on the engine. Holds what was prepared; is never copied or saved."""

    def __init__(self) -> None:
        self._prepared: _Prepared | None = None
        self._natives: dict[ConvGeometry, NativeConv | None] = {}

    def __deepcopy__(self, memo: object) -> FastPath:
        return FastPath()

    def __reduce__(self) -> tuple[type[FastPath], tuple[()]]:
        return FastPath, ()

    def run(self, layer: PackedConv, input: Tensor, tail: Tail) -> Tensor | None:
        """The layer's output; None where the engine cannot give it."""
        if not _plain(layer, input, tail):
            return None
        size = (int(input.shape[2]), int(input.shape[3]))
        prepared = self._prepared
        sources = _sources(layer, tail)
        if prepared is None or prepared.size != size or not _same(prepared.sources, sources):
            prepared = self._prepare(layer, tail, size, sources)
            if prepared is None:
                return None
        given = input
        input = input.contiguous(memory_format=_LAST)
        height, width = prepared.native.geometry.output_size(size)
        shape = (input.shape[0], layer.out_channels, height, width)
        residual = tail.residual
        if residual is not None:
            if residual.shape != shape:
                return None
            residual = residual.contiguous(memory_format=_LAST)
        link = None
        if layer.link is not None:
            link = _link_source(layer.link, input, (height, width), prepared.epilogue.link)
        output = prepared.native(input, prepared.epilogue, link, residual)
        # As torch's own convolutions do, the output follows the input's layout in memory.
        return output if input is given else output.contiguous()

    def _prepare(
        self,
        layer: PackedConv,
        tail: Tail,
        size: tuple[int, int],
        sources: tuple[tuple[Tensor | None, int], ...],
    ) -> _Prepared | None:
        library = engine()
        geometry = layer.geometry(size)
        if library is None or geometry is None or min(geometry.output_size(size)) < 1:
            return None
        old = self._prepared
        if old is not None and not _same(old.sources[:1], sources[:1]):
            self._natives.clear()
        if geometry not in self._natives:
            self._natives[geometry] = library.prepare(geometry, layer.bits)
        native = self._natives[geometry]
        if native is None:
            return None
        self._prepared = _Prepared(sources, size, native, _epilogue(layer, tail))
        return self._prepared


def _plain(layer: PackedConv, input: Tensor, tail: Tail) -> bool:
    """Whether everything is an ordinary float32 tensor on the CPU that needs no gradient."""
    if (
        type(input) is not Tensor
        or input.dim() != 4
        or input.dtype != torch.float32
        or input.device.type != "cpu"
        or input.shape[1] != layer.in_channels
        or input.numel() == 0
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        return False
    if torch.is_grad_enabled() and _wants_gradient(layer, input, tail):
        return False
    scale = layer.scale
    if layer.bits.device.type != "cpu" or (scale is not None and scale.dtype != torch.float32):
        return False
    residual = tail.residual
    return residual is None or (type(residual) is Tensor and residual.dtype == torch.float32)


def _wants_gradient(layer: PackedConv, input: Tensor, tail: Tail) -> bool:
    return input.requires_grad or (tail.residual is not None and tail.residual.requires_grad)


def _sources(layer: PackedConv, tail: Tail) -> tuple[tuple[Tensor | None, int], ...]:
    gamma = None if layer.link is None else layer.link.gamma
    tensors = (
        layer.bits,
        layer.threshold,
        layer.scale,
        layer.bias,
        layer.norm_scale,
        layer.norm_shift,
        gamma,
        tail.slope,
        tail.shift_in,
        tail.shift_out,
    )
    return tuple((t, 0 if t is None or t.is_inference() else t._version) for t in tensors)


def _same(
    one: tuple[tuple[Tensor | None, int], ...], other: tuple[tuple[Tensor | None, int], ...]
) -> bool:
    return all(a is b and m == n for (a, m), (b, n) in zip(one, other, strict=True))


def _vector(values: Tensor | None, channels: int) -> Tensor | None:
    """One float32 value per channel, contiguous."""
    if values is None:
        return None
    return values.detach().float().reshape(-1).expand(channels).contiguous()


def _epilogue(layer: PackedConv, tail: Tail) -> Epilogue:
    channels = layer.out_channels
    gamma = link = None
    if layer.link is not None:
        link = layer.link
        fixed = torch.full((channels,), link.options.gamma_init)
        gamma = fixed if link.gamma is None else link.gamma
    shift_in = None if tail.shift_in is None else -tail.shift_in.detach()
    kind = tail.activation
    return Epilogue(
        link="none" if link is None else _link_kind(link),
        link_after_norm=layer.recipe.link.place == "after-norm",
        activation="prelu" if kind in ("prelu", "rprelu") else kind,
        low=tail.low,
        high=tail.high,
        residual_last=tail.residual_last,
        threshold=_vector(layer.threshold, layer.in_channels),
        scale=_vector(layer.scale, channels),
        bias=_vector(layer.bias, channels),
        gamma=_vector(gamma, channels),
        norm_scale=_vector(layer.norm_scale, channels),
        norm_shift=_vector(layer.norm_shift, channels),
        slope=_vector(tail.slope, channels),
        act_in=_vector(shift_in, channels),
        act_out=_vector(tail.shift_out, channels),
    )


def _link_kind(link: ElasticLink) -> str:
    """How the engine matches channels; "identity" where torch has to do it before."""
    have, want = link.geometry.in_channels, link.geometry.out_channels
    if have < want and want % have == 0 and link.options.expand == "repeat":
        return "expand"
    if have > want and have % want == 0 and link.options.squeeze in ("mean", "sum"):
        return link.options.squeeze
    return "identity"


def _link_source(link: ElasticLink, input: Tensor, size: tuple[int, int], kind: str) -> Tensor:
    geometry = link.geometry
    if link.spatial_kind or input.shape[2:] != size:
        input = align_space(input, size, geometry, link.options.downsample)
    if kind == "identity" and geometry.in_channels != geometry.out_channels:
        options = link.options
        channels = geometry.out_channels
        input = align_channels(input, channels, 1, options.squeeze, options.expand)
    return input.contiguous(memory_format=_LAST)
