"""A report as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from el_convert import page_charts as charts
from el_convert._version import __version__
from el_convert.findings import Findings, LayerFinding
from el_convert.planning import functional_notice
from el_convert.render import activation_lines, big_number, byte_size

_WITHOUT_IMAGES = (
    "Left out, as it takes images: `el-convert report FILE --data DIR` or, in Python, `batches=` "
    "adds it."
)


@dataclass(frozen=True)
class PageTexts:
    """What a page says beside its figures.

    Attributes:
        title: its heading, such as the network's name.
        about: one line on where the network comes from.
        note: a sentence of the user's, such as what it was trained on.
        data: what the images are called.
    """

    title: str
    about: str = ""
    note: str = ""
    data: str = ""


@dataclass(frozen=True)
class Tile:
    """One figure of the headline."""

    value: str
    label: str
    lines: tuple[str, ...] = ()
    unit: str = ""


def as_page(findings: Findings, texts: PageTexts) -> str:
    """The whole page. Every name in it is escaped, and no script but its own can run.

    Args:
        findings: what `examine` gave.
        texts: what to say beside them.

    Returns:
        HTML, in which nothing depends on when or where it was made.
    """
    pages = Environment(
        loader=PackageLoader("el_convert", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assert pages.loader is not None  # noqa: S101  # for mypy
    script = pages.loader.get_source(pages, "page.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return pages.get_template("page.html").render(
        page=_Page(findings, texts),
        script=Markup(script),  # noqa: S704  # the package's own
        script_hash=f"sha256-{digest}",
        version=__version__,
        big_number=big_number,
        byte_size=byte_size,
        share=share,
        percent=percent,
        short=short,
        difference=difference,
        histogram=charts.histogram,
        outline=charts.outline,
        sign_spread=charts.sign_spread,
        gate_spread=charts.gate_spread,
    )


def share(value: float) -> str:
    """ "0.47"."""
    return f"{value:.2f}"


def percent(value: float | None, whole: float | None) -> str:
    """ "12.3 %", "not finite"; "" where either is unknown."""
    if value is None or not whole:
        return ""
    return f"{100 * value / whole:.1f} %" if math.isfinite(value) else "not finite"


def short(value: float) -> str:
    """ "0.833": three digits that count."""
    return f"{value:.3g}"


def difference(value: float | None) -> str:
    """ "2.1e-07", "0", "not finite"; "" for None."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.1e}" if value else "0"


def times(value: float | None) -> str:
    """ "13.1" and the sign of multiplication; "" for None."""
    if value is None:
        return ""
    return f"{value:.1f}\u00d7" if value < 100 else f"{value:.0f}\u00d7"


