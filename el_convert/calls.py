"""Convolutions that are calls in a forward (`F.conv2d(x, self.weight)`), not modules.

No swap of modules reaches them, so they are found and named: in the traced graphs, and where
nothing was traced in the bytecode.
"""

from __future__ import annotations

import bisect
import dis
import inspect
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx, nn

from el_convert.tracing import (
    CALLED_AT,
    CONVOLUTION_FUNCTIONS,
    ConvTracer,
    Region,
    attribute,
    has_parameters,
    holds_convolution,
    join,
)


@dataclass(frozen=True)
class FunctionalConv:
    """A call of a convolution function with weights that are learned.

    Attributes:
        path: qualified name of the module in whose forward it stands, "" for the model itself.
        owner: class name of that module.
        function: such as "conv2d".
        where: "net.py:12", file and line.
    """

    path: str
    owner: str
    function: str
    where: str

    def __str__(self) -> str:
        return f"{self.path or 'the model'} ({self.owner}): {self.function} at {self.where}"


def find_functional(model: nn.Module, regions: Iterable[Region]) -> tuple[FunctionalConv, ...]:
    """Every functional convolution whose weights are, or may be, learned.

    Fixed filters, as in anti-aliasing, are none: no training could make up for their signs.

    Args:
        model: the model the regions are of.
        regions: from `trace_regions`.
    """
    found: list[FunctionalConv] = []
    untraced: dict[str, nn.Module] = {}
    for region in regions:
        found += _in_graph(region)
        untraced |= {path: model.get_submodule(path) for path in region.opened}
    for path, module in untraced.items():
        found += _in_code(path, module)
    for path, module in _unopened(model):
        found += _in_unopened(path, module)
    return tuple(dict.fromkeys(found))


def _in_graph(region: Region) -> Iterator[FunctionalConv]:
    for node in region.graph.nodes if region.graph else ():
        if CALLED_AT in node.meta and has_learned_weight(region.module, node):
            inner, where = node.meta[CALLED_AT]
            owner = type(region.module.get_submodule(inner)).__name__
            name = str(node.target.__name__)
            yield FunctionalConv(join(region.path, inner), owner, name, where)


def has_learned_weight(root: nn.Module, node: fx.Node) -> bool:
    """Whether anything but buffers and constants goes into the weight of a function's call.

    Args:
        root: the module that was traced.
        node: a call of a function of (input, weight, ...).
    """
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    stack, done = [weight] if isinstance(weight, fx.Node) else [], set[fx.Node]()
    while stack:
        value = stack.pop()
        if value.op == "placeholder" or isinstance(attribute(root, value), nn.Parameter):
            return True
        if value.op == "call_module" and has_parameters(root.get_submodule(str(value.target))):
            return True
        stack.extend(set(value.all_input_nodes) - done)
        done.add(value)
    return False


def _unopened(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The largest modules that hold no convolution but code that calls one."""
    taken: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") or not outer for outer in taken)
        if inside or holds_convolution(module):
            continue
        if has_parameters(module) and any(_mentions(part) for part in module.modules()):
            taken.append(path)
            yield path, module


def _in_unopened(path: str, module: nn.Module) -> list[FunctionalConv]:
    tracer = ConvTracer(is_leaf=lambda m: not any(map(_mentions, m.modules())))
    try:
        graph = tracer.trace(module)
    except Exception:  # its forward does not trace: what its code says must do
        return [
            call
            for name, part in module.named_modules()
            for call in _in_code(join(path, name), part)
        ]
    opened = {join(path, name): module.get_submodule(name) for name in tracer.opened}
    unread = [call for name, part in opened.items() for call in _in_code(name, part)]
    return [*_in_graph(Region(path, module, graph, {})), *unread]


def _in_code(path: str, module: nn.Module) -> Iterator[FunctionalConv]:
    for name, where in _mentions(module):
        yield FunctionalConv(path, type(module).__name__, name, where)


def _mentions(module: nn.Module) -> list[tuple[str, str]]:
    """(function, "file:line") for every convolution function in the module's methods."""
    methods: dict[str, list[Any]] = {"forward": [vars(module).get("forward")]}
    for kind in type(module).__mro__:
        if kind.__module__.partition(".")[0] not in ("torch", "builtins"):
            for name, method in vars(kind).items():
                if name not in methods or _calls_super(methods[name][-1]):
                    methods.setdefault(name, []).append(method)
    seen: set[types.CodeType] = set()
    every = (method for versions in methods.values() for method in versions)
    found = [hit for method in every for hit in _in_function(method, seen)]
    # `self.conv2d(x)` calls a module of that name.
    return [hit for hit in found if not hasattr(module, hit[0])]


def _calls_super(method: Any) -> bool:
    code = getattr(method, "__code__", None)
    return code is None or "super" in code.co_names


def _in_function(function: Any, seen: set[types.CodeType]) -> Iterator[tuple[str, str]]:
    function = inspect.unwrap(getattr(function, "__func__", function))
    if isinstance(function, types.FunctionType):
        yield from _in_bytecode(function.__code__, function.__globals__, seen)


def _in_bytecode(
    code: types.CodeType, scope: dict[str, Any], seen: set[types.CodeType]
) -> Iterator[tuple[str, str]]:
    if code in seen:
        return
    seen.add(code)
    named = {name: _function_name(name, scope) for name in code.co_names}
    if any(named.values()):
        starts = [(offset, line) for offset, line in dis.findlinestarts(code) if line]
        for step in dis.get_instructions(code):
            if step.opname.startswith("LOAD_") and named.get(step.argval):
                line = starts[bisect.bisect_right(starts, (step.offset, 1 << 30)) - 1][1]
                yield named[step.argval], f"{Path(code.co_filename).name}:{line}"
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):  # lambdas, comprehensions, functions inside
            yield from _in_bytecode(inner, scope, seen)
    for name in code.co_names:
        helper = scope.get(name)
        if isinstance(helper, types.FunctionType) and not helper.__module__.startswith("torch."):
            yield from _in_function(helper, seen)


def _function_name(name: str, scope: dict[str, Any]) -> str:
    """The convolution function that a name in a code means; "" for any other."""
    real = getattr(scope.get(name), "__name__", name)  # imported under another name
    return real if real in CONVOLUTION_FUNCTIONS and not inspect.isclass(scope.get(name)) else ""
