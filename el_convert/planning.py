"""Deciding: every convolution of a model ends as *binarize* or *keep, because ...*. As data."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import fx, nn
from torch.jit import ScriptModule
from torch.nn.modules.lazy import LazyModuleMixin

from el_convert.activations import ActivationChange, plan_activations
from el_convert.calls import FunctionalConv
from el_convert.errors import ConversionError, UnknownNameError, first_few
from el_convert.facts import GraphFacts, is_norm
from el_convert.nn import OneBitLayer
from el_convert.patterns import KEPT_BY_NAME, Action, find_pattern, first_match
from el_convert.recipes import Recipe, find_recipe
from el_convert.sites import Site, survey
from el_convert.tracing import dotted_name, has_forward_hooks, is_convolution

_WRAPPERS = {
    "torch.nn.parallel.data_parallel.DataParallel": "wrapped in DataParallel",
    "torch.nn.parallel.distributed.DistributedDataParallel": "wrapped in DistributedDataParallel",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "FSDP-wrapped",
    "torch.distributed.fsdp.FSDPModule": "sharded by fully_shard",
    "torch._dynamo.eval_frame.OptimizedModule": "compiled by torch.compile",
}
_UNTRACED = "; what surrounds it does not trace: name it in keep= if it gives the output"
_PASSED = (nn.Identity, nn.Dropout, nn.Dropout2d)
NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


@dataclass(frozen=True)
class Decision:
    """What becomes of one convolution module.

    Attributes:
        path: its first qualified name.
        pattern: name of the row that decided.
        action: "binarize" or "keep".
        reason: why, in words.
        norm: qualified name of the norm that moves inside (`link.place=after-norm`), or "".
        normed: whether nothing but norms read its output, which keeps gates that start above 1
            from adding up; not in files, as trained gates are.
    """

    path: str
    pattern: str
    action: Action
    reason: str
    norm: str = ""
    normed: bool = field(default=True, compare=False)


@dataclass(frozen=True)
class Conversion:
    """Everything a conversion does, as data: what is applied, saved and replayed.

    Attributes:
        recipe: the choices.
        decisions: one per distinct convolution module.
        activations: what becomes of the activations that feed binarized convolutions.
        functional: convolutions that are calls in a forward and stay as they are.
    """

    recipe: Recipe
    decisions: tuple[Decision, ...]
    activations: tuple[ActivationChange, ...] = ()
    functional: tuple[FunctionalConv, ...] = ()

    @property
    def binarized(self) -> tuple[Decision, ...]:
        """The decisions that binarize."""
        return tuple(d for d in self.decisions if d.action == "binarize")

    @property
    def kept(self) -> tuple[Decision, ...]:
        """The decisions that keep."""
        return tuple(d for d in self.decisions if d.action == "keep")


def plan(
    model: nn.Module, recipe: Recipe | str = "elastic-link", *, keep: Sequence[str] = ()
) -> tuple[Decision, ...]:
    """Say what `binarize` would do, without doing it.

    Args:
        model: any module that holds convolutions; left as it was.
        recipe: a recipe or its name.
        keep: globs on qualified names; what they match stays in float.

    Returns:
        One Decision per distinct convolution module, in the order of `named_modules`.

    Raises:
        ConversionError: the model is wrapped, compiled, scripted, lazy or binarized already.
        UnknownNameError: an unknown recipe, or a glob that matches no convolution.

    Warns:
        UserWarning: a forward calls F.conv2d or the like, which is no module and stays in float.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3),
        ...                       nn.Flatten(), nn.LazyLinear(10))
        >>> [d.action for d in plan(model)]
        ['keep', 'binarize']
    """
    conversion = plan_conversion(model, recipe, keep=keep)
    if conversion.functional:
        warnings.warn(functional_notice(conversion.functional), UserWarning, stacklevel=2)
    return conversion.decisions


def functional_notice(calls: Sequence[FunctionalConv]) -> str:
    """What to say of convolutions that are no modules."""
    return (
        "convolutions left in float, as they are calls in a forward and no modules: "
        f"{first_few(map(str, calls))}. "
        "Put nn.Conv2d or its like in their place to have them binarized"
    )


def plan_conversion(
    model: nn.Module, recipe: Recipe | str = "elastic-link", *, keep: Sequence[str] = ()
) -> Conversion:
    """Like `plan`, with the recipe and the activations."""
    _refuse_unconvertible(model)
    found = survey(model)
    return replace(plan_sites(found.sites, recipe, keep=keep), functional=found.functional)


def plan_sites(
    sites: Sequence[Site], recipe: Recipe | str = "elastic-link", *, keep: Sequence[str] = ()
) -> Conversion:
    """Like `plan_conversion`, for sites that were found already."""
    recipe = find_recipe(recipe)
    globs = [keep] if isinstance(keep, str) else list(keep)
    _refuse_idle_globs(globs, sites)
    decisions = [_decide(site, recipe, globs) for site in sites]
    chosen = [s for s, d in zip(sites, decisions, strict=True) if d.action == "binarize"]
    if recipe.link.enabled and recipe.link.place == "after-norm":
        norms = _movable_norms(chosen)
        decisions = [replace(d, norm=norms.get(d.path, "")) for d in decisions]
    return Conversion(recipe, tuple(decisions), plan_activations(chosen, recipe.activation))


def _decide(site: Site, recipe: Recipe, globs: Sequence[str]) -> Decision:
    for glob in globs:
        if any(fnmatch.fnmatchcase(name, glob) for name in (site.path, *site.aliases)):
            return Decision(site.path, KEPT_BY_NAME, "keep", f"named by keep={glob!r}")
    row = first_match(site, recipe)
    reason = row.reason
    if row.action == "binarize" and site.path and not site.uses:
        reason += _UNTRACED
    if row.name == "unknown-class":
        reason = f"{dotted_name(type(site.conv))}: {reason}"
    return Decision(site.path, row.name, row.action, reason, normed=_is_normed(site))


def _refuse_idle_globs(globs: Sequence[str], sites: Sequence[Site]) -> None:
    names = [name for site in sites for name in (site.path, *site.aliases)]
    for glob in globs:
        if not fnmatch.filter(names, glob):
            below = any(name.startswith(f"{glob}.") for name in names)
            known = [] if below else [*names, *_container_globs(names)]
            advice = f"try {glob + '.*'!r}" if below else "plan(model) or --dry-run lists them"
            raise UnknownNameError("keep glob", glob, known, f"no convolution matches; {advice}")


def _container_globs(names: Sequence[str]) -> set[str]:
    """ "layer1.*", "layer1.0.*" and so on: what users mostly mean."""
    parts = [name.split(".") for name in names]
    return {".".join(p[:depth]) + ".*" for p in parts for depth in range(1, len(p))}


def _refuse_unconvertible(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ConversionError(f"binarize takes a torch.nn.Module, not {type(model).__name__}")
    for path, module in model.named_modules():
        where = f"{path or 'the model'} ({type(module).__name__})"
        for kind in type(module).__mro__:
            if dotted_name(kind) in _WRAPPERS:
                state = _WRAPPERS[dotted_name(kind)]
                raise ConversionError(
                    f"{where} is {state}: binarize the plain model first, wrap it after"
                )
        if isinstance(module, ScriptModule):
            raise ConversionError(
                f"{where} is TorchScript: binarize the Python model, script after"
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ConversionError(
                f"{where} is compiled: binarize the model first, compile it after"
            )
        if isinstance(module, OneBitLayer):
            raise ConversionError(
                f"{where} is a binary convolution: this model is binarized already; "
                "start from the float model"
            )
        if is_convolution(module) and isinstance(module, LazyModuleMixin):
            raise ConversionError(
                f"{where} is lazy and has no weights yet: run one forward, then binarize"
            )


def unexpected_keeps(conversion: Conversion) -> tuple[Decision, ...]:
    """Kept convolutions the user may not know of: hooked, parametrized, of an unknown class."""
    return tuple(
        d
        for d in conversion.kept
        if d.pattern != KEPT_BY_NAME and find_pattern(d.pattern).unexpected
    )


def _is_normed(site: Site) -> bool:
    def normed(facts: GraphFacts, node: fx.Node) -> bool:
        module = facts.module(node)
        if isinstance(module, _PASSED):
            return bool(node.users) and all(normed(facts, user) for user in node.users)
        return module is not None and is_norm(module)

    calls = [(facts, user) for facts, node in site.uses for user in node.users]
    return bool(calls) and all(normed(facts, user) for facts, user in calls)


def _movable_norms(sites: Sequence[Site]) -> dict[str, str]:
    """Norms read by nothing but one convolution's one call, by that convolution's path."""
    moves: dict[str, str] = {}
    for site in sites:
        if site.calls != 1 or len(site.consumers) != 1:
            continue
        facts, _ = site.uses[0]
        (node,) = site.consumers
        norm = facts.module(node)
        plain = norm is not None and type(norm) in NORMS and not has_forward_hooks(norm)
        calls = sum(facts.module(other) is norm for other in facts.position) if plain else 0
        if calls == 1 and not facts.region.path:
            moves[site.path] = str(node.target)
    return moves
