"""A binarized network beside its float original, layer by layer: what a report shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from el_convert.convert import conversion_of
from el_convert.errors import ConversionError
from el_convert.nn import OneBitLayer
from el_convert.observation import LayerObservation, Observation, observe
from el_convert.packed import PackedConv
from el_convert.planning import plan_conversion
from el_convert.report import LayerSummary, Summary, summarize

_FLOAT_BYTES = 4
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


@dataclass(frozen=True)
class Spread:
    """Smallest, 10 % quantile, median, 90 % quantile and largest of some values."""

    low: float
    tenth: float
    median: float
    ninetieth: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """The spread of one value or more, quantiles interpolated as `torch.quantile` does.

    Example:
        >>> spread([4.0, 0.0, 2.0]).median
        2.0
    """
    tensor = torch.tensor(values, dtype=torch.float64)
    return Spread(*tensor.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist())


@dataclass(frozen=True)
class GateFinding:
    """A layer's gamma.

    Attributes:
        start: where it began.
        values: one per output channel, or one.
        learned: False where the recipe fixes it.
    """

    start: float
    values: tuple[float, ...]
    learned: bool


@dataclass(frozen=True)
class LayerFinding:
    """One convolution or linear layer.

    Attributes:
        before: as it was in the float network.
        after: as it is now.
        weight_bits, input_bits: 1, or those of the floats they are stored in.
        gate: None without a link.
        observed: None without images, and for layers that are not binarized.
    """

    before: LayerSummary
    after: LayerSummary
    weight_bits: int
    input_bits: int
    gate: GateFinding | None = None
    observed: LayerObservation | None = None

    @property
    def path(self) -> str:
        """Its qualified name."""
        return self.after.path

    @property
    def group(self) -> str:
        """What it counts to: "1-bit", "float" or "linear"."""
        if self.after.kind == "linear":
            return "linear"
        return "1-bit" if self.weight_bits == 1 else "float"


@dataclass(frozen=True)
class Findings:
    """A network's report as data.

    Attributes:
        before: the float network.
        after: the binarized one.
        layers: in the network's order.
        observed: what it does on images; None without.
        packed: whether it was packed already, so that there is nothing to compare it with.
    """

    before: Summary
    after: Summary
    layers: tuple[LayerFinding, ...]
    observed: Observation | None = None
    packed: bool = False

    @property
    def smaller(self) -> float:
        """Bytes of the float network by those of the packed one."""
        return self.before.stored_bytes / max(self.after.packed_bytes, 1)

    @property
    def cheaper(self) -> float | None:
        """MACs of the float network by OPs of the binarized one; None where they are unknown."""
        return self._fewer(0)

    @property
    def cheaper_with_links(self) -> float | None:
        """The same with the multiply-adds of the gates among the OPs."""
        return self._fewer(self.after.link_macs or 0)

    def _fewer(self, more: int) -> float | None:
        macs, ops = self.before.float_macs, self.after.ops
        return None if macs is None or ops is None else macs / max(ops + more, 1)


def examine(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    original: nn.Module | None = None,
    input_size: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Findings:
    """Everything a report shows, as data.

    Args:
        model: made by `binarize`, `load` or `pack`; left as it was.
        batches: of images and labels, see `observe`; None leaves out what depends on images.
        original: the float network it was made from, weights do not matter. Without it the
            weights and biases of the layers stand for it, and norms count as they are now.
        input_size: (C, H, W), as `summarize` takes it.
        device: where the model is.
        progress: called with the number of images after each batch.

    Raises:
        ConversionError: the model is not binarized, does not run on that input, or `original` has
            other layers.
        DataError: there is no image in `batches`.

    Example:
        >>> from el_convert import binarize
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1))
        >>> found = examine(binarize(net), original=net, input_size=(3, 9, 9))
        >>> [layer.weight_bits for layer in found.layers], f"{found.cheaper:.1f}"
        ([32, 1, 32], '5.3')
    """
    conversion_of(model)
    after = summarize(model, input_size)
    modules = dict(model.named_modules())
    before = (
        _as_float(after, modules)
        if original is None
        else summarize(original, after.input_size or ())
    )
    observed = (
        None if batches is None else observe(model, batches, device=device, progress=progress)
    )
    starts = _gate_starts(model, original)
    seen = {layer.path: layer for layer in observed.layers} if observed else {}
    floats = {layer.path: layer for layer in before.layers}
    order = {path: place for place, path in enumerate(floats)}
    odd = sorted({row.path for row in after.layers} ^ set(order))
    if odd:
        raise ConversionError(
            f"original is another network: {odd[0]!r} is a layer of only one of the two"
        )
    layers = [
        _layer(floats[row.path], row, modules[row.path], starts, seen.get(row.path))
        for row in sorted(after.layers, key=lambda row: order[row.path])
    ]
    is_packed = any(isinstance(module, PackedConv) for module in modules.values())
    return Findings(before, after, tuple(layers), observed, is_packed)


def _layer(
    before: LayerSummary,
    after: LayerSummary,
    module: nn.Module,
    starts: dict[str, float],
    observed: LayerObservation | None,
) -> LayerFinding:
    if not isinstance(module, OneBitLayer):
        weight: Any = module.weight
        bits = 8 * weight.element_size()
        return LayerFinding(before, after, bits, bits)
    wide = 8 * _FLOAT_BYTES
    return LayerFinding(
        before,
        after,
        1 if module.recipe.weight.binary else wide,
        1 if module.recipe.input.binary else wide,
        _gate(module, starts.get(after.path)),
        observed,
    )


def _gate(layer: OneBitLayer, start: float | None) -> GateFinding | None:
    if layer.link is None:
        return None
    options, gamma = layer.link.options, layer.link.gamma
    if gamma is None:
        return GateFinding(options.gamma_init, (options.gamma_init,), False)
    begun = options.gamma_init if start is None else start
    return GateFinding(begun, tuple(gamma.detach().double().tolist()), True)


def _gate_starts(model: nn.Module, original: nn.Module | None) -> dict[str, float]:
    """Where gates began, by path: lower where no norm follows, which files do not record."""
    conversion = conversion_of(model)
    start = conversion.recipe.link.gamma_init
    if original is not None and conversion.recipe.link.enabled:
        conversion = plan_conversion(original, conversion.recipe)
    return {d.path: start if d.normed else min(start, 1.0) for d in conversion.decisions}


def _as_float(after: Summary, modules: dict[str, nn.Module]) -> Summary:
    """The float network as far as the binarized one tells."""
    layers = []
    for row in after.layers:
        macs = row.float_macs
        if macs is not None and row.binary_macs is not None:
            macs += row.binary_macs
        size = _float_bytes(modules[row.path], row)
        layers.append(
            replace(
                row, action="float", pattern="", reason="", link="", float_macs=macs,
                binary_macs=None if macs is None else 0, link_macs=None if macs is None else 0,
                stored_bytes=size, packed_bytes=size,
            )
        )  # fmt: skip
    return replace(after, recipe="", layers=tuple(layers), activations=(), functional=())


def _float_bytes(module: nn.Module, row: LayerSummary) -> int:
    if not isinstance(module, OneBitLayer):
        return row.stored_bytes
    bias = 0 if module.bias is None else module.bias.numel()
    if isinstance(module, PackedConv):
        return (math.prod(module.latent_shape) + bias) * _FLOAT_BYTES
    weight: Any = module.weight
    return int((weight.numel() + bias) * weight.element_size())
