"""Sites: every convolution of a model with what a pattern may want to know of its surroundings."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from el_convert.calls import FunctionalConv, find_functional
from el_convert.facts import (
    ACTIVATION_NAMES,
    GraphFacts,
    name_of,
    reads_shape,
    tensor_inputs,
    visit,
)
from el_convert.tracing import (
    Region,
    attribute,
    dotted_name,
    has_parameters,
    is_convolution,
    structure_copy,
    trace_regions,
)

_IMAGE_CHANNELS = 4  # a region's own input counts as the image up to RGBA


@dataclass(frozen=True)
class Site:
    """One distinct convolution module of a model.

    Attributes:
        path: its first qualified name.
        aliases: every further name of the same module.
        conv: the module.
        uses: every call in a graph, with the facts of that graph; empty when no graph holds it.
        reads_image: whether a model input reaches it through no learned mixing of channels.
        feeds_output: whether its result reaches the model's output through no further layer.
        single_pixel: whether it only ever works on maps of one pixel.
        on_shortcut: whether it is the projection on a residual shortcut.
        nonnegative_input: whether its input cannot be below 0.
        featureless_input: whether its input is computed from no input of the model.
        weight_read: whether code other than its own forward computes with its weight.
        ends_region: whether its result leaves the part of the model that could be traced with no
            layer or activation behind it; true where no graph holds it.
        owners: dotted class names of the modules it is in, outermost first.
    """

    path: str
    aliases: tuple[str, ...]
    conv: _ConvNd
    uses: tuple[tuple[GraphFacts, fx.Node], ...] = ()
    reads_image: bool = False
    feeds_output: bool = False
    single_pixel: bool = False
    on_shortcut: bool = False
    nonnegative_input: bool = False
    featureless_input: bool = False
    weight_read: bool = False
    ends_region: bool = False
    owners: tuple[str, ...] = ()

    @property
    def calls(self) -> int:
        """How often the graphs call it."""
        return len(self.uses)

    @property
    def node(self) -> fx.Node | None:
        """Its first call in a graph; None when no graph holds it."""
        return self.uses[0][1] if self.uses else None

    @property
    def producer(self) -> fx.Node | None:
        """The node its first call reads."""
        return producer(self.uses[0][1]) if self.uses else None

    @property
    def consumers(self) -> tuple[fx.Node, ...]:
        """The nodes that read its first call's result."""
        return tuple(self.uses[0][1].users) if self.uses else ()


@dataclass(frozen=True)
class Survey:
    """What a model holds.

    Attributes:
        sites: one per distinct convolution module, in the order of `named_modules`.
        functional: convolutions that are calls in a forward, which no swap of modules reaches.
    """

    sites: tuple[Site, ...]
    functional: tuple[FunctionalConv, ...]


def survey(model: nn.Module) -> Survey:
    """Find every convolution of a model.

    Args:
        model: any module; left as it was.
    """
    twin = structure_copy(model)
    regions = trace_regions(twin)
    return Survey(_sites(model, twin, regions), find_functional(twin, regions))


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """One Site per distinct convolution module, in the order of `named_modules`."""
    return survey(model).sites


def _sites(model: nn.Module, twin: nn.Module, regions: list[Region]) -> tuple[Site, ...]:
    graphs = [GraphFacts(region) for region in regions if region.graph is not None]
    calls: dict[int, list[tuple[GraphFacts, fx.Node]]] = {}
    for facts in graphs:
        for node in facts.position:
            module = facts.module(node)
            if is_convolution(module):
                calls.setdefault(id(module), []).append((facts, node))
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for path, module in twin.named_modules(remove_duplicate=False):
        if is_convolution(module):
            names.setdefault(id(module), []).append(path)
            modules[id(module)] = module
    read = {id(weight) for facts in graphs for weight in _weights_read(facts)}
    traced = [facts.region.path for facts in graphs]
    return tuple(
        _site(
            model,
            paths,
            calls.get(key, []),
            weight_read=_weight_id(modules[key]) in read,
            exposed=_is_exposed(paths[0], traced),
        )
        for key, paths in names.items()
    )


def _is_exposed(path: str, traced: Iterable[str]) -> bool:
    """Whether nothing around a convolution was traced, so that its input may be the image."""
    return bool(path) and not any(path.startswith(f"{outer}.") or not outer for outer in traced)


def _weight_id(conv: nn.Module) -> int:
    return id(conv._parameters.get("weight"))


def _weights_read(facts: GraphFacts) -> Iterator[nn.Parameter]:
    """Parameters that a forward computes with itself, not through a module."""
    for node in facts.position:
        value = attribute(facts.region.module, node)
        if isinstance(value, nn.Parameter) and not all(map(reads_shape, node.users)):
            yield value


