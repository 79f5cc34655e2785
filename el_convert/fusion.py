"""Fusing what surrounds packed convolutions into them: norms, activations, residual sums.

Works block by block: the largest modules below the model that trace become GraphModules of the
same name, so the model keeps its class, its methods and the names of its layers.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from el_convert.convert import exchange
from el_convert.graphs import trace_module
from el_convert.packed import PackedConv
from el_convert.stem import StemTail, poolable
from el_convert.tail import foldable, tail_of
from el_convert.tracing import has_forward_hooks, same_attributes, structure_copy

_LEAVES = (PackedConv, fx.GraphModule)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
TAIL_TENSORS = ("slope", "shift_in", "shift_out")
_SUMS = {operator.add, operator.iadd, torch.add}
_IN_PLACE_SUMS = {operator.iadd, "add_"}
_IN_PLACE_OPERATORS = {"iadd", "isub", "imul", "itruediv", "setitem"}
_SUM_METHODS = {"add", "add_"}
_RELU_FUNCTIONS = {F.relu, torch.relu, torch.relu_, F.relu_}
# Norms of timm that hold a dropout and an activation.
_NORM_ACTS = {"BatchNormAct2d", "SyncBatchNormAct"}
_TYPE_QUESTIONS = {"isinstance", "is_tensor", "type"}
_NOTHING_IN_EVAL = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d)
_NOTHING_BY_NAME = {"DropPath", "StochasticDepth", "DropBlock2d"}


def fuse_blocks(model: nn.Module) -> None:
    """Rewrite a packed model's blocks in place; what does not trace stays as it is.

    Args:
        model: in eval mode; its binary convolutions are `PackedConv`.
    """
    uses = Counter(
        id(module) for _, module in model.named_modules(remove_duplicate=False)
    )  # a layer under two names may be called from anywhere
    new: dict[int, nn.Module] = {}
    _fuse_children(model, uses, new)
    exchange(model, new)
    exchange(model, _folded(model, uses))


def _fuse_children(parent: nn.Module, uses: Counter[int], new: dict[int, nn.Module]) -> None:
    """The outermost modules that are no plain containers; those inside where these do not trace."""
    for child in parent.children():
        if isinstance(child, PackedConv) or id(child) in new or not _holds_packed(child):
            continue
        graph = None if type(child) in _CONTAINERS else _fused(child, uses)
        if graph is None:
            _fuse_children(child, uses, new)
        else:
            new[id(child)] = graph


def _folded(model: nn.Module, uses: Counter[int]) -> dict[int, nn.Module]:
    """Norms that the model itself calls after packed layers, folded: nothing is left to do."""
    twin = structure_copy(model)
    with same_attributes(twin):
        graph = trace_module(twin, lambda m: isinstance(m, _LEAVES) or not _holds_packed(m))
    if isinstance(graph, str):
        return {}
    return _Fuser(graph, model, uses).fold_norms()


def _holds_packed(module: nn.Module) -> bool:
    return any(isinstance(part, PackedConv) for part in module.modules())


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, PackedConv) or not _holds_packed(module)


def _fused(block: nn.Module, uses: Counter[int]) -> nn.Module | None:
    """The block as a graph with everything fused that can be; None where nothing can."""
    if has_forward_hooks(block) or _has_options(block):
        return None
    with same_attributes(block):
        graph = trace_module(block, _is_leaf)
    if isinstance(graph, str):
        return None
    if not _Fuser(graph, block, uses).run():
        return None
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def _has_options(block: nn.Module) -> bool:
    """Whether its forward can be called in several ways, of which a graph holds one."""
    parameters = inspect.signature(block.forward).parameters.values()
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(p.default is not p.empty or p.kind in several for p in parameters):
        return True
    opened = (type(part).forward for part in block.modules() if not _is_leaf(part))
    codes = (getattr(forward, "__code__", None) for forward in opened)
    return any(code is None or _TYPE_QUESTIONS & set(code.co_names) for code in codes)


class _Fuser:
    """Fuses within one graph. A node is fused if it is all that reads the one before it."""

    def __init__(self, graph: fx.GraphModule, origin: nn.Module, uses: Counter[int]) -> None:
        self.module = graph
        self.origin = origin
        self.graph = graph.graph
        self._fused = False
        calls = Counter(node.target for node in self.graph.nodes if node.op == "call_module")
        self._single = {
            target
            for target, count in calls.items()
            if count == 1 and uses[id(origin.get_submodule(str(target)))] == 1
        }

    def run(self) -> bool:
        """Whether anything was fused."""
        self._drop_nothings()
        for node in list(self.graph.nodes):
            conv = self._called(node)
            if isinstance(conv, PackedConv) and node.target in self._single and not node.kwargs:
                self._absorb(node, conv)
        return self._fused

    def fold_norms(self) -> dict[int, nn.Module]:
        """Fold what can be into the origin's layers; what takes each one's place, by id."""
        new: dict[int, nn.Module] = {}
        for node in list(self.graph.nodes):
            norm = self._once(node)
            if norm is None or not _is_batch_norm(norm):
                continue
            before = node.args[0] if len(node.args) == 1 else None
            conv = self._once(before) if isinstance(before, fx.Node) else None
            if isinstance(conv, PackedConv):
                if _only_user(before) is node and _foldable_after(norm, conv):  # type: ignore[arg-type]
                    conv.fold(norm)
                    held = type(norm).__name__ in _NORM_ACTS
                    new[id(norm)] = norm.get_submodule("act") if held else nn.Identity()
            else:
                new |= self._stem(node, norm)
        return new

    def _once(self, node: fx.Node | None) -> Any:
        """The origin's module that a node calls, where nothing else does and it has no hooks."""
        if node is None or node.op != "call_module" or node.target not in self._single:
            return None
        module = self.origin.get_submodule(str(node.target))
        return None if has_forward_hooks(module) else module

    def _stem(self, node: fx.Node, norm: Any) -> dict[int, nn.Module]:
        """A float norm with the activation and pooling after it, done in the last one's place."""
        chain: list[nn.Module] = [norm]
        held = type(norm).__name__ in _NORM_ACTS
        act, last = (norm.act, node) if held else self._next(node)
        tail = tail_of(act)
        if tail is None or last is None or not isinstance(norm, nn.BatchNorm2d):
            return {}
        if tail.slope is not None and tail.slope.numel() not in (1, norm.num_features):
            return {}
        chain += [] if held else [act]
        pool, _ = self._next(last)
        chain += [pool] if poolable(pool) else []
        new: dict[int, nn.Module] = {id(module): nn.Identity() for module in chain}
        new[id(chain[-1])] = StemTail(norm, act, pool if poolable(pool) else None).eval()
        return new

    def _next(self, node: fx.Node) -> tuple[Any, fx.Node | None]:
        user = _only_user(node)
        return self._once(user), user

    def _called(self, node: fx.Node) -> nn.Module | None:
        if node.op != "call_module":
            return None
        module = self.module.get_submodule(str(node.target))
        return None if has_forward_hooks(module) else module

    def _drop_nothings(self) -> None:
        for node in list(self.graph.nodes):
            module = self._called(node)
            if does_nothing(module) and len(node.args) == 1:
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)

    def _absorb(self, node: fx.Node, conv: PackedConv) -> None:
        """Norm, then a sum and an activation in either order."""
        self._absorb_norm(node, conv)
        if not self._absorb_sum(node, conv, last=False):
            if self._absorb_activation(node, conv):
                self._absorb_sum(node, conv, last=True)
            return
        self._absorb_activation(node, conv)

    def _absorb_norm(self, node: fx.Node, conv: PackedConv) -> None:
        user = _only_user(node)
        norm = None if user is None else self._called(user)
        if user is None or user.target not in self._single or not _foldable_after(norm, conv):
            return
        self._fused = True
        conv.fold(norm)  # type: ignore[arg-type]
        if type(norm).__name__ in _NORM_ACTS and not does_nothing(norm.act):  # type: ignore[union-attr]
            with self.graph.inserting_before(user):
                act = self.graph.call_module(f"{user.target}.act", (node,))
            user.replace_all_uses_with(act)
        else:
            user.replace_all_uses_with(node)
        self.graph.erase_node(user)

    def _absorb_sum(self, node: fx.Node, conv: PackedConv, *, last: bool) -> bool:
        user = _only_user(node)
        if user is None or not _is_sum(user):
            return False
        other = user.args[1] if user.args[0] is node else user.args[0]
        if not isinstance(other, fx.Node) or other is node:
            return False
        # What is summed into another map in place may be read there under its old name.
        if user.args[0] is other and user.target in _IN_PLACE_SUMS:
            return False
        if not self._can_wait(node, user):
            return False
        self._fused = True
        # The sum may be of something that is computed after the convolution.
        user.prepend(node)
        for name in TAIL_TENSORS:
            if isinstance(node.kwargs.get(name), fx.Node):
                node.prepend(node.kwargs[name])  # type: ignore[arg-type]
        node.kwargs = {**node.kwargs, "residual": other}
        conv.tail = replace(conv.tail, residual_last=last)
        user.replace_all_uses_with(node)
        self.graph.erase_node(user)
        return True

    def _can_wait(self, node: fx.Node, until: fx.Node) -> bool:
        """Whether a node can be computed later: nothing in between changes its input in place."""
        while (node := node.next) is not until:
            module = self._called(node)
            parts = [] if module is None else module.modules()
            name = getattr(node.target, "__name__", str(node.target))
            changes = any(getattr(part, "inplace", False) for part in parts)
            if node.op in ("call_function", "call_method"):
                changes = name.endswith("_") or name in _IN_PLACE_OPERATORS
                changes = changes or bool(node.kwargs.get("inplace"))
            if changes:
                return False
        return True

    def _absorb_activation(self, node: fx.Node, conv: PackedConv) -> bool:
        user = _only_user(node)
        if user is None:
            return False
        act = self._called(user)
        if user.target in _RELU_FUNCTIONS or (user.op, user.target) == ("call_method", "relu"):
            conv.tail = replace(conv.tail, activation="clamp", low=0.0, high=float("inf"))
        elif (tail := tail_of(act)) is None:
            return False
        else:
            slope = tail.slope
            if slope is not None and slope.numel() not in (1, conv.out_channels):
                return False
            names = [n for n in TAIL_TENSORS if getattr(tail, n) is not None]
            self._pass_tensors(node, user, names)
            conv.tail = replace(conv.tail, activation=tail.activation, low=tail.low, high=tail.high)
        self._fused = True
        user.replace_all_uses_with(node)
        self.graph.erase_node(user)
        return True

    def _pass_tensors(self, node: fx.Node, act: fx.Node, names: list[str]) -> None:
        # PReLU's slope is its weight.
        attributes = {name: name for name in names} | (
            {"slope": "weight"} if len(names) == 1 else {}
        )
        with self.graph.inserting_before(node):
            tensors = {
                name: self.graph.get_attr(f"{act.target}.{attributes[name]}") for name in names
            }
        node.kwargs = {**node.kwargs, **tensors}


def does_nothing(module: Any) -> bool:
    """Whether a module gives its input back, in eval mode."""
    # Not isinstance: subclasses may compute anything.
    return type(module) in _NOTHING_IN_EVAL or type(module).__name__ in _NOTHING_BY_NAME


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op != "output" else None


def _is_sum(node: fx.Node) -> bool:
    known = (node.op == "call_function" and node.target in _SUMS) or (
        node.op == "call_method" and node.target in _SUM_METHODS
    )
    return known and len(node.args) == 2 and not node.kwargs


def _foldable_after(norm: nn.Module | None, conv: PackedConv) -> bool:
    if conv.norm is not None or conv.norm_scale is not None:
        return False
    after_norm = conv.link is not None and conv.recipe.link.place == "after-norm"
    return not after_norm and _is_batch_norm(norm)


def _is_batch_norm(norm: nn.Module | None) -> bool:
    """Of torch's own classes or timm's, with statistics; a subclass may compute anything."""
    plain = type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return foldable(norm) and (plain or type(norm).__name__ in _NORM_ACTS)
