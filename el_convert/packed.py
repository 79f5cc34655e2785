"""Inference-time layers: weights at 1 bit each, everything else as it was trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from el_convert.convert import conversion_of, copy_model, exchange, record
from el_convert.errors import ConversionError
from el_convert.functional import pack_bits, pad_same, unpack_bits
from el_convert.nn import BinaryConv, BinaryLayer, OneBitConv, transposed_convolution

_CONVOLVE: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)
_GEOMETRY = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "transposed",
    "output_padding",
    "groups",
    "padding_mode",
)
ModelT = TypeVar("ModelT", bound=nn.Module)


class PackedConv(OneBitConv):
    r"""A binary convolution of any kind for inference: bit for bit what `BinaryConv` computes.

    .. math:: y = s \cdot \text{conv}(\text{pad}_0(b(x - t)), \pm 1) + \text{bias}, \qquad
              \text{out} = y + \gamma \cdot \text{align}(x)

    Args:
        layer: a trained binary convolution; not changed, its tensors other than the weight are
            shared.

    Attributes:
        bits: (C_out, ceil(C_in / G * prod(kernel) / 8)) uint8, see `pack_bits`: the weight's
            signs in torch's order; for transposed convolutions (C_in, ...).
        scale: (C_out,) weight scale, or None.
        bias: (C_out,) or None.
        threshold: (C_in,) or None.
        norm: a norm between convolution and link, or None.
        link: the gate, or None.

    Raises:
        ConversionError: the layer's weight is real-valued, or called in training mode.

    Example:
        >>> from el_convert.nn import BinaryConv2d
        >>> layer = BinaryConv2d(8, 16, 3, padding=1).eval()
        >>> packed, x = PackedConv(layer), torch.randn(1, 8, 5, 5)
        >>> tuple(packed.bits.shape), torch.equal(packed(x), layer(x))
        ((16, 9), True)
    """

    bits: Tensor
    scale: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    padding_mode: str

    def __init__(self, layer: BinaryConv) -> None:
        super().__init__()
        if not layer.recipe.weight.binary:
            raise ConversionError("its weight is real-valued: there is nothing to pack")
        for name in _GEOMETRY:
            setattr(self, name, getattr(layer, name))
        self.recipe = layer.recipe
        self.same_padding = layer.pads_to_same
        latent = layer.latent_weight().detach()
        self.latent_shape = tuple(latent.shape)
        self.register_buffer("bits", pack_bits(latent.flatten(1)))
        scale = layer.output_scale(latent)
        self.register_buffer("scale", None if scale is None else scale.detach().clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        threshold = layer.threshold
        self.register_buffer("threshold", None if threshold is None else threshold.detach())
        self._border = getattr(layer, "_reversed_padding_repeated_twice", [])
        self.norm = layer.norm
        self.link = layer.link
        self.train(layer.training)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        if self.training:
            raise ConversionError(
                "a packed layer does not train: call eval(), or train the model it was packed from"
            )
        weight = self.signs(input.dtype)
        return self._finish(input, self._scaled(input, weight, self.scale, output_size))

    def signs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as +1 and -1, of the shape it was trained in."""
        count = torch.Size(self.latent_shape[1:]).numel()
        return unpack_bits(self.bits, count, dtype).view(self.latent_shape)

    def _apply_kernel(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output_size: Sequence[int] | None,
    ) -> Tensor:
        if self.transposed:
            return transposed_convolution(self, input, weight, bias, output_size)
        padding: Any = self.padding
        if self.same_padding:
            input = pad_same(input, self.kernel_size, self.stride, self.dilation)
        elif self.padding_mode != "zeros":
            input, padding = F.pad(input, self._border, mode=self.padding_mode), 0
        convolve: Callable[..., Tensor] = _CONVOLVE[len(self.kernel_size) - 1]
        return convolve(input, weight, bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        shape: str = _ConvNd.extra_repr(self)  # type: ignore[arg-type, no-untyped-call]
        return f"{shape}, recipe={self.recipe.name}, packed"


def pack(model: ModelT, *, inplace: bool = False) -> ModelT:
    """Store a trained binarized model's weights at 1 bit each.

    Every binarized convolution becomes a `PackedConv`, except those whose kernel is mixed per
    sample (CondConv), which stay as they are. The results are the same, bit for bit. The float
    weights are gone afterwards: keep the trained model if you may want to train on.

    Args:
        model: made by `binarize` or `load`.
        inplace: change `model` itself instead of a deep copy.

    Returns:
        A model of the class of `model`, in eval mode.

    Raises:
        ConversionError: the model is not binarized, is packed already, or has nothing to pack.

    Warns:
        UserWarning: the model is in training mode, or looks as if it was never trained.

    Example:
        >>> import timm
        >>> from el_convert.convert import binarize
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")  # it was never trained
        ...     model = pack(binarize(timm.create_model("resnet18")).eval())
        >>> type(model.layer1[0].conv1).__name__
        'PackedConv'
    """
    conversion_of(model)
    if any(isinstance(module, PackedConv) for module in model.modules()):
        raise ConversionError(f"{type(model).__name__} is packed already")
    if not any(map(packable, model.modules())):
        raise ConversionError(
            f"{type(model).__name__} has nothing to pack: no convolution has 1-bit weights"
        )
    for doubt in _doubts(model):
        warnings.warn(doubt, UserWarning, stacklevel=2)
    return pack_layers((model if inplace else copy_model(model)).eval())


def pack_layers(model: ModelT) -> ModelT:
    """Exchange a model's binary convolutions for packed ones, in place.

    Returns:
        `model`; where the model is itself a convolution, the layer in its place.
    """
    new = {id(module): PackedConv(module) for module in model.modules() if packable(module)}
    exchange(model, new)
    if id(model) in new:
        return cast(ModelT, record(new[id(model)], conversion_of(model)))
    return model


def packable(module: nn.Module) -> TypeGuard[BinaryConv]:
    """Whether a layer's weight can be stored at 1 bit."""
    return isinstance(module, BinaryConv) and module.recipe.weight.binary


def _doubts(model: nn.Module) -> list[str]:
    """Why the model may not be ready to be packed."""
    doubts = []
    if model.training:
        doubts.append("the model was in training mode; the packed one is in eval mode")
    links = [m.link for m in model.modules() if isinstance(m, BinaryLayer) and m.link is not None]
    learned = [(link.gamma, link.options.gamma_init) for link in links if link.gamma is not None]
    start = [bool(gamma.detach().eq(value).all()) for gamma, value in learned]
    norms = [m for m in model.modules() if isinstance(m, _NormBase)]
    batches = [int(m.num_batches_tracked) for m in norms if m.num_batches_tracked is not None]
    if (start and all(start)) or (batches and not any(batches)):
        doubts.append("the model looks untrained: its gates or norms are as they started")
    return doubts
