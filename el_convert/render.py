"""Drawing a summary: a rich table for terminals, plain text for pipes, HTML for notebooks."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from el_convert.planning import functional_notice

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

    from el_convert.report import LayerSummary, Summary

_WIDE = 1000  # plain text is for programs and files: lines are not folded


@dataclass(frozen=True)
class _Column:
    """A column of the table; the greatest `rank` goes first where width is short."""

    name: str
    cell: Callable[[LayerSummary], str]
    rank: int = 0
    numeric: bool = True
    counted: bool = False


_COLUMNS = (
    _Column("layer", lambda layer: layer.path or "(the model)", numeric=False),
    _Column("kind", lambda layer: layer.kind, 2, numeric=False),
    _Column("action", lambda layer: _action(layer), numeric=False),
    _Column("link", lambda layer: layer.link, 3, numeric=False),
    _Column("output", lambda layer: "x".join(map(str, layer.output or ())), 6, counted=True),
    _Column("float MACs", lambda layer: big_number(layer.float_macs), 5, counted=True),
    _Column("1-bit MACs", lambda layer: big_number(layer.binary_macs), 4, counted=True),
    _Column("OPs", lambda layer: big_number(layer.ops), 1, counted=True),
    _Column("stored", lambda layer: byte_size(layer.stored_bytes), 7),
    _Column("packed", lambda layer: byte_size(layer.packed_bytes), 1),
)


def _action(layer: LayerSummary) -> str:
    return f"keep: {layer.pattern}" if layer.action == "keep" else layer.action


def _columns(summary: Summary, width: int = _WIDE) -> list[_Column]:
    """The columns that have something to show and fit into a width."""
    columns = [column for column in _COLUMNS if summary.input_size or not column.counted]
    while _width(summary, columns) > width and max(column.rank for column in columns):
        columns.remove(max(columns, key=lambda column: column.rank))
    return columns


def _width(summary: Summary, columns: list[_Column]) -> int:
    texts = [[column.name, *map(column.cell, summary.layers)] for column in columns]
    return sum(max(map(len, cells)) + 3 for cells in texts)


def _table(summary: Summary, width: int, **style: Any) -> Any:
    from rich.table import Table
    from rich.text import Text

    title = Text(_title(summary))
    table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False, **style)
    columns = _columns(summary, width)
    for column in columns:
        table.add_column(column.name, justify="right" if column.numeric else "left", no_wrap=True)
    for layer in summary.layers:
        colour = {"binarize": "green", "keep": "yellow"}.get(layer.action, "")
        # Text: a name such as "[b]" must not be taken for markup.
        table.add_row(*(Text(column.cell(layer)) for column in columns), style=colour)
    return table


class RichSummary:
    """The table, with the columns that fit, then totals and reasons."""

    def __init__(self, summary: Summary) -> None:
        self.summary = summary

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        from rich.text import Text

        yield _table(self.summary, options.max_width)
        for line in closing_lines(self.summary):
            yield Text(line)


def as_text(summary: Summary) -> str:
    """Plain text, no colours, no folding."""
    from rich import box
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=_WIDE, color_system=None, highlight=False)
    console.print(_table(summary, _WIDE, box=box.ASCII2))
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    return "\n".join([*lines, *closing_lines(summary)])


def as_html(summary: Summary) -> str:
    """A self-contained table; kept rows are marked."""
    head = "".join(f"<th>{html.escape(column.name)}</th>" for column in _columns(summary))
    rows = "".join(_html_row(summary, layer) for layer in summary.layers)
    lines = "<br>".join(html.escape(line) for line in closing_lines(summary))
    return (
        f"<div><b>{html.escape(_title(summary))}</b>"
        f"<div style='max-height:30em;overflow:auto'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div><p>{lines}</p></div>"
    )


def _html_row(summary: Summary, layer: LayerSummary) -> str:
    title = f" title='{html.escape(layer.reason, quote=True)}'" if layer.reason else ""
    weight = "bold" if layer.action == "keep" else "normal"
    cells = "".join(
        f"<td style='text-align:{'right' if column.numeric else 'left'}'>"
        f"{html.escape(column.cell(layer))}</td>"
        for column in _columns(summary)
    )
    return f"<tr{title} style='font-weight:{weight}'>{cells}</tr>"


def _title(summary: Summary) -> str:
    recipe = f", recipe {summary.recipe}" if summary.recipe else ", float"
    size = "x".join(map(str, summary.input_size)) if summary.input_size else "of unknown size"
    return f"{summary.model}{recipe}, input {size}"


def closing_lines(summary: Summary) -> list[str]:
    """Totals, kept layers with reasons, and activations, as sentences."""
    calls = [f"not counted: {functional_notice(summary.functional)}"] if summary.functional else []
    return [*_totals(summary), *_reasons(summary), *calls, *activation_lines(summary)]


def _totals(summary: Summary) -> Iterator[str]:
    if summary.recipe:
        count = f"{len(summary.binarized)} of {len(summary.convolutions)}"
        yield f"{count} convolutions binarized, {len(summary.kept)} kept"
    if summary.float_macs is not None and summary.binary_macs is not None:
        before = summary.float_macs + summary.binary_macs
        yield (
            f"{big_number(before)} MACs: {big_number(summary.float_macs)} float, "
            f"{big_number(summary.binary_macs)} 1-bit"
        )
        yield (
            f"{big_number(summary.ops)} OPs (float MACs + 1-bit MACs / 64; convolutions and "
            f"linear layers), {before / summary.ops if summary.ops else 1:.1f}x fewer; "
            f"links add {big_number(summary.link_macs)} multiply-adds"
        )
    stored, packed = summary.stored_bytes, summary.packed_bytes
    yield (
        f"{byte_size(stored)} as stored, {byte_size(packed)} packed to 1 bit "
        f"({stored / packed if packed else 1:.1f}x smaller); "
        f"{byte_size(summary.other_bytes)} of it in norms, activations and the rest"
    )


def _reasons(summary: Summary) -> Iterator[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in summary.kept:
        groups.setdefault((layer.pattern, layer.reason), []).append(layer.path)
    for (pattern, reason), paths in groups.items():
        yield f"kept, {pattern}: {_some(paths)}: {reason}"


def activation_lines(summary: Summary) -> Iterator[str]:
    """What became of the activations that feed binarized convolutions, as sentences."""
    replaced = [change for change in summary.activations if change.action == "replace"]
    for name in dict.fromkeys(change.replacement for change in replaced):
        changes = [change for change in replaced if change.replacement == name]
        kinds = "/".join(dict.fromkeys(change.kind for change in changes))
        yield f"activations: {len(changes)} {kinds} that feed binarized convolutions became {name}"
        shared = [change for change in changes if change.reason]
        if shared:
            yield f"  {len(shared)} of them with {shared[0].reason}"
    left = [change for change in summary.activations if change.action == "leave"]
    for reason in dict.fromkeys(change.reason for change in left):
        paths = [f"{change.path} ({change.kind})" for change in left if change.reason == reason]
        yield f"activations left: {_some(paths)}: {reason}"


def _some(names: Iterable[str], count: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def big_number(value: float | None) -> str:
    """ "1.81 G", "37.2 M", "0"; "" for None. Powers of 1000."""
    if value is None:
        return ""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def byte_size(value: int) -> str:
    """ "102 MB", "2.9 kB". Powers of 1000."""
    return f"{big_number(value)}B" if value >= 1000 else f"{value} B"