def _owners(model: nn.Module, path: str) -> tuple[str, ...]:
    parts = path.split(".")[:-1]
    modules = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
    return tuple(dotted_name(type(module)) for module in modules)


def _site(
    model: nn.Module,
    names: list[str],
    calls: list[tuple[GraphFacts, fx.Node]],
    *,
    weight_read: bool,
    exposed: bool,
) -> Site:
    path, *aliases = names
    conv: Any = model.get_submodule(path)
    bare = Site(
        path,
        tuple(aliases),
        conv,
        reads_image=exposed and conv.in_channels <= _IMAGE_CHANNELS,
        ends_region=True,
        weight_read=weight_read,
        owners=_owners(model, path),
    )
    if not calls:
        return bare
    return replace(
        bare,
        uses=tuple(calls),
        reads_image=any(_reads_image(f, n, conv) for f, n in calls),
        feeds_output=any(not f.region.path and _reaches_output(f, n) for f, n in calls),
        ends_region=any(_reaches_output(f, n, through_activations=False) for f, n in calls),
        single_pixel=all(f.of[producer(n)].pooled for f, n in calls),
        on_shortcut=any(_on_shortcut(f, n) for f, n in calls),
        nonnegative_input=all(f.of[producer(n)].nonnegative for f, n in calls),
        featureless_input=all(_is_featureless(f, n) for f, n in calls),
    )


def producer(node: fx.Node) -> fx.Node:
    """The node a call's first input comes from."""
    return next(iter(node.all_input_nodes))


def _is_featureless(facts: GraphFacts, conv: fx.Node) -> bool:
    inputs = [node for node in facts.position if node.op == "placeholder"]
    start = producer(conv)
    return start not in inputs and not any(facts.is_ancestor(node, start) for node in inputs)


def _reads_image(facts: GraphFacts, node: fx.Node, conv: _ConvNd) -> bool:
    if facts.region.path and conv.in_channels > _IMAGE_CHANNELS:
        return False  # inside a region the input is usually a feature map
    reached = mixed = False

    def step(value: fx.Node) -> Iterable[fx.Node]:
        nonlocal reached, mixed
        reached = reached or value.op == "placeholder"
        mixed = mixed or facts.mixes(value)
        return () if facts.mixes(value) else tensor_inputs(value)

    visit([producer(node)], step)
    return reached and not mixed  # features times a mask, or beside an image, are features


def _reaches_output(facts: GraphFacts, conv: fx.Node, *, through_activations: bool = True) -> bool:
    """Follow the result forward through parameter-free operations, but not around a residual."""
    carried = {conv}
    # In graph order, so that all of a node's inputs are settled before it is.
    heap = [(facts.position[user], user) for user in conv.users]
    heapq.heapify(heap)
    while heap:
        _, node = heapq.heappop(heap)
        if node.op == "output":
            return True
        active = node in facts.activations or name_of(node) in ACTIVATION_NAMES
        if active and not through_activations:
            continue
        if node not in carried and _passes_on(facts, conv, node, carried):
            carried.add(node)
            for user in node.users:
                heapq.heappush(heap, (facts.position[user], user))
    return False


def _passes_on(facts: GraphFacts, conv: fx.Node, node: fx.Node, carried: set[fx.Node]) -> bool:
    module = facts.module(node)
    if facts.mixes(node) or (module is not None and has_parameters(module)):
        return False
    others = [value for value in tensor_inputs(node) if value not in carried]
    return not any(facts.is_ancestor(o, conv) or facts.is_ancestor(conv, o) for o in others)


def _on_shortcut(facts: GraphFacts, conv: fx.Node) -> bool:
    """A lone convolution added to a branch of at least two that starts where it starts."""
    fork = set(_before(producer(conv)))
    start = facts.of[producer(conv)].depth
    for add in _adds_after(facts, conv):
        for other in tensor_inputs(add):
            longer = facts.of[other].depth - start >= 2
            apart = not facts.is_ancestor(conv, other) and other is not conv
            if longer and apart and any(facts.is_ancestor(node, other) for node in fork):
                return True
    return False


def _before(node: fx.Node) -> Iterator[fx.Node]:
    """The node and what it is made of alone: a pooled shortcut forks before its pooling."""
    while True:
        yield node
        inputs = tensor_inputs(node)
        if len(inputs) != 1 or len(node.users) > 1:
            return
        (node,) = inputs


def _adds_after(facts: GraphFacts, conv: fx.Node) -> Iterator[fx.Node]:
    """The first additions that the result reaches without another convolution."""
    adds: list[fx.Node] = []

    def step(node: fx.Node) -> Iterable[fx.Node]:
        if name_of(node) in ("add", "iadd", "add_"):
            adds.append(node)
            return ()
        return () if facts.mixes(node) else node.users

    visit(conv.users, step)
    yield from adds
