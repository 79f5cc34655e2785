"""Packed layers that only call each other, run as one: no time passes between them in Python.

`chain_blocks` exchanges the containers of packed layers for such as look, before they call their
parts one by one, whether the native engine can run all of them in one call. Nothing else about
them changes: names, hooks, graphs and what is saved are as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from el_convert.chain_structure import Layout, lay_out, same_objects
from el_convert.convert import exchange
from el_convert.fast_path import plain_map
from el_convert.kernels import engine
from el_convert.kernels.chain import ChainStep, NativeChain
from el_convert.packed import PackedConv

_LAST = torch.channels_last
_MOST = 8  # input sizes that are kept prepared
_FEWEST = 2  # layers that are worth it


class Chain:
    """The layers of some modules, called one after the other. Never copied or saved.

    Args:
        modules: the output of each is the input of the next.
        entered: whether the one module was called already, and its hooks with it.
    """

    def __init__(self, modules: Sequence[nn.Module], *, entered: bool = False) -> None:
        self._modules, self._entered = tuple(modules), entered
        self._layout: Layout | None = None
        self._prepared: dict[tuple[int, int], NativeChain | None] = {}

    def run(self, input: Tensor) -> Tensor | None:
        """What the modules give for a `plain_map`; None where they must be called one by one."""
        if torch.is_grad_enabled() and input.requires_grad:
            return None
        size = (input.shape[2], input.shape[3])
        if self._prepared.get(size, self) is None:  # known not to work: at worst it now would
            return None
        layout = self._layout
        if layout is None or not layout.holds():
            # Another thread may do so too: each then has its own, and one is kept.
            layout = lay_out(self._modules, entered=self._entered)
            self._layout, self._prepared = layout, {}
        if not layout.whole or layout.hooked() or input.shape[1] != layout.channels:
            return None
        prepared = self._prepared
        if size not in prepared:
            if len(prepared) >= _MOST:
                self._prepared = prepared = {}
            prepared[size] = _prepare(layout, size)
        native = prepared[size]
        if native is None:
            return None
        last = input.contiguous(memory_format=_LAST)
        output = native(last)
        # As torch's own convolutions do, the output follows the input's layout in memory.
        return output if last is input else output.contiguous()


def _prepare(layout: Layout, size: tuple[int, int]) -> NativeChain | None:
    """A chain for inputs of (H, W); None where the engine cannot run all of a layer."""
    library = engine()
    if library is None:
        return None
    steps: list[ChainStep] = []
    shapes: list[tuple[int, int, int]] = [(layout.channels, *size)]
    for call in layout.calls:
        channels, height, width = shapes[call.input]
        layer = call.layer
        prepared = layer.prepare(call.tail(), (height, width))
        if channels != layer.in_channels or prepared is None or prepared.aligns:
            return None
        step = ChainStep(
            prepared.native, prepared.epilogue, call.input, call.residual, (height, width)
        )
        if call.residual is not None and shapes[call.residual] != step.output_shape:
            return None
        steps.append(step)
        shapes.append(step.output_shape)
    return NativeChain(library, steps)


class _Part(NamedTuple):
    """Neighbours in a container, and the chain that runs them; None where they make none."""

    modules: tuple[nn.Module, ...]
    chain: Chain | None


class _Parts:
    """How modules that follow each other are cut into chains. Never copied or saved."""

    def __init__(self) -> None:
        self._known: tuple[_Part, ...] = ()

    def __deepcopy__(self, memo: object) -> _Parts:
        return _Parts()

    def __reduce__(self) -> tuple[type[_Parts], tuple[()]]:
        return _Parts, ()

    def of(self, modules: Sequence[nn.Module], *, entered: bool = False) -> tuple[_Part, ...]:
        known = self._known
        if not same_objects([module for part in known for module in part.modules], modules):
            self._known = known = tuple(_cut(tuple(modules), entered))
        return known


def _cut(modules: tuple[nn.Module, ...], entered: bool) -> Iterator[_Part]:
    """The longest runs of modules that can be chains, and what lies between them."""
    begin = 0
    while begin < len(modules):
        end, longest = begin + 1, 0
        while (layout := lay_out(modules[begin:end])).whole:
            longest = len(layout.calls)
            end += 1
            if end > len(modules):
                break
        end = max(end - 1, begin + 1)
        part = modules[begin:end]
        yield _Part(part, Chain(part, entered=entered) if longest >= _FEWEST else None)
        begin = end


class PackedSequential(nn.Sequential):
    """An `nn.Sequential` whose packed layers run as chains.

    Example:
        >>> import timm
        >>> from el_convert import binarize, pack
        >>> model = pack(binarize(timm.create_model("resnet18")).eval())  # doctest: +SKIP
        >>> type(model.layer1).__name__  # doctest: +SKIP
        'PackedSequential'
    """

    def __init__(self, original: nn.Sequential) -> None:
        super().__init__()
        self.__dict__.update(original.__dict__)
        self._parts = _Parts()

    def forward(self, input: Any) -> Any:
        if self.training or not plain_map(input):
            for module in self:
                input = module(input)
            return input
        for part in self._parts.of(list(self._modules.values())):
            output = part.chain.run(input) if part.chain and plain_map(input) else None
            if output is None:
                for module in part.modules:
                    input = module(input)
            else:
                input = output
        return input


class PackedBlock(fx.GraphModule):
    """A block that was traced for packing; its graph runs as a chain where it is one."""

    def recompile(self) -> Any:
        code = super().recompile()
        cls: Any = type(self)
        cls.graph_forward, cls.forward = cls.forward, _forward_of_block
        return code


def _forward_of_block(self: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) == 1 and not kwargs and not self.training and plain_map(args[0]):
        parts: _Parts = self.__dict__.setdefault("_parts", _Parts())
        (part,) = parts.of((self,), entered=True)
        output = None if part.chain is None else part.chain.run(args[0])
        if output is not None:
            return output
    return self.graph_forward(*args, **kwargs)


def chain_blocks(model: nn.Module) -> None:
    """Exchange a packed model's plain Sequentials and traced blocks for chaining ones, in place."""
    new: dict[int, nn.Module] = {}
    for module in model.modules():
        if module is model or not any(isinstance(part, PackedConv) for part in module.modules()):
            continue
        if type(module) is nn.Sequential:
            new[id(module)] = PackedSequential(module)
        elif isinstance(module, fx.GraphModule):
            new[id(module)] = _as_block(module)
    exchange(model, new)
    for replaced in new.values():
        # What was exchanged lies within what was exchanged.
        exchange(replaced, new)


def _as_block(graph: fx.GraphModule) -> PackedBlock:
    block = PackedBlock(graph, graph.graph, type(graph).__name__)
    own = vars(block)
    own.update({name: value for name, value in vars(graph).items() if name != "_graph"})
    return block
