"""Finding every convolution in a graph: a tracer that opens what it must, and regions.

The rule: a module is a leaf if and only if it is a convolution or contains none. A module whose
forward does not trace (data-dependent control flow) becomes one opaque node of its parent's graph,
and its children are traced by themselves, each a *region* of its own. The floor is the convolution,
so every convolution of every model is found. Knows torch.fx and nothing of binarization.
"""

from __future__ import annotations

import copy
import inspect
import operator
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from el_convert.errors import first_line

# Convolutions that are none of torch's classes.
_CONVOLUTION_CLASSES = {
    "timm.layers.cond_conv2d.CondConv2d",
    "el_convert.nn_timm.BinaryCondConv2d",
    "el_convert.packed.PackedConv",
}
CONVOLUTION_FUNCTIONS = frozenset(
    [*(f"conv{size}d" for size in (1, 2, 3)), *(f"conv_transpose{size}d" for size in (1, 2, 3))]
)
"""Functions of torch and torch.nn.functional that convolve."""
CALLED_AT = "el_convert_called_at"
"""Key in a node's meta: (path of the module in whose forward a function convolves, file:line)."""
_TORCH_HOME = str(Path(torch.__file__).parent) + os.sep  # torchvision does not begin so
_PRIMITIVES = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Region:
    """A module that was traced on its own.

    Attributes:
        path: qualified name in the model, "" for the model itself.
        module: the module.
        graph: its graph; None when its forward does not trace.
        opened: qualified names (in the model) of modules inside that do not trace, with why.
    """

    path: str
    module: nn.Module
    graph: fx.Graph | None
    opened: dict[str, str]


class _InPlaceProxy(fx.Proxy):
    """Records `x += y` as what it is; torch.fx would record a new sum, and other names of x lie."""


def _record_in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv"):
    setattr(_InPlaceProxy, f"__{_name}__", _record_in_place(getattr(operator, _name)))