class _Page:
    """What the template reads."""

    groups = charts.GROUPS
    whole = "(the model)"

    def __init__(self, findings: Findings, texts: PageTexts) -> None:
        self._findings = findings
        self.title, self.about, self.note = texts.title, texts.about, texts.note
        self.after = after = findings.after
        self.layers = findings.layers
        self.counted = findings.cheaper is not None
        self.size = "x".join(map(str, after.input_size or ()))
        self.wide = max(layer.weight_bits for layer in self.layers)
        self.stages = charts.stages(self.layers)
        self.tracks = charts.tracks(findings)
        self.group_rows = charts.group_rows(findings)
        self.all_groups = [row.group for row in self.group_rows]
        self.layer_groups = [group for group in self.all_groups if group != "rest"]
        self.operation_stacks = charts.operation_stacks(findings)
        self.byte_stacks = charts.byte_stacks(findings)
        self.sign_chart = charts.sign_chart(findings)
        self.gate_chart = charts.gate_chart(findings)
        self.kept = [layer for layer in self.layers if layer.after.action == "keep"]
        self.images = _images(findings, texts.data)
        self.no_images = _WITHOUT_IMAGES
        self.link_macs = big_number(after.link_macs) if after.link_macs else ""
        self.with_links = f"{findings.cheaper_with_links or 0:.1f}"
        self.link_shares = any(
            layer.observed and layer.observed.link_share is not None for layer in self.layers
        )
        self.compared = [
            layer
            for layer in self.layers
            if layer.observed and (layer.observed.difference, layer.observed.flips) != (None, None)
        ]

    @property
    def reasons(self) -> list[tuple[str, str, int]]:
        """(rule, reason, how many it kept), in the network's order."""
        counts = Counter((layer.after.pattern, layer.after.reason) for layer in self.kept)
        return [(rule, reason, count) for (rule, reason), count in counts.items()]

    @property
    def tiles(self) -> Iterable[Tile]:
        """The headline."""
        found, after = self._findings, self.after
        before = byte_size(found.before.stored_bytes)
        lines = (f"{before} in float, {byte_size(after.packed_bytes)} packed",)
        yield Tile(times(found.smaller), "smaller", lines)
        if self.counted:
            macs = big_number(found.before.float_macs)
            lines = (f"{macs} float MACs, {big_number(after.ops)} OPs",)
            yield Tile(times(found.cheaper), "fewer operations", lines)
        of = f"of {len(after.convolutions)}"
        one_bit = sum(layer.group == "1-bit" for layer in self.layers)
        yield Tile(str(one_bit), "convolutions at 1 bit", (_kept(self.layers),), of)
        yield from self._answers()

    def _answers(self) -> Iterable[Tile]:
        seen = self._findings.observed
        if seen is None:
            return
        same = (
            ()
            if seen.same_answer is None
            else (f"packed: the same answer on {seen.same_answer:,} of {seen.images:,}",)
        )
        if seen.right is not None:
            value = f"{100 * seen.right / seen.images:.1f}"
            yield Tile(value, "top-1", (f"on {self.images}", *same), "%")
        elif seen.same_answer is not None:
            label, lines = "same answers packed and unpacked", (f"on {self.images}",)
            yield Tile(f"{seen.same_answer:,}", label, lines, f"of {seen.images:,}")

    @property
    def facts(self) -> list[str]:
        """What else conversion did, in sentences."""
        calls = self.after.functional
        notice = [f"Not counted: {functional_notice(calls)}"] if calls else []
        linear = sum(layer.group == "linear" for layer in self.layers)
        stay = [f"{linear} linear layer{'s stay' if linear > 1 else ' stays'} in float."]
        return [*(stay if linear else []), *notice, *activation_lines(self.after)]

    @property
    def sign_sentence(self) -> str:
        """What to see in the chart of signs."""
        shares = [layer.observed.positive for layer in self.layers if layer.observed]
        constant = sum(layer.observed.constant for layer in self.layers if layer.observed)
        return f"{constant:,} of {sum(map(len, shares)):,} channels are constant here."

    @property
    def gate_scalar(self) -> bool:
        """Whether a layer has one gamma for all channels."""
        return all(len(layer.gate.values) == 1 for layer in self.layers if layer.gate)

    @property
    def gate_sentence(self) -> str:
        """What to see in the chart of gates."""
        gates = [layer.gate for layer in self.layers if layer.gate]
        if not any(gate.learned for gate in gates):
            return f"This recipe fixes it at {short(gates[0].start)}."
        ratios = [median(gate.values) / gate.start for gate in gates if gate.start]
        ratios = [ratio for ratio in ratios if math.isfinite(ratio)]
        sentence = ""
        if ratios:
            sentence = (
                f"Over {len(ratios)} layers the median gamma went to {min(ratios):.2f} to "
                f"{max(ratios):.2f} of where it started ({median(ratios):.2f} in the median layer)."
            )
        if self.link_shares:
            powers = [layer.observed.link_share for layer in self.layers if layer.observed]
            known = [power for power in powers if power is not None and math.isfinite(power)]
            if known:
                sentence += (
                    f" In the median layer links give {100 * median(known):.0f} % of the power."
                )
        return sentence

    @property
    def agreement_sentence(self) -> str:
        """How packed and unpacked networks agree as a whole."""
        seen = self._findings.observed
        if seen is None or seen.difference is None:
            return ""
        same = (
            ""
            if seen.same_answer is None
            else f"both networks say the same class for {seen.same_answer:,}, and "
        )
        alike = (
            "their outputs are equal to the last bit"
            if seen.difference == 0
            else f"their outputs differ by {difference(seen.difference)} of the largest at most"
        )
        layers = " So are those of every layer." if self.agrees else ""
        return f"On {self.images} {same}{alike}.{layers}"

    @property
    def agrees(self) -> bool:
        """Whether nothing at all differs between packed and unpacked network."""
        seen = self._findings.observed
        return seen is not None and not any(
            (seen.difference, *(d for one in seen.layers for d in (one.difference, one.flips)))
        )

    @property
    def not_compared(self) -> str:
        """Why there is no comparison."""
        if self._findings.packed:
            return "This network is packed already: there is nothing unpacked to compare it with."
        if self._findings.observed is None:
            return _WITHOUT_IMAGES
        return "No layer of it can be packed."

    def share_of(self, layer: LayerFinding) -> str:
        """How much of its output's power a layer's link gives, in words."""
        return percent(layer.observed.link_share, 1.0) if layer.observed else ""

    def describe(self, layer: LayerFinding) -> str:
        """A layer in one line."""
        before, after = layer.before, layer.after
        bits = f"{layer.weight_bits}-bit weights, {layer.input_bits}-bit inputs"
        operations = (
            f"{big_number(before.float_macs)} MACs, {big_number(after.ops)} OPs after; "
            if self.counted
            else ""
        )
        sizes = f"{byte_size(before.stored_bytes)}, {byte_size(after.packed_bytes)} after"
        return f"{layer.path or self.whole}: {after.kind}, {bits}; {operations}{sizes}"


def _images(findings: Findings, data: str) -> str:
    count = findings.observed.images if findings.observed else 0
    number = f"{count:,} image{'' if count == 1 else 's'}"
    return f"{number} of {data}" if data else number


def _kept(layers: Iterable[LayerFinding]) -> str:
    """ "in float: conv1 (reads-image), 2 linear layers"."""
    kept: dict[str, list[str]] = {}
    linear = 0
    for layer in layers:
        if layer.after.action == "keep":
            kept.setdefault(layer.after.pattern, []).append(layer.path)
        linear += layer.group == "linear"
    parts = [
        f"{paths[0]} ({rule})" if len(paths) == 1 else f"{len(paths)} {rule}"
        for rule, paths in kept.items()
    ]
    parts += [f"{linear} linear layer{'s' if linear > 1 else ''}"] if linear else []
    return f"in float: {', '.join(parts)}" if parts else "nothing in float"
