"""Drawing a summary: a rich table for terminals, plain text for pipes, HTML for notebooks."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from el_convert.report import LayerSummary, Summary

_WIDE = 200  # plain text is for programs and files: lines are not folded


def as_rich(summary: Summary) -> Any:
    """A rich renderable: the table, then totals and reasons."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=_title(summary), title_justify="left", header_style="bold", pad_edge=False)
    for name, numeric in _columns(summary):
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for layer in summary.layers:
        style = {"binarize": "green", "keep": "yellow"}.get(layer.action, "")
        table.add_row(*map(Text, _cells(summary, layer)), style=style)
    return Group(table, *(Text(line) for line in closing_lines(summary)))


def as_text(summary: Summary) -> str:
    """Plain text, no colours, no folding."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=_title(summary), title_justify="left", box=box.ASCII2, pad_edge=False)
    for name, numeric in _columns(summary):
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for layer in summary.layers:
        table.add_row(*map(Text, _cells(summary, layer)))
    stream = io.StringIO()
    Console(file=stream, width=_WIDE, color_system=None, highlight=False).print(table)
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    return "\n".join([*lines, *closing_lines(summary)])


def as_html(summary: Summary) -> str:
    """A self-contained table; kept rows are marked."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name, _ in _columns(summary))
    rows = "".join(_html_row(summary, layer) for layer in summary.layers)
    lines = "<br>".join(html.escape(line) for line in closing_lines(summary))
    return (
        f"<div><b>{html.escape(_title(summary))}</b>"
        f"<div style='max-height:30em;overflow:auto'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div><p>{lines}</p></div>"
    )


def _html_row(summary: Summary, layer: LayerSummary) -> str:
    columns = _columns(summary)
    cells = zip(_cells(summary, layer), columns, strict=True)
    title = f" title='{html.escape(layer.reason, quote=True)}'" if layer.reason else ""
    weight = "font-weight:bold" if layer.action == "keep" else ""
    return (
        f"<tr{title} style='{weight}'>"
        + "".join(
            f"<td style='text-align:{'right' if numeric else 'left'}'>{html.escape(cell)}</td>"
            for cell, (_, numeric) in cells
        )
        + "</tr>"
    )


def _title(summary: Summary) -> str:
    recipe = f", recipe {summary.recipe}" if summary.recipe else ", float"
    size = "x".join(map(str, summary.input_size)) if summary.input_size else "of unknown size"
    return f"{summary.model}{recipe}, input {size}"


def _columns(summary: Summary) -> list[tuple[str, bool]]:
    """(name, whether numeric)"""
    counted = [("output", True), ("float MACs", True), ("1-bit MACs", True), ("OPs", True)]
    return [
        ("layer", False),
        ("kind", False),
        ("action", False),
        ("link", False),
        *(counted if summary.input_size else []),
        ("stored", True),
        ("packed", True),
    ]


def _cells(summary: Summary, layer: LayerSummary) -> list[str]:
    action = f"keep: {layer.pattern}" if layer.action == "keep" else layer.action
    counted = [
        "x".join(map(str, layer.output or ())),
        big_number(layer.float_macs),
        big_number(layer.binary_macs),
        big_number(layer.ops),
    ]
    return [
        layer.path,
        layer.kind,
        action,
        layer.link,
        *(counted if summary.input_size else []),
        byte_size(layer.stored_bytes),
        byte_size(layer.packed_bytes),
    ]


def closing_lines(summary: Summary) -> list[str]:
    """Totals, kept layers with reasons, and activations, as sentences."""
    return [*_totals(summary), *_reasons(summary), *_activation_lines(summary)]


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


def _activation_lines(summary: Summary) -> Iterator[str]:
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
