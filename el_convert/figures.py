"""The charts of a report as PNG files, for papers."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from el_convert import page_charts as charts
from el_convert.atomic import replace_file
from el_convert.errors import ExportError
from el_convert.findings import Findings

# The page's colours on white, and textures for who cannot tell them apart.
_COLOURS = {"1-bit": "#0b62a4", "float": "#dd7a13", "linear": "#39424f", "rest": "#8792a0"}
_HATCHES = {"1-bit": "", "float": "////", "linear": "", "rest": ""}
_INK, _MARK = "#18202c", "#c2410c"
_DPI = 200
_WIDTH = 7.0  # inches: the text of a page


def check_figures(folder: str | os.PathLike[str]) -> None:
    """Refuse where figures cannot be drawn, before anything slow.

    Raises:
        ExportError: matplotlib is not installed, or the folder cannot be made.
    """
    place = Path(folder)
    if not place.parent.is_dir() or (place.exists() and not place.is_dir()):
        raise ExportError(f"{place} can be no folder for figures; nothing was written")
    if importlib.util.find_spec("matplotlib") is None:
        raise ExportError(
            "figures need matplotlib, which is not installed: pip install 'el_convert[report]' "
            "brings it; nothing was written"
        )


def draw_figures(findings: Findings, folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Write a report's charts as PNG files: layers, where, and signs and gates if there are any.

    Args:
        findings: what `examine` gave.
        folder: made where it is missing; files of the same names are replaced.

    Returns:
        What was written.

    Raises:
        ExportError: matplotlib is not installed or the folder cannot be made; nothing was written.
    """
    check_figures(folder)
    place = Path(folder)
    place.mkdir(exist_ok=True)
    signs, gates = charts.sign_chart(findings), charts.gate_chart(findings)
    drawings: dict[str, Callable[[Any], None]] = {
        "layers": lambda figure: _draw_layers(figure, findings),
        "where": lambda figure: _draw_where(figure, findings),
    }
    if signs:
        drawings["signs"] = lambda figure: _draw_spreads(figure, findings, signs, "share of +1")
    if gates:
        drawings["gates"] = lambda figure: _draw_spreads(figure, findings, gates, "gamma")
    written = []
    for name, draw in drawings.items():
        written.append(place / f"{name}.png")
        _write(written[-1], draw)
    return tuple(written)


def _write(path: Path, draw: Callable[[Any], None]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 2.4), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    replace_file(path, lambda part: figure.savefig(part, format="png"))


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7, color=_INK)


def _draw_layers(figure: Any, findings: Findings) -> None:
    tracks = charts.tracks(findings)
    figure.set_size_inches(_WIDTH, 1.1 * len(tracks) + 0.6)
    rows = figure.subplots(len(tracks), 1, sharex=True, squeeze=False)[:, 0]
    for axes, track in zip(rows, tracks, strict=True):
        for group in charts.GROUPS:
            places = [i for i, layer in enumerate(findings.layers) if layer.group == group]
            heights = [track.heights[place] for place in places]
            _bars(axes.bar, places, heights, group, 0.8)
        axes.set_title(f"{track.name}: {track.total}", fontsize=8, loc="left")
        axes.set_yticks([])
        _plain(axes)
    _name_stages(rows[-1], findings)
    _legend(rows[0], {layer.group for layer in findings.layers})


def _bars(
    bar: Any, places: Sequence[float], sizes: Sequence[float], group: str, size: float
) -> None:
    style = {"color": _COLOURS[group], "hatch": _HATCHES[group], "edgecolor": "white"}
    bar(places, sizes, size, linewidth=0.2, label=charts.GROUPS[group], **style)


def _legend(axes: Any, groups: set[str]) -> None:
    handles, labels = axes.get_legend_handles_labels()
    known = [charts.GROUPS[group] for group in charts.GROUPS if group in groups]
    pairs = [(h, n) for h, n in zip(handles, labels, strict=True) if n in known]
    axes.legend(
        *zip(*pairs, strict=True), fontsize=7, frameon=False, ncols=4,
        loc="lower right", bbox_to_anchor=(1, 1),
    )  # fmt: skip


def _name_stages(axes: Any, findings: Findings) -> None:
    """The first part of the layers' names, where each begins."""
    begins, ticks, names = 0, [], []
    for name, count in charts.stages(findings.layers):
        ticks.append(begins + (count - 1) / 2)
        names.append(_literal(name))
        begins += count
    turned = {"rotation": 90} if len(ticks) > 12 else {}
    axes.set_xticks(ticks, names, fontsize=7, **turned)
    axes.set_xlim(-0.6, begins - 0.4)


def _literal(name: str) -> str:
    return name.replace("$", r"\$")  # which would start a formula


def _draw_where(figure: Any, findings: Findings) -> None:
    stacks = [
        (what, stack)
        for what, bars in (
            ("operations", charts.operation_stacks(findings)),
            ("bytes", charts.byte_stacks(findings)),
        )
        for stack in bars
    ]
    figure.set_size_inches(_WIDTH, 0.32 * len(stacks) + 0.6)
    axes = figure.subplots()
    groups = {group for _, stack in stacks for group, _ in stack.parts}
    for group in charts.GROUPS:
        widths = [dict(stack.parts).get(group, 0.0) for _, stack in stacks]
        lefts = [_left(stack, group) for _, stack in stacks]
        axes.barh(
            range(len(stacks)), widths, 0.7, lefts, color=_COLOURS[group], hatch=_HATCHES[group],
            edgecolor="white", linewidth=0.2, label=charts.GROUPS[group],
        )  # fmt: skip
    names = [f"{what}, {stack.name}" for what, stack in stacks]
    axes.set_yticks(range(len(stacks)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("%", fontsize=7)
    for place, (_, stack) in enumerate(stacks):
        if not stack.zoomed:
            axes.text(101, place, stack.total, fontsize=7, va="center", color=_INK)
    _plain(axes)
    _legend(axes, groups)


def _left(stack: charts.Stack, group: str) -> float:
    names = [name for name, _ in stack.parts]
    before = names.index(group) if group in names else 0
    return sum(width for _, width in stack.parts[:before])


def _draw_spreads(figure: Any, findings: Findings, chart: charts.SpreadChart, name: str) -> None:
    axes = figure.subplots()
    columns = [(place, one) for place, one in enumerate(chart.columns) if one is not None]
    places = [place for place, _ in columns]
    scale = (chart.top - chart.foot) / 100

    def values(pick: Callable[[charts.SpreadColumn], float]) -> list[float]:
        return [chart.foot + scale * pick(one) for _, one in columns]

    heights = [scale * (one.high - one.low) for _, one in columns]
    feet = values(lambda one: one.low)
    axes.bar(
        places, heights, 0.8, feet, color=_COLOURS["1-bit"], alpha=0.7, label="80 % of channels"
    )
    medians = values(lambda one: one.median)
    axes.hlines(medians, *_ends(places), color=_INK, linewidth=1.5, label="median channel")
    if any(one.start is not None for _, one in columns):
        starts = values(lambda one: one.start or 0.0)
        axes.hlines(starts, *_ends(places), color=_MARK, linewidth=1, label="start")
    axes.set_ylabel(name, fontsize=8)
    margin = 0.03 * (chart.top - chart.foot)
    axes.set_ylim(chart.foot - margin, chart.top + margin)
    axes.grid(axis="y", alpha=0.3)
    _plain(axes)
    _name_stages(axes, findings)
    axes.legend(fontsize=7, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))


def _ends(places: Sequence[float]) -> tuple[list[float], list[float]]:
    return [place - 0.4 for place in places], [place + 0.4 for place in places]
