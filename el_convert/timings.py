"""What a benchmark found: plain data, tables of it, and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from el_convert.render import big_number

if TYPE_CHECKING:
    from rich.box import Box
    from rich.console import RenderableType

PACKED = "packed"
"""Name of the packed model among the contestants."""
FLOAT = "float"
"""Name of torch's float convolution among the times of a layer."""
_WIDE = 1000  # plain text is for programs and files: lines are not folded


@dataclass(frozen=True)
class Machine:
    """What the times were taken on.

    Attributes:
        cpu: its name.
        cores: that torch and the system count.
        isa: instruction set of the native engine; "" without an engine.
        threads: in use.
        torch: version.
    """

    cpu: str
    cores: int
    isa: str
    threads: int
    torch: str


@dataclass(frozen=True)
class Contestant:
    """The times of one contestant.

    Attributes:
        name: `PACKED`, or the peer's.
        label: what it is, in words.
        median, low, high: milliseconds: the median, the 10th and the 90th percentile.
        ratio, ratio_low, ratio_high: its time / the packed model's, round by round: the median
            and the quartiles. Above 1 the packed model is faster.
    """

    name: str
    label: str
    median: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float

    @classmethod
    def timed(
        cls, name: str, label: str, times: Sequence[float], packed: Sequence[float]
    ) -> Contestant:
        """From its and the packed model's seconds of every round."""
        median, low, high = (1e3 * t for t in quantiles(times, 0.5, 0.1, 0.9))
        ratios = [own / other for own, other in zip(times, packed, strict=True)]
        return cls(name, label, median, low, high, *quantiles(ratios, 0.5, 0.25, 0.75))


@dataclass(frozen=True)
class Skipped:
    """A peer that was asked for and not timed, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class LayerTime:
    """One call of a packed convolution, or the sum of several.

    Attributes:
        name: qualified name of the layer, or what was summed.
        kind: such as "conv 3x3".
        input: (N, C, H, W); () for sums.
        macs: multiply-adds of the whole batch.
        times: median microseconds by contestant: `PACKED`, with all that is fused into the layer;
            `FLOAT` and peers, of the convolution alone.
        peak: multiply-adds per second of the engine's innermost loop alone, on one thread, next to
            these times; None without an engine.
    """

    name: str
    kind: str
    input: tuple[int, ...]
    macs: int
    times: Mapping[str, float]
    peak: float | None = None

    @property
    def rate(self) -> float:
        """1-bit multiply-adds per second."""
        return self.macs / self.times[PACKED] * 1e6

    def ratio(self, name: str) -> float:
        """Time of a contestant / time of the packed layer."""
        return self.times[name] / self.times[PACKED]


@dataclass(frozen=True)
class LayerTimes:
    """Every packed convolution of a model.

    Attributes:
        layers: in the order of their calls.
        threads: they ran on.
        omitted: names of packed layers that are no plain 2d convolutions, or not called.
        skipped: peers asked for and not timed.
    """

    layers: tuple[LayerTime, ...]
    threads: int
    omitted: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    @property
    def sums(self) -> tuple[LayerTime, ...]:
        """Over all layers, then over those of each kind."""
        kinds = dict.fromkeys(layer.kind for layer in self.layers)
        groups = {kind: [layer for layer in self.layers if layer.kind == kind] for kind in kinds}
        each = [_sum(f"{len(group)} {kind}", kind, group) for kind, group in groups.items()]
        return (_sum(f"all {len(self.layers)}", "", self.layers), *each) if each else ()

    def share(self, layer: LayerTime) -> float | None:
        """Of the engine's peak on all threads; None without an engine."""
        return None if layer.peak is None else layer.rate / (layer.peak * self.threads)


def _sum(name: str, kind: str, layers: Sequence[LayerTime]) -> LayerTime:
    timed = [n for n in layers[0].times if all(n in layer.times for layer in layers)]
    times = {n: sum(layer.times[n] for layer in layers) for n in timed}
    macs = sum(layer.macs for layer in layers)
    at_peak = [layer.macs / layer.peak for layer in layers if layer.peak]
    peak = macs / sum(at_peak) if len(at_peak) == len(layers) else None
    return LayerTime(name, kind, (), macs, times, peak)


def quantiles(values: Sequence[float], *points: float) -> list[float]:
    """By linear interpolation.

    Example:
        >>> quantiles([1.0, 2.0, 4.0], 0.5, 0.75)
        [2.0, 3.0]
    """
    ordered, found = sorted(values), []
    for point in points:
        place = point * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        found.append(ordered[below] + (place - below) * (ordered[above] - ordered[below]))
    return found


