"""When and how a packed layer runs on the native engine, its whole epilogue in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor

from el_convert.kernels import ConvGeometry, engine
from el_convert.kernels.native import LINK_POOLS, Epilogue, NativeConv
from el_convert.kernels.version import Marks
from el_convert.link import ElasticLink, align_channels, align_space
from el_convert.recipes import Recipe
from el_convert.tail import Tail

_LAST = torch.channels_last
_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._is_tracing
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_active = torch._C._are_functorch_transforms_active


class PackedLayer(Protocol):
    """What the engine needs to know of a `PackedConv`."""

    in_channels: int
    out_channels: int
    groups: int
    bits: Tensor
    scale: Tensor | None
    bias: Tensor | None
    threshold: Tensor | None
    norm_scale: Tensor | None
    norm_shift: Tensor | None
    link: ElasticLink | None
    recipe: Recipe
    tail: Tail
    _buffers: dict[str, Any]
    _modules: dict[str, Any]

    def geometry(self, size: tuple[int, int]) -> ConvGeometry | None: ...


class Prepared:
    """A layer laid out for the engine, for one size of input, and what it was made from."""

    def __init__(
        self,
        layer: PackedLayer,
        tail: Tail,
        sources: tuple[Any, ...],
        size: tuple[int, int],
        native: NativeConv,
    ) -> None:
        self.sources = sources
        self.tensors = [source for source in sources if isinstance(source, Tensor)]
        self.marks = Marks(self.tensors, _copied(layer, tail, self.tensors))
        self.size = size
        self.native = native
        height, width = native.geometry.output_size(size)
        self.output = (layer.out_channels, height, width)
        kind = "none" if layer.link is None else _link_kind(layer.link)
        pools = layer.link is not None and _pools(layer, kind, size, (height, width))
        self.epilogue = _epilogue(layer, tail, kind, pools)
        self.aligns = not pools and _aligns(layer.link, size, (height, width), kind)

    def serves(self, sources: tuple[Any, ...], size: torch.Size) -> bool:
        """Whether it is for this size, and no tensor was exchanged or changed since."""
        same = self.size == size[2:] and all(map(is_, self.sources, sources))
        return same and self.marks.hold(self.tensors)


class FastPath:
    """Runs one `PackedConv` on the engine. Holds what was prepared; is never copied or saved."""

    def __init__(self) -> None:
        self._prepared: Prepared | None = None
        self._natives: dict[ConvGeometry, NativeConv | None] = {}
        self._bits: tuple[Tensor, Marks] | None = None

    def __deepcopy__(self, memo: object) -> FastPath:
        return FastPath()

    def __reduce__(self) -> tuple[type[FastPath], tuple[()]]:
        return FastPath, ()

    def run(self, layer: PackedLayer, input: Tensor, tail: Tail) -> Tensor | None:
        """The layer's output; None where the engine cannot give it."""
        if not plain_map(input, layer.in_channels) or _wants_gradient(input, tail):
            return None
        sources = _sources(layer, tail)
        prepared = self._prepared
        size = input.shape
        if prepared is None or not prepared.serves(sources, size):
            prepared = self._prepare(layer, tail, sources, (int(size[2]), int(size[3])))
            if prepared is None:
                return None
            self._prepared = prepared
        residual = tail.residual
        if residual is not None:
            if residual.shape != (size[0], *prepared.output) or not _float_map(residual):
                return None
            residual = residual.contiguous(memory_format=_LAST)
        given = input
        input = input.contiguous(memory_format=_LAST)
        link: Tensor | None = input
        if prepared.aligns and layer.link is not None:
            link = _aligned(layer.link, input, prepared.output[1:], prepared.epilogue.link)
        output = prepared.native(input, prepared.epilogue, link, residual)
        # As torch's own convolutions do, the output follows the input's layout in memory.
        return output if input is given else output.contiguous()

    def prepare(self, layer: PackedLayer, tail: Tail, size: tuple[int, int]) -> Prepared | None:
        """The layer laid out for inputs of (H, W); None where the engine has no fast path."""
        return self._prepare(layer, tail, _sources(layer, tail), size)

    def _prepare(
        self,
        layer: PackedLayer,
        tail: Tail,
        sources: tuple[Any, ...],
        size: tuple[int, int],
    ) -> Prepared | None:
        # Another thread may prepare at the same time: each then has its own, and one is kept.
        library, geometry = engine(), layer.geometry(size)
        if library is None or geometry is None or min(geometry.output_size(size)) < 1:
            return None
        if not _floats(sources):
            return None
        known = self._bits
        same = known is not None and known[0] is layer.bits and known[1].hold([layer.bits])
        natives = self._natives if same else {}
        if geometry not in natives:
            natives[geometry] = library.prepare(geometry, layer.bits)
        native = natives[geometry]
        if natives is not self._natives:
            self._natives, self._bits = natives, (layer.bits, Marks([layer.bits]))
        if native is None:
            return None
        return Prepared(layer, tail, sources, size, native)


def _floats(sources: tuple[Any, ...]) -> bool:
    tensors = [source for source in sources if isinstance(source, Tensor)]
    bits, *others = tensors
    return bits.is_cpu and all(t.is_cpu and t.dtype == torch.float32 for t in others)


def plain_map(input: Tensor, channels: int | None = None) -> bool:
    """Whether it is an ordinary float32 feature map on the CPU, outside of any tracing."""
    if not _plain(input):
        return False
    size = input.shape
    return len(size) == 4 and (channels is None or size[1] == channels) and 0 not in size


