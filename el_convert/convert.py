"""Converting: the only place that changes a model."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from el_convert.activations import build_activation
from el_convert.errors import ConversionError, first_few
from el_convert.facts import is_norm
from el_convert.nn import BinaryLayer
from el_convert.patterns import find_pattern
from el_convert.planning import (
    Conversion,
    Decision,
    functional_notice,
    plan_conversion,
    unexpected_keeps,
)
from el_convert.recipes import Recipe
from el_convert.tracing import is_convolution

_RECORD = "el_convert_conversion"


ModelT = TypeVar("ModelT", bound=nn.Module)


def binarize(
    model: ModelT,
    recipe: Recipe | str = "elastic-link",
    *,
    keep: Sequence[str] = (),
    inplace: bool = False,
) -> ModelT:
    """Turn a model into a binarized one of the same class.

    Every convolution gets 1-bit weights and activations and, with the default recipe, an
    Elastic-Link gate (arXiv 2112.10149), except those the pattern table keeps; `plan` lists them
    with reasons. Parameters keep their names. The result must be trained.

    Args:
        model: any module that holds convolutions.
        recipe: a recipe or its name, see `RECIPES`.
        keep: globs on qualified names; what they match stays in float.
        inplace: change `model` itself instead of a deep copy.

    Returns:
        A model of the class of `model`, in the same mode.

    Raises:
        ConversionError: nothing to binarize, or the model is wrapped, compiled, scripted, lazy or
            binarized already. The model is unchanged.
        UnknownNameError: an unknown recipe, or a glob that matches no convolution.

    Warns:
        UserWarning: convolutions were kept for a reason you may not expect, such as hooks, or are
            calls of F.conv2d and the like in a forward, which is named with its line.

    Example:
        >>> import timm
        >>> model = binarize(timm.create_model("resnet18"), keep=["layer4.*"])
        >>> type(model).__name__, tuple(model.layer1[0].conv1.link.gamma.shape)
        ('ResNet', (64,))
    """
    conversion = plan_conversion(model, recipe, keep=keep)
    _refuse_empty(model, conversion)
    if inplace and is_convolution(model):
        raise ConversionError(
            f"{type(model).__name__} is itself what would be replaced: leave inplace out and use "
            "the layer that binarize returns"
        )
    target = model if inplace else copy_model(model)
    odd = unexpected_keeps(conversion)
    if odd:
        warnings.warn(
            f"{len(odd)} of {len(conversion.decisions)} convolutions kept in float: "
            f"{_some_reasons(odd)}",
            UserWarning,
            stacklevel=2,
        )
    if conversion.functional:
        warnings.warn(functional_notice(conversion.functional), UserWarning, stacklevel=2)
    return apply(target, conversion)


def copy_model(model: ModelT) -> ModelT:
    """A deep copy.

    Raises:
        ConversionError: it is no module, or something in it refuses to be copied.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
    try:
        return copy.deepcopy(model)
    except Exception as error:  # any attribute may refuse; computed weights do
        raise ConversionError(
            f"{type(model).__name__} cannot be copied ({str(error).splitlines()[0]}): remove "
            "weight_norm, pruning or stored activations first, or pass inplace=True"
        ) from error


