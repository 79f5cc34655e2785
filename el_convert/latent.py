"""The parameters of a binarized network as an optimizer sees them, and its two-step training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from el_convert.nn import BinaryLayer
from el_convert.recipes import Recipe


def binary_layers(model: nn.Module) -> Iterator[tuple[str, BinaryLayer]]:
    """Every binarized layer with its qualified name, once."""
    for name, module in model.named_modules():
        if isinstance(module, BinaryLayer):
            yield name, module


def latent_weights(model: nn.Module) -> list[nn.Parameter]:
    """The real-valued weights whose signs are used."""
    weights = [layer.weight for _, layer in binary_layers(model) if layer.recipe.weight.binary]
    return [weight for weight in weights if isinstance(weight, nn.Parameter)]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: float weights, which decay, and what must not.

    Decay pulls latent weights to 0, where signs flip at random, and gates shut; norms, biases,
    thresholds, slopes and everything else of one dimension do not decay either.

    Args:
        model: its binary layers are as they will be trained: in the first of two steps their
            weights are real and decay.
        weight_decay: of the first group.

    Returns:
        What every torch optimizer takes.

    Example:
        >>> from el_convert import binarize
        >>> model = binarize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten()))
        >>> [len(group["params"]) for group in parameter_groups(model, 0.1)]
        [1, 4]
    """
    fixed = {id(weight) for weight in latent_weights(model)}
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        one_dimensional = parameter.dim() <= 1 or name.endswith(".bias")
        stays = id(parameter) in fixed or one_dimensional
        (rest if stays else decayed).append(parameter)
    groups = [(decayed, weight_decay), (rest, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


@torch.no_grad()
def clip_latent(weights: Sequence[Tensor]) -> None:
    """Keep latent weights in [-1, 1], outside of which they get no gradient (arXiv 1511.00363)."""
    if weights:
        torch._foreach_clamp_min_(list(weights), -1.0)
        torch._foreach_clamp_max_(list(weights), 1.0)


def set_binary_weights(model: nn.Module, binary: bool) -> None:
    """Let binary layers use real weights, or signs again: the two steps of ReActNet's training.

    Only layers that had binary weights when converted change.
    """
    for _, layer in binary_layers(model):
        converted: Recipe = layer.__dict__.setdefault("_converted_recipe", layer.recipe)
        if converted.weight.binary:
            layer.recipe = converted.with_options({"weight.binary": binary})
            if layer.learned_scale is not None:
                layer.learned_scale.requires_grad_(binary)