def plain_rows(input: Tensor, features: int) -> bool:
    """Whether it is an ordinary float32 (N, features) on the CPU, outside of any tracing."""
    return _plain(input) and input.dim() == 2 and input.shape[1] == features


def _plain(input: Tensor) -> bool:
    """Whether the engine can read its memory, and nothing traces or transforms what is done."""
    if _is_compiling() or _is_tracing() or not _float_map(input):
        return False
    return not _dispatch_modes() and not _functorch_active()


def _float_map(input: Tensor) -> bool:
    """Whether the engine can read its memory."""
    return (
        type(input) is Tensor
        and input.dtype is torch.float32
        and input.is_cpu
        and not input.is_neg()
    )


def _wants_gradient(input: Tensor, tail: Tail) -> bool:
    if not torch.is_grad_enabled():
        return False
    residual = tail.residual
    return input.requires_grad or (residual is not None and residual.requires_grad)


def _sources(layer: PackedLayer, tail: Tail) -> tuple[Any, ...]:
    """All that the layer depends on, the bits first; past `__getattr__`, which is slow."""
    own, link = layer._buffers, layer._modules["link"]
    return (
        own["bits"],
        own["threshold"],
        own["scale"],
        own["bias"],
        own["norm_scale"],
        own["norm_shift"],
        None if link is None else link.gamma,
        link,
        layer.tail,
        tail.slope,
        tail.shift_in,
        tail.shift_out,
    )


def _copied(layer: PackedLayer, tail: Tail, tensors: Sequence[Tensor]) -> list[int]:
    """Numbers of those that the engine does not read where they lie."""

    def is_copied(tensor: Tensor) -> bool:
        channels = layer.in_channels if tensor is layer.threshold else layer.out_channels
        # The engine has another sign of what is taken away.
        return tensor is tail.shift_in or not is_vector(tensor, channels)

    return [number for number, tensor in enumerate(tensors) if is_copied(tensor)]


def _pools(layer: PackedLayer, kind: str, size: tuple[int, int], output: tuple[int, int]) -> bool:
    """Whether the engine pools the link's windows of 2x2 pixels itself."""
    link = layer.link
    assert link is not None  # noqa: S101  # the caller asks for layers with a link
    geometry = link.geometry
    have, want = geometry.in_channels, geometry.out_channels
    matched = kind == "expand" or have in ((2 * want, 4 * want) if kind != "identity" else (want,))
    return (
        matched
        and link.options.downsample in LINK_POOLS
        and geometry.stride == (2, 2)
        and not any(geometry.offset)
        and size == (2 * output[0], 2 * output[1])
    )


def _aligns(
    link: ElasticLink | None, size: tuple[int, int], output: tuple[int, int], kind: str
) -> bool:
    """Whether torch has work to do before the engine can add the link."""
    if link is None:
        return False
    channels = kind == "identity" and link.kind != "identity"
    return bool(link.spatial_kind) or size != output or channels


def is_vector(values: Tensor, channels: int) -> bool:
    """Whether `vector` gives its own memory: what is changed there, the engine sees."""
    plain = values.dtype is torch.float32 and values.is_cpu and values.is_contiguous()
    return plain and values.numel() == channels


def vector(values: Tensor | None, channels: int) -> Tensor | None:
    """One float32 value per channel, contiguous."""
    if values is None:
        return None
    return values.detach().float().reshape(-1).expand(channels).contiguous()


def activation_options(tail: Tail, channels: int) -> dict[str, Any]:
    """A tail's activation in the terms of `Epilogue`."""
    shift_in = None if tail.shift_in is None else -tail.shift_in.detach()
    return {
        "activation": "prelu" if tail.activation == "rprelu" else tail.activation,
        "low": tail.low,
        "high": tail.high,
        "slope": vector(tail.slope, channels),
        "act_in": vector(shift_in, channels),
        "act_out": vector(tail.shift_out, channels),
    }


def _epilogue(layer: PackedLayer, tail: Tail, link_kind: str, pools: bool) -> Epilogue:
    channels = layer.out_channels
    gamma, link = None, layer.link
    if link is not None:
        fixed = torch.full((channels,), link.options.gamma_init)
        gamma = fixed if link.gamma is None else link.gamma
    return Epilogue(
        link=link_kind,
        link_pool=link.options.downsample if link is not None and pools else "none",
        link_after_norm=layer.recipe.link.place == "after-norm",
        residual_last=tail.residual_last,
        threshold=vector(layer.threshold, layer.in_channels),
        scale=vector(layer.scale, channels),
        bias=vector(layer.bias, channels),
        gamma=vector(gamma, channels),
        norm_scale=vector(layer.norm_scale, channels),
        norm_shift=vector(layer.norm_shift, channels),
        **activation_options(tail, channels),
    )


def _link_kind(link: ElasticLink) -> str:
    """How the engine matches channels; "identity" where torch has to do it before."""
    have, want = link.geometry.in_channels, link.geometry.out_channels
    if have < want and link.options.expand == "repeat":
        return "expand"
    if have > want and link.options.squeeze in ("mean", "sum"):
        return link.options.squeeze
    return "identity"


def _aligned(link: ElasticLink, input: Tensor, size: tuple[int, ...], kind: str) -> Tensor:
    geometry, options = link.geometry, link.options
    if link.spatial_kind or input.shape[2:] != size:
        input = align_space(input, size, geometry, options.downsample)
    if kind == "identity" and link.kind != "identity":
        channels = geometry.out_channels
        input = align_channels(input, channels, 1, options.squeeze, options.expand)
    return input.contiguous(memory_format=_LAST)