@dataclass(frozen=True)
class Benchmark:
    """What `benchmark` measured. Prints as tables.

    Attributes:
        model: where it comes from, or its class.
        input: (N, C, H, W).
        rounds: timed.
        machine: it ran on.
        contestants: the packed model first.
        skipped: peers asked for and not timed.
        layers: layer by layer, if asked for.
    """

    model: str
    input: tuple[int, ...]
    rounds: int
    machine: Machine
    contestants: tuple[Contestant, ...]
    skipped: tuple[Skipped, ...]
    layers: LayerTimes | None = None

    def __rich__(self) -> RenderableType:
        return render_benchmark(self)

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console

        console = Console(width=_WIDE, color_system=None, highlight=False)
        with console.capture() as capture:
            console.print(render_benchmark(self, box.ASCII2))
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def to_json(result: Benchmark) -> dict[str, Any]:
    """Plain data for programs: all of the result, with what follows from it.

    Example:
        >>> machine = Machine("some CPU", 2, "avx2", 1, "2.15.0")
        >>> to_json(Benchmark("ResNet", (1, 3, 32, 32), 30, machine, (), ()))["layers"] is None
        True
    """
    data = asdict(result)
    if result.layers is not None:
        times = result.layers
        data["layers"]["layers"] = [_layer_json(times, layer) for layer in times.layers]
        data["layers"]["sums"] = [_layer_json(times, layer) for layer in times.sums]
    return data


def _layer_json(times: LayerTimes, layer: LayerTime) -> dict[str, Any]:
    return {
        **asdict(layer),
        "rate": layer.rate,
        "share": times.share(layer),
        "ratios": {name: layer.ratio(name) for name in layer.times if name != PACKED},
    }


def render_benchmark(result: Benchmark, box: Box | None = None) -> RenderableType:
    """Tables for rich: the contestants, the layers if there are any, then machine and reasons.

    Args:
        result: of `benchmark`.
        box: borders of the tables; rich's own by default.
    """
    from rich.console import Group
    from rich.text import Text

    tables = [_contestant_table(result, box)]
    if result.layers is not None:
        tables.append(_layer_table(result.layers, box))
    # Text: a name such as "[b]" must not be taken for markup.
    return Group(*tables, *map(Text, _closing_lines(result)))


def _table(title: str, box: Box | None, names: Sequence[str], texts: int) -> Any:
    """An empty table; the first `texts` columns are no numbers."""
    from rich.table import Table
    from rich.text import Text

    style: dict[str, Any] = {} if box is None else {"box": box}
    table = Table(
        title=Text(title), title_justify="left", header_style="bold", pad_edge=False, **style
    )
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < texts else "right", overflow="fold")
    return table


def _contestant_table(result: Benchmark, box: Box | None) -> Any:
    size = "x".join(map(str, result.input))
    title = f"{result.model}, input {size}, {_threads(result.machine.threads)}"
    names = ("model", "ms", "p10-p90", "packed is", "quartiles")
    table = _table(title, box, names, 1)
    for one in result.contestants:
        spread = f"{one.low:.2f}-{one.high:.2f}"
        faster = ("", "")
        if one.name != PACKED:
            faster = (_faster(one.ratio), f"{one.ratio_low:.2f}-{one.ratio_high:.2f}")
        table.add_row(one.label, f"{one.median:.2f}", spread, *faster)
    return table


def _faster(ratio: float) -> str:
    return f"{ratio:.1f}x faster" if ratio >= 1 else f"{1 / ratio:.1f}x slower"


def _layer_table(times: LayerTimes, box: Box | None) -> Any:
    from rich.text import Text

    named = dict.fromkeys(name for layer in times.layers for name in layer.times)
    peers = [name for name in named if name != PACKED]
    names = ["layer", "kind", "input", "MACs", "packed us", "GMAC/s", "of peak"]
    table = _table("packed layers and float convolutions", box, names, 3)
    for name in peers:
        table.add_column(f"{name} us", justify="right")
        table.add_column("ratio", justify="right")
    for layer in times.layers:
        table.add_row(*map(Text, _layer_cells(times, layer, peers)))
    table.add_section()
    for layer in times.sums:
        table.add_row(*map(Text, _layer_cells(times, layer, peers)), style="bold")
    return table


def _layer_cells(times: LayerTimes, layer: LayerTime, peers: Sequence[str]) -> Iterator[str]:
    share = times.share(layer)
    yield layer.name
    yield layer.kind
    yield "x".join(map(str, layer.input))
    yield big_number(layer.macs)
    yield f"{layer.times[PACKED]:.0f}"
    yield f"{layer.rate / 1e9:.0f}"
    yield "" if share is None else f"{share:.0%}"
    for name in peers:
        known = name in layer.times
        yield f"{layer.times[name]:.0f}" if known else ""
        yield f"{layer.ratio(name):.1f}x" if known else ""


def _closing_lines(result: Benchmark) -> Iterator[str]:
    machine, layers = result.machine, result.layers
    engine = machine.isa or "no native engine"
    yield (
        f"{machine.cpu}, {machine.cores} cores, {engine}, {_threads(machine.threads)}, "
        f"torch {machine.torch}; medians of {result.rounds} rounds"
    )
    peaks = [layer.peak for layer in layers.layers if layer.peak] if layers is not None else []
    if peaks:
        yield f"peak: the engine's innermost loop alone, {max(peaks) / 1e9:.0f} GMAC/s per thread"
    if layers is not None and layers.omitted:
        yield f"not timed by themselves: {', '.join(layers.omitted)}"
    skipped = (*result.skipped, *(layers.skipped if layers is not None else ()))
    for name, reason in dict.fromkeys((each.name, each.reason) for each in skipped):
        yield f"skipped {name}: {reason}"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
