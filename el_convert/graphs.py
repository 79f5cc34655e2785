"""The converted network as a graph: every gate an explicit node."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from el_convert.convert import apply
from el_convert.errors import ConversionError, first_line
from el_convert.link import ElasticLink
from el_convert.nn import BinaryLayer
from el_convert.planning import plan_conversion
from el_convert.recipes import Recipe
from el_convert.tracing import (
    ConvTracer,
    holds_convolution,
    is_convolution,
    same_attributes,
    structure_copy,
)

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def to_graph(model: nn.Module) -> fx.GraphModule:
    """The model as a GraphModule in which each gate is one `call_module` node.

    Binary convolutions are opened: their sign, convolution and scale are nodes too. Modules that
    do not trace, and those with hooks, stay one node; their traceable children become
    GraphModules inside them. Contexts that a forward enters (autocast, no_grad, checkpointing)
    are not in a graph of torch.fx.

    Args:
        model: usually a binarized model. The graph is that of its current mode (train or eval),
            and optional arguments of its forward are fixed at their defaults.

    Returns:
        A GraphModule that shares the model's parameters.

    Raises:
        ConversionError: the model's own forward does not trace; the message says why.

    Example:
        >>> model = nn.Sequential(BinaryConv2d(4, 8, 1))
        >>> [str(node.target) for node in to_graph(model).graph.nodes if "link" in node.name]
        ['0.link']
    """
    twin = structure_copy(model)
    with same_attributes(twin):
        part = trace_module(twin, is_graph_leaf)
    if isinstance(part, str):
        raise ConversionError(
            f"the forward of {type(model).__name__} does not trace ({part}): "
            "call to_graph on its submodules"
        )
    return part


def is_graph_leaf(module: nn.Module) -> bool:
    """Whether `to_graph` shows a module as one node: gates, float convolutions, and the rest."""
    if isinstance(module, BinaryLayer):
        return False
    return is_convolution(module) or not holds_convolution(module)


def trace_module(module: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> fx.GraphModule | str:
    """A GraphModule of the module's mode, or why its forward does not trace.

    Args:
        module: may get proxies as attributes.
        is_leaf: which modules become one node. Of others that do not trace, the traceable
            children become GraphModules.
    """
    tracer = ConvTracer(is_leaf, keep_hooked=True, in_place=True)
    try:
        graph = tracer.trace(module)
    except Exception as error:  # whatever a forward raises on proxies; the caller reports it
        return first_line(error)
    result = fx.GraphModule(module, graph, type(module).__name__)
    for name, value in vars(module).items():
        if name in _HOOKS:  # they run on the module's own values, as before
            setattr(result, name, copy.copy(value))
        elif not hasattr(result, name):  # what parents that do not trace read of it
            setattr(result, name, value)
    result.train(module.training)
    for path in tracer.opened:
        result.set_submodule(path, _opened(module.get_submodule(path), is_leaf))
    return result


def _opened(module: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> nn.Module:
    """A shallow copy of a module that does not trace, with the children that do as graphs."""
    shell = copy.copy(module)
    shell._modules = dict(module._modules)
    for name, child in module.named_children():
        if not is_leaf(child):
            part = trace_module(child, is_leaf)
            shell._modules[name] = _opened(child, is_leaf) if isinstance(part, str) else part
    return shell


class BinarizePass(PassBase):
    """`binarize` and `to_graph` for people who compose torch passes.

    Args:
        recipe: a recipe or its name.
        keep: globs on qualified names; what they match stays in float.

    Example:
        >>> graph = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1),
        ...                                         nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...                                         nn.Linear(8, 2)))
        >>> result = BinarizePass()(graph)
        >>> result.modified, any("link" in node.name for node in result.graph_module.graph.nodes)
        (True, True)
    """

    def __init__(self, recipe: Recipe | str = "elastic-link", *, keep: Sequence[str] = ()) -> None:
        super().__init__()
        self.recipe = recipe
        self.keep = keep

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite a GraphModule in place.

        Args:
            graph_module: a float network, its convolutions called as modules.

        Returns:
            The same GraphModule, every gate a node of its graph; `modified` is False where
            there was nothing to binarize.

        Raises:
            ConversionError, UnknownNameError: as `binarize`.
        """
        conversion = plan_conversion(graph_module, self.recipe, keep=self.keep)
        if not conversion.binarized:
            return PassResult(graph_module, False)
        apply(graph_module, conversion)
        graph_module.graph = ConvTracer(is_graph_leaf).trace(graph_module)
        graph_module.recompile()
        return PassResult(graph_module, True)


def link_nodes(graph_module: torch.nn.Module) -> list[fx.Node]:
    """Every node that calls a gate, those of nested GraphModules included."""
    return [
        node
        for part in graph_module.modules()
        if isinstance(part, fx.GraphModule)
        for node in part.graph.nodes
        if node.op == "call_module" and isinstance(part.get_submodule(node.target), ElasticLink)
    ]
