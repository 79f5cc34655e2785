"""What each value of a traced graph is, one pass in order: pooled, non-negative, channels, depth.

Structural: no input size is needed and nothing is run. A fact that cannot be proved is reported
as its harmless value (not pooled, not non-negative, channels unknown).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvTransposeNd

from el_convert.calls import has_learned_weight
from el_convert.tracing import CONVOLUTION_FUNCTIONS, Region, holds_convolution, is_convolution

RELU_FAMILY = (nn.ReLU, nn.ReLU6)
_NON_NEGATIVE_MODULES = (*RELU_FAMILY, nn.Sigmoid, nn.Softmax, nn.Hardsigmoid, nn.Softplus)
_RELU_NAMES = {"relu", "relu_", "relu6"}
_NON_NEGATIVE_NAMES = _RELU_NAMES | {"sigmoid", "sigmoid_", "softmax", "hardsigmoid", "softplus"}
ACTIVATION_NAMES = _RELU_NAMES | {
    "celu", "elu", "gelu", "hardswish", "hardtanh", "leaky_relu", "mish", "selu", "silu", "tanh",
}  # fmt: skip
_SHAPE_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "is_cuda", "requires_grad"}
_SHAPE_METHODS = {"size", "dim", "numel", "new_zeros", "new_ones", "new_empty", "new_full"}
_SPATIAL_DIMS = ({2, 3}, {-2, -1}, {2, 3, 4}, {-3, -2, -1})
_GLOBAL_POOLS = ("AdaptiveAvgPool", "AdaptiveMaxPool", "SelectAdaptivePool")
_MIXING_NAMES = CONVOLUTION_FUNCTIONS | {"linear"}
_SPREADING = {"interpolate", "upsample", "expand", "expand_as", "repeat", "matmul", "bmm", "einsum"}
# What keeps both the sign pattern's origin and the channels: walked through towards activations.
_SAME_CHANNELS_NAMES = {
    "add", "iadd", "mul", "imul", "sub", "truediv", "div", "relu", "relu_", "relu6", "silu", "gelu",
    "hardswish", "hardsigmoid", "sigmoid", "leaky_relu", "tanh", "dropout", "max_pool1d",
    "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d",
    "boolean_dispatch", "contiguous", "clone", "interpolate",
}  # fmt: skip


@dataclass
class NodeFacts:
    """What is known of one value.

    Attributes:
        ancestors: bit set of the positions of all values it is computed from.
        depth: number of convolutions on the longest way from an input.
        pooled: its map is one pixel.
        nonnegative: it cannot be below 0.
        channels: its size along dimension 1 of an (N, C, ...) layout; None when unknown.
    """

    ancestors: int = 0
    depth: int = 0
    pooled: bool = False
    nonnegative: bool = False
    channels: int | None = None


@dataclass
class GraphFacts:
    """Facts of every node of a region's graph.

    Attributes:
        region: what was traced.
        position: index of each node in the graph.
        of: facts of each node.
        activations: nodes whose module is, or ends in, an activation: (qualified name in the
            region, the activation).
    """

    region: Region
    position: dict[fx.Node, int] = field(default_factory=dict)
    of: dict[fx.Node, NodeFacts] = field(default_factory=dict)
    activations: dict[fx.Node, tuple[str, nn.Module]] = field(default_factory=dict)
    _modules: dict[fx.Node, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, node in enumerate(self.region.graph.nodes if self.region.graph else ()):
            self.position[node] = index
            if node.op == "call_module":
                self._modules[node] = self.region.module.get_submodule(str(node.target))
            self.of[node] = self._gather(node)

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module a node calls; None for other nodes."""
        return self._modules.get(node)

    def is_ancestor(self, older: fx.Node, newer: fx.Node) -> bool:
        """Whether `newer` is computed from `older`."""
        return bool(self.of[newer].ancestors >> self.position[older] & 1)

    def mixes(self, node: fx.Node) -> bool:
        """Whether a node applies learned weights across channels (convolution, linear, ...)."""
        module = self.module(node)
        if module is not None:
            return _mixes_channels(module)
        function = name_of(node) in _MIXING_NAMES
        return function and has_learned_weight(self.region.module, node)

    def _gather(self, node: fx.Node) -> NodeFacts:
        inputs = tensor_inputs(node)
        known = [self.of[value] for value in inputs]
        facts = NodeFacts()
        for value, fact in zip(inputs, known, strict=True):
            facts.ancestors |= fact.ancestors | 1 << self.position[value]
            facts.depth = max(facts.depth, fact.depth)
        module = self.module(node)
        facts.depth += module is not None and holds_convolution(module)
        facts.pooled = _is_pooled(node, module, known)
        final = final_activation(str(node.target), module) if module is not None else None
        if final is not None:
            self.activations[node] = final
        facts.nonnegative = _is_nonnegative(node, module, final, known)
        facts.channels = _channels(node, module, known)
        return facts


def _mixes_channels(module: nn.Module) -> bool:
    return holds_convolution(module) or any(p.dim() > 1 for p in module.parameters())


