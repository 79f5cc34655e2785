"""Activations that feed binarized convolutions: finding them, and what they become."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, fx, nn

from el_convert.facts import (
    ACTIVATION_NAMES,
    RELU_FAMILY,
    GraphFacts,
    name_of,
    tensor_inputs,
    visit,
)
from el_convert.recipes import ActivationOptions
from el_convert.sites import Site, producer
from el_convert.slopes import ChannelPReLU, RPReLU
from el_convert.tracing import has_forward_hooks, has_parameters, join

# By name: timm has its own classes of these names. Gates (sigmoid, tanh) are none of them.
REPLACEABLE = {
    "ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "CELU", "SELU", "Hardtanh", "SiLU", "Swish",
    "GELU", "GELUTanh", "QuickGELU", "GeluTanh", "Hardswish", "HardSwish", "HardSwishMe", "Mish",
    "HardMish", "HardMishMe",
}  # fmt: skip
_RELU_FUNCTIONS = {"relu", "relu_", "relu6"}
_RESHAPES = {"cat", "chunk", "split", "getitem", "view", "reshape", "transpose", "flatten"}
_PASSES = _RESHAPES | {
    "contiguous", "clone", "dropout", "mul", "imul", "interpolate", "pad", "max_pool1d",
    "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "boolean_dispatch",
}  # fmt: skip


@dataclass(frozen=True)
class ActivationChange:
    """What becomes of one activation that feeds a binarized convolution.

    Attributes:
        path: qualified name of the activation; of the module that calls it where functional.
        kind: its class or function, as in "ReLU" or "relu".
        action: "replace" or "leave".
        replacement: "prelu", "rprelu" or "identity"; "" when left.
        channels: parameters per channel the replacement gets; 1 where it is shared by
            calls of different or unknown widths.
        reason: why it is left, or what was shared.
    """

    path: str
    kind: str
    action: Literal["replace", "leave"]
    replacement: str = ""
    channels: int = 0
    reason: str = ""


def plan_activations(
    sites: Sequence[Site], options: ActivationOptions
) -> tuple[ActivationChange, ...]:
    """The changes a recipe asks for around the given (binarized) sites, in graph order."""
    if options.replacement == "keep":
        return ()
    changes: dict[str, ActivationChange] = {}
    for site in sites:
        for facts, node in site.uses:
            for found in _feeding(facts, node):
                change = _change(facts, node, found, options)
                if change is not None:
                    changes.setdefault(f"{change.path} {change.kind}", change)
    return tuple(changes.values())


def _feeding(facts: GraphFacts, conv: fx.Node) -> list[fx.Node]:
    """The activations whose sign pattern reaches a convolution: not through norms or sums."""
    found: list[fx.Node] = []

    def step(node: fx.Node) -> Iterable[fx.Node]:
        if node in facts.activations or name_of(node) in ACTIVATION_NAMES:
            found.append(node)
            return ()
        module = facts.module(node)
        bare = module is not None and not has_parameters(module)
        if bare or name_of(node) in _PASSES:
            # A pooled factor of a product is a gate.
            return [value for value in tensor_inputs(node) if not facts.of[value].pooled]
        return ()

    visit([producer(conv)], step)
    return sorted(found, key=facts.position.__getitem__)


def _change(
    facts: GraphFacts, conv: fx.Node, node: fx.Node, options: ActivationOptions
) -> ActivationChange | None:
    activation = facts.activations.get(node)
    if activation is None:
        wanted = _RELU_FUNCTIONS if options.which == "relu" else ACTIVATION_NAMES
        if name_of(node) not in wanted:
            return None
        reason = "functional: a call in a forward, not a module"
        return ActivationChange(_owner(facts, node), name_of(node), "leave", reason=reason)
    name, module = activation
    path, kind = join(facts.region.path, name), type(module).__name__
    wanted_kind = type(module) in RELU_FAMILY if options.which == "relu" else kind in REPLACEABLE
    if not wanted_kind:
        return None
    if has_forward_hooks(module):
        return ActivationChange(path, kind, "leave", reason="it has hooks")
    if options.replacement == "identity":
        return ActivationChange(path, kind, "replace", "identity")
    widths = {_width(facts, conv, call) for call in _calls_of(facts, module)}
    width = widths.pop() if len(widths) == 1 else None
    reason = "" if width else "one parameter: shared by calls of different or unknown widths"
    return ActivationChange(path, kind, "replace", options.replacement, width or 1, reason)


def _calls_of(facts: GraphFacts, activation: nn.Module) -> list[fx.Node]:
    return [node for node, (_, module) in facts.activations.items() if module is activation]


def _width(facts: GraphFacts, conv: fx.Node, node: fx.Node) -> int | None:
    known = facts.of[node].channels
    if known is None and producer(conv) is node:
        known = getattr(facts.module(conv), "in_channels", None)
    return known


def _owner(facts: GraphFacts, node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    owner = next(reversed(stack.values()), ("", None))[0] if stack else ""
    return join(facts.region.path, str(owner))


def build_activation(change: ActivationChange, slope: float, like: Tensor | None) -> nn.Module:
    """The module that takes the activation's place.

    Args:
        change: of action "replace".
        slope: where the negative slope starts.
        like: a tensor whose device and dtype the parameters take.
    """
    if change.replacement == "identity":
        return nn.Identity()
    layer: nn.Module
    if change.replacement == "prelu":
        layer = ChannelPReLU(change.channels, init=slope)
    else:
        layer = RPReLU(change.channels, slope)
    return layer if like is None else layer.to(like.device, like.dtype)