class ConvTracer(fx.Tracer):
    """Traces through every module that holds a convolution; records what does not trace.

    Args:
        is_leaf: which modules become one node; by default convolutions and what holds none.
        keep_hooked: modules with forward hooks become one node as well, so that these still run.
        in_place: record `x += y` as a change of x, which it is for tensors.

    Attributes:
        opened: after `trace`, modules that became one opaque node although they hold
            convolutions, by qualified name, with the reason.
    """

    trace_asserts = True

    def __init__(
        self,
        is_leaf: Callable[[nn.Module], bool] | None = None,
        *,
        keep_hooked: bool = False,
        in_place: bool = False,
    ) -> None:
        super().__init__()
        self._proxy_class = _InPlaceProxy if in_place else fx.Proxy
        self._is_leaf = is_leaf
        self._keep_hooked = keep_hooked
        self._holders: set[int] = set()
        self.opened: dict[str, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self._is_leaf is not None:
            return self._is_leaf(m)
        return is_convolution(m) or id(m) not in self._holders

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        if "forward" in vars(root):  # torch.fx would read the class's
            raise TypeError("its forward was replaced on the instance")
        self._holders = {id(m) for m in root.modules() if holds_convolution(m)}
        return super().trace(root, _plain_defaults(root) | (concrete_args or {}))

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self.is_leaf_module(m, ""):
            return super().call_module(m, forward, args, kwargs)
        if self._keep_hooked and has_forward_hooks(m):
            return self._opaque(m, "it has hooks", args, kwargs)
        last, stack = next(iter(reversed(self.graph.nodes)), None), self.module_stack.copy()
        try:
            # m.forward, not m(...): a user's hooks must not run on proxies.
            return super().call_module(m, m.forward, args, kwargs)
        except Exception as error:  # whatever a forward raises on proxies: it does not trace
            if m is self.root:  # a model that calls itself
                raise
            self.module_stack = stack
            self._forget_since(last)
            return self._opaque(m, first_line(error), args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return self._proxy_class(node, self)

    def _opaque(self, m: nn.Module, reason: str, args: Any, kwargs: Any) -> fx.Proxy:
        path = self.path_of_module(m)
        self.opened[path] = reason
        return self.create_proxy("call_module", path, args, kwargs)

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        name = getattr(target, "__name__", "")
        if kind == "call_function" and name in CONVOLUTION_FUNCTIONS:
            proxy.node.meta[CALLED_AT] = (self.scope.module_path, _calling_line())
        return proxy

    def _forget_since(self, last: fx.Node | None) -> None:
        for node in list(reversed(self.graph.nodes)):
            if node is last:
                break
            if node.op != "get_attr":  # these stay: the tracer caches their proxies
                self.graph.erase_node(node)


def _calling_line() -> str:
    """The "file:line" that is being traced."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith((_TORCH_HOME, __file__)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def dotted_name(kind: type) -> str:
    """Module and name of a class, as in "timm.layers.std_conv.StdConv2d"."""
    return f"{kind.__module__}.{kind.__qualname__}"


def is_convolution(module: nn.Module | None) -> TypeGuard[_ConvNd]:
    """Whether a module is a convolution: torch's, a subclass, timm's CondConv2d, or a packed one.

    CondConv2d has the attributes of torch's classes except `transposed`, `output_padding` and
    `padding_mode`; a packed one has no `weight`.
    """
    return isinstance(module, _ConvNd) or dotted_name(type(module)) in _CONVOLUTION_CLASSES


def holds_convolution(module: nn.Module) -> bool:
    """Whether the module is a convolution or contains one."""
    return any(is_convolution(child) for child in module.modules())


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether anything is called before or after the module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_parameters(module: nn.Module) -> bool:
    """Whether anything in the module is learned."""
    return next(module.parameters(), None) is not None


def attribute(root: nn.Module, node: fx.Node) -> Any:
    """The value a `get_attr` node reads; None for other nodes."""
    if node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    return getattr(root.get_submodule(owner), name, None)  # constants of a trace are gone after it


def _plain_defaults(root: nn.Module) -> dict[str, Any]:
    """Default arguments as constants, so that `if mask is not None` takes the usual branch."""
    parameters = inspect.signature(type(root).forward).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.default is not p.empty and isinstance(p.default, _PRIMITIVES)
    }


@contextmanager
def same_attributes(model: nn.Module) -> Iterator[None]:
    """Every module gets back the attributes it had: forwards and tracers store things."""
    states = [(vars(module), vars(module).copy()) for module in model.modules()]
    try:
        yield
    finally:
        for state, before in states:
            state.clear()
            state.update(before)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Trace in eval mode without gradients.

    Modes, random state, and what a forward stores in its module come back as they were.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        with same_attributes(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            for module, _ in modes:
                # Not .eval(): some models override train() with side effects.
                module.training = False
            yield
    finally:
        for module, training in modes:
            module.training = training


def structure_copy(model: nn.Module) -> nn.Module:
    """A deep copy that shares every tensor: forwards may store proxies in it.

    Returns:
        The copy; the model itself where something in it refuses to be copied.
    """
    memo: dict[int, Any] = {}
    seen: set[int] = set()
    for module in model.modules():
        _share_tensors(vars(module), memo, seen)
    try:
        return copy.deepcopy(model, memo)
    except Exception:  # any attribute may refuse; the model then serves as its own copy
        return model


def _share_tensors(value: Any, memo: dict[int, Any], seen: set[int]) -> None:
    """Tell a deep copy to keep every tensor in nested plain containers."""
    if isinstance(value, torch.Tensor):
        memo[id(value)] = value
    elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
        seen.add(id(value))  # containers may hold themselves
        for part in value.values() if isinstance(value, dict) else value:
            _share_tensors(part, memo, seen)


def trace_regions(model: nn.Module) -> list[Region]:
    """Trace the model, and what does not trace or is not called, piece by piece.

    Args:
        model: any module; left as it was (modes, hooks, random state).

    Returns:
        The regions, the model itself first. Every convolution is in the graph of at least one
        region or is itself the path of a region without a graph.
    """
    with undisturbed(model):
        regions: list[Region] = []
        seen: set[int] = set()
        pending = [("", model)]
        while pending:
            regions.extend(_trace_from(pending, seen))
            pending = _topmost_unseen(model, seen)
        return regions


def _trace_from(pending: list[tuple[str, nn.Module]], seen: set[int]) -> Iterator[Region]:
    """Trace each pending module, then the children of what did not trace."""
    while pending:
        path, module = pending.pop(0)
        if id(module) in seen or not holds_convolution(module):
            continue
        region = _trace_one(path, module)
        yield region
        _mark_seen(region, seen)
        failed = [path] if region.graph is None else region.opened
        for name in failed:
            inner = module.get_submodule(_relative(name, path))
            seen.add(id(inner))
            children = inner.named_children()
            pending.extend((join(name, child), part) for child, part in children)


def _trace_one(path: str, module: nn.Module) -> Region:
    if is_convolution(module):
        return Region(path, module, None, {})
    tracer = ConvTracer()
    try:
        graph = tracer.trace(module)
    except Exception as error:  # the region's own forward does not trace: recorded, then opened
        return Region(path, module, None, {path: first_line(error)})
    opened = {join(path, name): reason for name, reason in tracer.opened.items()}
    return Region(path, module, graph, opened)


def _mark_seen(region: Region, seen: set[int]) -> None:
    seen.add(id(region.module))
    for node in region.graph.nodes if region.graph else ():
        if node.op == "call_module":
            seen.add(id(region.module.get_submodule(node.target)))


def _topmost_unseen(model: nn.Module, seen: set[int]) -> list[tuple[str, nn.Module]]:
    """The largest modules all of whose convolutions were never called (auxiliary heads)."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        convs = [m for m in module.modules() if is_convolution(m)]
        inside = any(path.startswith(f"{taken}.") for taken, _ in found)
        called = id(module) in seen or any(id(conv) in seen for conv in convs)
        if convs and not inside and not called:
            found.append((path, module))
    return found


def join(parent: str, child: str) -> str:
    """Qualified name of a child; the model itself has the name ""."""
    return f"{parent}.{child}" if parent and child else parent or child


def _relative(path: str, parent: str) -> str:
    return path[len(parent) :].lstrip(".") if parent else path
