"""Packing a trained network: 1-bit weights, folded norms, fused activations and residual sums."""

from __future__ import annotations

import warnings
from typing import TypeGuard, TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from el_convert.chains import chain_blocks
from el_convert.convert import conversion_of, copy_model, exchange, record
from el_convert.errors import ConversionError
from el_convert.fusion import fuse_blocks
from el_convert.kernels import engine_notice
from el_convert.linear import LargeLinear, large_linear
from el_convert.nn import BinaryConv, BinaryLayer
from el_convert.packed import PackedConv

ModelT = TypeVar("ModelT", bound=nn.Module)


def pack(model: ModelT, *, inplace: bool = False) -> ModelT:
    """Store a trained binarized model's weights at 1 bit each.

    Every binarized convolution becomes a `PackedConv`, except those whose kernel is mixed per
    sample (CondConv), which stay as they are. The batch norm, activation and residual sum that
    follow a convolution are done in the same pass over memory where the graph allows; the blocks
    this concerns become GraphModules, the model keeps its class. Results agree with the unpacked
    model's to rounding. Float maps are laid out channels_last. The float weights are gone
    afterwards: keep the trained model if you may want to train on.

    Args:
        model: made by `binarize` or `load`.
        inplace: change `model` itself instead of a deep copy.

    Returns:
        A model of the class of `model`, in eval mode; no parameter wants a gradient.

    Raises:
        ConversionError: the model is not binarized, is packed already, or has nothing to pack.

    Warns:
        UserWarning: the model is in training mode, looks as if it was never trained, or there is
            no native engine.

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
    """Exchange a model's binary convolutions for packed ones, and fuse what follows them, in place.

    Returns:
        `model`; where the model is itself a convolution, the layer in its place.
    """
    new = {id(module): PackedConv(module) for module in model.modules() if packable(module)}
    exchange(model, new)
    if id(model) in new:
        model = cast(ModelT, record(new[id(model)], conversion_of(model)))
    else:
        fuse_blocks(model)
        chain_blocks(model)
        exchange(model, {id(m): LargeLinear(m) for m in model.modules() if large_linear(m)})
    model.requires_grad_(False)  # with gradients wanted of its input a layer cannot be native
    return to_channels_last(model)


def to_channels_last(model: ModelT) -> ModelT:
    """Lay out the weights of float 2d convolutions channels_last, in place: maps then follow."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.to(memory_format=torch.channels_last)
    return model


def slow_layers(model: nn.Module) -> list[tuple[str, str]]:
    """The packed layers that run in plain torch although there is an engine.

    Args:
        model: a packed model.

    Returns:
        (qualified name, why) of each.
    """
    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, PackedConv)]
    return [(path, layer.obstacle()) for path, layer in layers if layer.obstacle()]


def packable(module: nn.Module) -> TypeGuard[BinaryConv]:
    """Whether a layer's weight can be stored at 1 bit."""
    return isinstance(module, BinaryConv) and module.recipe.weight.binary


def _doubts(model: nn.Module) -> list[str]:
    """Why the model may not be ready to be packed."""
    doubts = [engine_notice()] if engine_notice() else []
    if model.training:
        doubts.append("the model was in training mode; the packed one is in eval mode")
    links = [m.link for m in model.modules() if isinstance(m, BinaryLayer) and m.link is not None]
    learned = [(link.gamma, link.options.gamma_init) for link in links if link.gamma is not None]
    start = [
        bool(gamma.detach().eq(value).all() or gamma.detach().eq(min(value, 1)).all())
        for gamma, value in learned
    ]
    norms = [m for m in model.modules() if isinstance(m, _NormBase)]
    batches = [int(m.num_batches_tracked) for m in norms if m.num_batches_tracked is not None]
    if (start and all(start)) or (batches and not any(batches)):
        doubts.append("the model looks untrained: its gates or norms are as they started")
    return doubts