def name_of(node: fx.Node) -> str:
    """Name of the function or method a node calls, without a namespace."""
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The values a node computes from; none for nodes that only read a shape or a dtype."""
    return [] if reads_shape(node) else list(node.all_input_nodes)


def reads_shape(node: fx.Node) -> bool:
    """Whether a node reads no values, only a shape, a dtype or a device."""
    if node.op == "call_function" and name_of(node) == "getattr":
        return node.args[1] in _SHAPE_ATTRIBUTES
    return node.op == "call_method" and node.target in _SHAPE_METHODS


def final_activation(path: str, module: nn.Module) -> tuple[str, nn.Module] | None:
    """The activation a convolution-free module ends in: itself, a Sequential's last, or `.act`.

    Returns:
        (qualified name, activation) or None. timm's norm-and-activation layers hold theirs
        as `act`.
    """
    if is_activation(module):
        return path, module
    if isinstance(module, nn.Sequential):
        for name, child in reversed(list(module.named_children())):
            if not isinstance(child, (nn.Identity, nn.Dropout)):
                return final_activation(f"{path}.{name}", child)
    act = getattr(module, "act", None)
    if isinstance(act, nn.Module) and is_norm(module) and is_activation(act):
        return f"{path}.act", act
    return None


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an element-wise activation of torch or timm."""
    kind = type(module)
    if kind is nn.Identity or any(module.children()):
        return False
    home = kind.__module__
    return home.startswith(("torch.nn.modules.activation", "timm.layers.activations")) and (
        not isinstance(module, (nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax))
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of torch, timm or the user, with or without an activation."""
    return "Norm" in type(module).__name__


def _is_pooled(node: fx.Node, module: nn.Module | None, inputs: list[NodeFacts]) -> bool:
    if module is not None and type(module).__name__.startswith(_GLOBAL_POOLS):
        return _all_ones(getattr(module, "output_size", 1) or 1)
    name = name_of(node)
    if name in ("adaptive_avg_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool1d"):
        return _all_ones(_argument(node, 1, "output_size"))
    if name in ("mean", "amax", "amin", "sum") and _dims(node) in _SPATIAL_DIMS:
        return True
    if name in ("avg_pool2d", "boolean_dispatch", "max_pool2d"):
        size = _argument(node, 1, "kernel_size")
        if isinstance(size, fx.Node) or _holds_node(size):  # F.avg_pool2d(x, x.shape[2:])
            return True
    if name in _SPREADING or isinstance(module, (nn.Upsample, _ConvTransposeNd)):
        return False
    return bool(inputs) and all(fact.pooled for fact in inputs)


def _is_nonnegative(
    node: fx.Node,
    module: nn.Module | None,
    activation: tuple[str, nn.Module] | None,
    inputs: list[NodeFacts],
) -> bool:
    name = name_of(node)
    if activation is not None:
        return isinstance(activation[1], _NON_NEGATIVE_MODULES)
    if module is not None:
        keeps = "Pool" in type(module).__name__ or isinstance(module, (nn.Dropout, nn.Identity))
        return keeps and all(fact.nonnegative for fact in inputs)
    if name in _NON_NEGATIVE_NAMES:
        return True
    keeps = name in _SAME_CHANNELS_NAMES | {"cat", "chunk", "getitem", "view", "reshape", "flatten"}
    loses = name in ("sub", "silu", "gelu", "hardswish", "leaky_relu", "tanh")
    return keeps and not loses and bool(inputs) and all(fact.nonnegative for fact in inputs)


def _channels(node: fx.Node, module: nn.Module | None, inputs: list[NodeFacts]) -> int | None:
    if is_convolution(module):
        return module.out_channels
    first = next((fact.channels for fact in inputs if fact.channels), None)
    if module is not None:
        return (
            None
            if _mixes_channels(module) or type(module).__name__ in ("Flatten", "PixelShuffle")
            else first
        )
    name = name_of(node)
    if name == "cat" and _argument(node, 1, "dim") == 1:
        parts = [fact.channels for fact in inputs]
        return sum(c for c in parts if c) if all(parts) else None
    return first if name in _SAME_CHANNELS_NAMES else None


def _argument(node: fx.Node, index: int, name: str) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def _dims(node: fx.Node) -> set[int]:
    dims = _argument(node, 1, "dim")
    # A single dimension leaves a line of a map, not a pixel.
    return set(dims) if isinstance(dims, (tuple, list)) else set()


def _all_ones(size: Any) -> bool:
    sizes = size if isinstance(size, (tuple, list, torch.Size)) else (size,)
    return all(one == 1 for one in sizes)


def _holds_node(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and any(isinstance(part, fx.Node) for part in value)


def visit(starts: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> None:
    """Depth-first walk; `step` handles a node once and returns where to go on."""
    stack, done = list(starts), set[fx.Node]()
    while stack:
        node = stack.pop()
        if node not in done:
            done.add(node)
            stack.extend(step(node))
