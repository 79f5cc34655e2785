"""What packed layers some modules call in turn, and whether that is still so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch.nn.modules.module as torch_module
from torch import Tensor, fx, nn

from el_convert.fast_path import is_vector
from el_convert.fusion import TAIL_TENSORS, does_nothing
from el_convert.kernels.version import Marks
from el_convert.packed import PackedConv
from el_convert.tail import Tail

_SEQUENTIALS = ("Sequential", "PackedSequential")  # subclasses may compute anything
_VECTORS = ("scale", "bias", "norm_scale", "norm_shift")
_GLOBAL_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)

Attribute = tuple[dict[str, Any], str]


@dataclass(frozen=True)
class Call:
    """A layer's call. Values are numbered: 0 is the input, n + 1 what call n gives.

    Attributes:
        layer: what is called.
        input: the value it is called with.
        residual: the value it adds, or None.
        tensors: where its activation's tensors are: slope, shift_in, shift_out.
    """

    layer: PackedConv
    input: int
    residual: int | None
    tensors: dict[str, Attribute]

    def tail(self) -> Tail:
        """The layer's tail, but for the residual."""
        owners = self.tensors
        if not owners and self.residual is None:
            return self.layer.tail
        return self.layer.tail.given(
            None, *(owners[n][0][owners[n][1]] if n in owners else None for n in TAIL_TENSORS)
        )


@dataclass
class Layout:
    """Calls that follow each other, and all that this depends on.

    Attributes:
        calls: in order; the last one's value is the output.
        whole: whether these are all that the modules do.
    """

    calls: list[Call] = field(default_factory=list)
    whole: bool = False
    _owners: list[dict[str, Any]] = field(default_factory=list)
    _names: list[str] = field(default_factory=list)
    _values: list[Any] = field(default_factory=list)
    _sizes: list[tuple[dict[str, Any], int]] = field(default_factory=list)
    _hooks: list[Any] = field(default_factory=lambda: list(_GLOBAL_HOOKS))
    _tensors: list[Tensor] = field(default_factory=list)
    _copied: list[int] = field(default_factory=list)
    _marks: Marks = field(default_factory=lambda: Marks([]))

    @property
    def channels(self) -> int:
        """Of the input."""
        return self.calls[0].layer.in_channels

    def holds(self) -> bool:
        """Whether no module and no tensor was exchanged or changed since."""
        now = list(map(dict.get, self._owners, self._names))
        return (
            same_objects(now, self._values)
            and self._marks.hold(self._tensors)
            and all(len(parts) == count for parts, count in self._sizes)
        )

    def hooked(self) -> bool:
        """Whether anything is called before or after a module's forward."""
        return any(self._hooks)

    def watch(self, owner: dict[str, Any], *names: str, channels: int = 0) -> None:
        """Remember what an object's attributes are now.

        Args:
            owner: of the attributes.
            names: theirs.
            channels: that tensors have which the engine reads where they lie.
        """
        for name in names:
            value = owner.get(name)
            self._owners.append(owner)
            self._names.append(name)
            self._values.append(value)
            if isinstance(value, Tensor):
                if not is_vector(value, channels):
                    self._copied.append(len(self._tensors))
                self._tensors.append(value)

    def watch_module(self, module: nn.Module, hooks: bool) -> None:
        """Remember a module's parts and mode, and look at its hooks later on."""
        self.watch(module.__dict__, "training", "forward")
        if isinstance(module, fx.GraphModule):
            self.watch(module.__dict__, "_code")
        self.watch(module._modules, *module._modules)
        self._sizes.append((module._modules, len(module._modules)))
        if hooks:
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]

    def close(self, value: int | None) -> Layout:
        """End with the value that is the modules' output; None where there is more than calls."""
        self.whole = value is not None and 0 < value == len(self.calls)
        self._marks = Marks(self._tensors, self._copied)
        return self


