"""What the charts of a report's page show, as percentages of their height or width."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from el_convert.findings import Findings, LayerFinding, Spread, spread
from el_convert.render import big_number, byte_size

GROUPS = {
    "1-bit": "1-bit convolutions",
    "float": "float convolutions",
    "linear": "linear layers",
    "rest": "norms, activations and the rest",
}
_BINS = 16


@dataclass(frozen=True)
class Track:
    """One row of bars in the strip of layers.

    Attributes:
        name: what it shows.
        total: over all layers, in words.
        heights: of each layer, percent of the largest.
    """

    name: str
    total: str
    heights: tuple[float, ...]


@dataclass(frozen=True)
class Stack:
    """A bar of several parts.

    Attributes:
        name: what it shows.
        total: in words.
        parts: (group, percent of the chart's width).
        zoomed: whether it fills the width whatever it totals.
    """

    name: str
    total: str
    parts: tuple[tuple[str, float], ...]
    zoomed: bool = False


@dataclass(frozen=True)
class SpreadColumn:
    """One layer's spread, in percent of the chart's height from its foot."""

    low: float
    high: float
    median: float
    start: float | None = None


@dataclass(frozen=True)
class SpreadChart:
    """Spreads of all layers; None where a layer has none.

    Attributes:
        top, foot: values at the chart's edges.
        columns: of each layer.
    """

    top: float
    foot: float
    columns: tuple[SpreadColumn | None, ...]


def tracks(findings: Findings) -> list[Track]:
    """The strip's rows of bars: operations and bytes, before and after."""
    rows: list[tuple[str, Callable[[LayerFinding], float], Callable[[float], str]]] = [
        ("bytes, float", lambda layer: layer.before.stored_bytes, _bytes),
        ("bytes, packed", lambda layer: layer.after.packed_bytes, _bytes),
    ]
    if findings.cheaper is not None:
        rows = [
            ("MACs, float", lambda layer: layer.before.float_macs or 0, big_number),
            ("OPs, binarized", lambda layer: layer.after.ops or 0, big_number),
            *rows,
        ]
    return [_track(name, list(map(value, findings.layers)), text) for name, value, text in rows]


def _bytes(value: float) -> str:
    return byte_size(round(value))


def _track(name: str, values: Sequence[float], text: Callable[[float], str]) -> Track:
    return Track(name, text(sum(values)), tuple(_percent(v, max(values)) for v in values))


def _percent(value: float, whole: float) -> float:
    return round(100 * value / whole, 2) if whole else 0.0


def stages(layers: Sequence[LayerFinding]) -> list[tuple[str, int]]:
    """(beginning of the name, layers in a row that have it).

    Of one part, as in "layer1"; of two, as in "blocks.3", where one part is half of the network's.
    """
    first = Counter(layer.path.partition(".")[0] for layer in layers)

    def beginning(layer: LayerFinding) -> str:
        parts = layer.path.split(".")
        return ".".join(parts[: 1 + (2 * first[parts[0]] > len(layers))])

    return [(name, len(list(same))) for name, same in itertools.groupby(map(beginning, layers))]


@dataclass(frozen=True)
class GroupRow:
    """What one group of layers takes; operations are None where they are unknown."""

    group: str
    layers: int | None
    macs_before: int | None
    ops_after: float | None
    bytes_before: int
    bytes_after: int


def group_rows(findings: Findings) -> list[GroupRow]:
    """One row for each group that has layers, and one for what is no layer."""
    rows = []
    for group in GROUPS:
        members = [layer for layer in findings.layers if layer.group == group]
        if members:
            rows.append(_group_row(group, members, findings.cheaper is not None))
    before, after = findings.before.other_bytes, findings.after.other_bytes
    return [*rows, GroupRow("rest", None, None, None, before, after)]


def _group_row(group: str, members: Sequence[LayerFinding], counted: bool) -> GroupRow:
    return GroupRow(
        group,
        len(members),
        sum(layer.before.float_macs or 0 for layer in members) if counted else None,
        sum(layer.after.ops or 0 for layer in members) if counted else None,
        sum(layer.before.stored_bytes for layer in members),
        sum(layer.after.packed_bytes for layer in members),
    )


def operation_stacks(findings: Findings) -> list[Stack]:
    """Operations before and after on one scale, then after alone; [] where they are unknown."""
    if findings.cheaper is None:
        return []
    rows = group_rows(findings)
    before = [(row.group, float(row.macs_before or 0)) for row in rows]
    after = [(row.group, float(row.ops_after or 0)) for row in rows]
    return _stacks(before, after, ("float MACs", "OPs"), big_number)


def byte_stacks(findings: Findings) -> list[Stack]:
    """The same of bytes."""
    rows = group_rows(findings)
    before = [(row.group, float(row.bytes_before)) for row in rows]
    after = [(row.group, float(row.bytes_after)) for row in rows]
    return _stacks(before, after, ("float", "packed"), _bytes)


_Parts = list[tuple[str, float]]


def _stacks(
    before: _Parts, after: _Parts, names: tuple[str, str], text: Callable[[float], str]
) -> list[Stack]:
    totals = [sum(value for _, value in parts) for parts in (before, after)]
    whole = max(totals)
    words = [f"{text(total)} {name}" for total, name in zip(totals, names, strict=True)]
    return [
        Stack("before", words[0], _parts(before, whole)),
        Stack("after", words[1], _parts(after, whole)),
        Stack("after, enlarged", words[1], _parts(after, totals[1]), zoomed=True),
    ]


def _parts(values: _Parts, whole: float) -> tuple[tuple[str, float], ...]:
    return tuple((group, _percent(value, whole)) for group, value in values if value)


def sign_chart(findings: Findings) -> SpreadChart | None:
    """Share of +1 over each layer's input channels; None without images."""
    spreads = [sign_spread(layer) for layer in findings.layers]
    if not any(spreads):
        return None
    columns = [None if known is None else _column(known, 0.0, 1.0) for known in spreads]
    return SpreadChart(1.0, 0.0, tuple(columns))


def sign_spread(layer: LayerFinding) -> Spread | None:
    """Of a layer's share of +1 over its input channels."""
    return spread(layer.observed.positive) if layer.observed and layer.observed.positive else None


def gate_spread(layer: LayerFinding) -> Spread | None:
    """Of a layer's gamma; None where it has no gate, or one that is not finite."""
    if layer.gate is None or not all(map(math.isfinite, layer.gate.values)):
        return None
    return spread(layer.gate.values)


def gate_chart(findings: Findings) -> SpreadChart | None:
    """Gamma over each layer's output channels, and where it started; None without gates."""
    spreads = [gate_spread(layer) for layer in findings.layers]
    known = [one for one in spreads if one]
    if not known:
        return None
    starts = [layer.gate.start for layer in findings.layers if layer.gate]
    foot, top = _axis(
        min(*(one.tenth for one in known), *starts), max(*(one.ninetieth for one in known), *starts)
    )
    columns = [
        None if one is None or gate is None else _column(one, foot, top, gate.start)
        for one, gate in zip(spreads, (layer.gate for layer in findings.layers), strict=True)
    ]
    return SpreadChart(top, foot, tuple(columns))


def _axis(low: float, high: float) -> tuple[float, float]:
    """Edges of an axis from 0; where values are close to each other and far from 0, around them."""
    margin = max((high - low) / 10, abs(high) / 20, 1e-3)
    if low > 0 and high - low < high / 4:
        return low - margin, high + margin
    return min(0.0, low), max(high, margin)


def _column(values: Spread, foot: float, top: float, start: float | None = None) -> SpreadColumn:
    def place(value: float) -> float:
        return _percent(value - foot, top - foot)

    return SpreadColumn(
        place(values.tenth),
        place(values.ninetieth),
        place(values.median),
        None if start is None else place(start),
    )


def histogram(values: Sequence[float], low: float, high: float) -> list[int]:
    """How many values lie in each of 16 equal bins; those outside count to the nearest."""
    counts = [0] * _BINS
    for value in values:
        place = int((value - low) / (high - low) * _BINS) if high > low else 0
        counts[min(max(place, 0), _BINS - 1)] += 1
    return counts


def outline(counts: Sequence[int]) -> str:
    """A histogram as an SVG path in a box of 16 by 10, drawn from its foot."""
    top = max(counts) or 1
    bars = (
        f"M{bin} 10v-{10 * count / top:.3g}h1v{10 * count / top:.3g}z"
        for bin, count in enumerate(counts)
        if count
    )
    return "".join(bars)