def apply(model: ModelT, conversion: Conversion) -> ModelT:
    """Carry out a conversion on a model, in place.

    Args:
        model: the model it was planned for, or one of the same structure.
        conversion: what `plan_conversion` gave, or a file holds.

    Returns:
        `model`; where the model is itself a convolution, the layer in its place.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    slope = conversion.recipe.activation.slope
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    new: dict[int, nn.Module] = {}
    for decision in conversion.binarized:
        try:
            layer = _build(modules[decision.path], decision.pattern, conversion.recipe)
        except ConversionError as error:
            raise ConversionError(f"{decision.path!r}, by {decision.pattern!r}: {error}") from error
        new[id(modules[decision.path])] = layer
        if not decision.normed and isinstance(layer, BinaryLayer):
            _start_low(layer)
        if decision.norm and isinstance(layer, BinaryLayer):
            layer.norm = modules[decision.norm]
            new[id(layer.norm)] = nn.Identity()
    for change in conversion.activations:
        if change.action == "replace":
            layer = build_activation(change, slope, like)
            new[id(modules[change.path])] = layer.train(modules[change.path].training)
    exchange(model, new)
    if conversion.recipe.opens_branches:
        _open_branches(model)
    root = cast(ModelT, new.get(id(model), model))  # a convolution may be the model itself
    return record(root, conversion)


def _start_low(layer: BinaryLayer) -> None:
    # Without a norm behind each, gates above 1 would multiply up over the layers.
    if layer.link is not None and layer.link.gamma is not None:
        layer.link.gamma.data.clamp_(max=1.0)


@torch.no_grad()
def _open_branches(model: nn.Module) -> None:
    for module in model.modules():
        weight = getattr(module, "weight", None) if is_norm(module) else None
        if isinstance(weight, nn.Parameter) and not weight.is_meta and not weight.any():
            weight.fill_(1.0)


def record(model: ModelT, conversion: Conversion) -> ModelT:
    """Let a model say what conversion it went through; gives the model back."""
    setattr(model, _RECORD, conversion)
    return model


def _build(conv: nn.Module, pattern: str, recipe: Recipe) -> nn.Module:
    row = find_pattern(pattern)
    if row.build is None:
        raise ConversionError(f"pattern {pattern!r} has no builder: it cannot binarize")
    return row.build(conv, recipe)


def exchange(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put new modules under every name of the old ones, and where plain attributes hold them.

    Args:
        model: changed in place; where it is itself exchanged, that is the caller's to see to.
        new: by the id of the old.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        if id(module) in new and path:
            parent, _, name = path.rpartition(".")
            setattr(modules[parent], name, new[id(module)])
    for module in dict.fromkeys(modules.values()):
        _with_new(module.__dict__, new, set())


def _with_new(value: Any, new: Mapping[int, nn.Module], seen: set[int]) -> Any:
    """The value with replaced modules exchanged in plain containers, in place where that can be.

    Some models hold a layer in a list too, or its bound forward, and call it through that.
    """
    if isinstance(value, nn.Module):
        return new.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in new:
        return getattr(new[id(value.__self__)], value.__name__)
    if type(value) is tuple:
        return tuple(_with_new(part, new, seen) for part in value)
    if type(value) not in (dict, list) or id(value) in seen:
        return value
    seen.add(id(value))  # containers may hold themselves
    if type(value) is dict:
        value.update({key: _with_new(part, new, seen) for key, part in value.items()})
    else:
        value[:] = [_with_new(part, new, seen) for part in value]
    return value


def _refuse_empty(model: nn.Module, conversion: Conversion) -> None:
    if conversion.binarized:
        return
    name = type(model).__name__
    if conversion.functional and not conversion.decisions:
        raise ConversionError(f"{name}: {functional_notice(conversion.functional)}")
    if not conversion.decisions:
        raise ConversionError(f"{name} has no convolution: there is nothing to binarize")
    kept = conversion.kept
    raise ConversionError(
        f"{name} has no convolution to binarize: all {len(kept)} are kept ({_some_reasons(kept)})"
    )


def _some_reasons(decisions: Sequence[Decision]) -> str:
    return first_few(f"{decision.path}: {decision.reason}" for decision in decisions)


def conversion_of(model: nn.Module) -> Conversion:
    """The conversion a binarized model went through.

    Raises:
        ConversionError: the model was not made by `binarize` or `load`.
    """
    conversion = getattr(model, _RECORD, None)
    if not isinstance(conversion, Conversion):
        raise ConversionError(
            f"{type(model).__name__} is not a binarized model: call binarize(model) first"
        )
    return conversion


def floating_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's floating-point parameters; float32 when it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