def same_objects(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two sequences hold the same objects."""
    return len(one) == len(other) and all(map(is_, one, other))


def lay_out(modules: Sequence[nn.Module], *, entered: bool = False) -> Layout:
    """The calls of modules one after the other, as far as they are of packed layers alone.

    Args:
        modules: the output of each is the input of the next.
        entered: whether the one module was called already, and its hooks with it.
    """
    layout = Layout()
    value: int | None = 0
    for module in modules:
        value = None if value is None else _walk(module, value, layout, hooks=not entered)
    return layout.close(value)


def _walk(module: nn.Module, value: int, layout: Layout, *, hooks: bool = True) -> int | None:
    """Add a module's calls; gives the value that it returns."""
    if not _runs_as_written(module, layout, hooks):
        return None
    if type(module) is PackedConv:
        return _call(layout, Call(module, value, None, {}))
    if isinstance(module, fx.GraphModule):
        return _walk_graph(module, value, layout)
    if isinstance(module, nn.Sequential) and type(module).__name__ in _SEQUENTIALS:
        given: int | None = value
        for part in module:
            given = None if given is None else _walk(part, given, layout)
        return given
    return value if does_nothing(module) else None


def _runs_as_written(module: nn.Module, layout: Layout, hooks: bool) -> bool:
    """Whether a module is in eval mode with its class's forward; it is watched from now on."""
    layout.watch_module(module, hooks)
    return not module.training and "forward" not in module.__dict__


def _call(layout: Layout, call: Call) -> int:
    layer = call.layer
    channels = layer.out_channels
    layout.watch(layer._buffers, "bits")
    layout.watch(layer._buffers, "threshold", channels=layer.in_channels)
    layout.watch(layer._buffers, *_VECTORS, channels=channels)
    layout.watch(layer.__dict__, "tail")
    link = layer._modules["link"]
    if link is not None:
        layout.watch_module(link, hooks=True)
        layout.watch(link._parameters, "gamma", channels=channels)
        layout.watch(link._buffers, "gamma", channels=channels)
    for kind, (owner, name) in call.tensors.items():
        # The engine has another sign of what is taken away.
        layout.watch(owner, name, channels=0 if kind == "shift_in" else channels)
    layout.calls.append(call)
    return len(layout.calls)


def _walk_graph(module: fx.GraphModule, value: int, layout: Layout) -> int | None:
    values: dict[fx.Node, int] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            if values or node.args:  # one argument, without a default
                return None
            values[node] = value
        elif node.op == "call_module":
            given = _walk_node(module, node, values, layout)
            if given is None:
                return None
            values[node] = given
        elif node.op == "output":
            return _value(node.args[0], values)
        elif node.op != "get_attr":
            return None
    return None


def _value(argument: Any, values: dict[fx.Node, int]) -> int | None:
    return values.get(argument) if isinstance(argument, fx.Node) else None


def _walk_node(
    module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, int], layout: Layout
) -> int | None:
    called = module.get_submodule(str(node.target))
    value = _value(node.args[0], values) if len(node.args) == 1 else None
    if value is None:
        return None
    if not node.kwargs:
        return _walk(called, value, layout)
    if not _runs_as_written(called, layout, hooks=True) or type(called) is not PackedConv:
        return None
    given: dict[str, Any] = dict(node.kwargs)
    residual = given.pop("residual", None)
    at = _value(residual, values)
    tensors = dict(_attributes(module, given))
    if (residual is not None and at is None) or len(tensors) != len(given):
        return None
    return _call(layout, Call(called, value, at, tensors))


def _attributes(module: fx.GraphModule, given: dict[str, Any]) -> Iterator[tuple[str, Attribute]]:
    """Where the tensors that a graph passes to a layer are kept."""
    for name, node in given.items():
        if name not in TAIL_TENSORS or not isinstance(node, fx.Node) or node.op != "get_attr":
            continue
        path, _, attribute = str(node.target).rpartition(".")
        owner = module.get_submodule(path)
        for place in (owner._parameters, owner._buffers):
            if place.get(attribute) is not None:
                yield name, (place, attribute)
