"""Convert every model of timm and torchvision and write what comes out, one line each.

    python -m tests.zoo_sweep                      all models, to el_convert/zoo_snapshot.tsv
    python -m tests.zoo_sweep --shard 1/2          every second model, to a part of its own
    python -m tests.zoo_sweep --merge 2            parts 1 and 2 to the snapshot
    python -m tests.zoo_sweep --table              the README's coverage tables, from the snapshot
    python -m tests.zoo_sweep 'timm/resnet*' --out /dev/stdout

Models are built on the meta device where they can be, so weights take no memory. A run that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
from torch import nn

import el_convert
from el_convert.atomic import replace_file
from el_convert.catalog import model_names
from el_convert.convert import apply
from el_convert.errors import ConversionError
from el_convert.nn import BinaryLayer
from el_convert.planning import Conversion, plan_sites
from el_convert.sites import Survey, survey
from el_convert.zoo import create, find_source

SNAPSHOT = Path(el_convert.__file__).with_name("zoo_snapshot.tsv")


@dataclass(frozen=True)
class Row:
    """One model of the snapshot.

    Attributes:
        library, model, cls: its names.
        convolutions: distinct convolution modules.
        binarized: how many the default recipe binarizes.
        kept: "pattern:count", comma-separated, by name.
        bare: convolutions that no graph holds, so their surroundings are unknown.
        seconds: CPU time of the conversion; differs from run to run.
    """

    library: str
    model: str
    cls: str
    convolutions: int
    binarized: int
    kept: str
    bare: int
    seconds: float

    @property
    def name(self) -> str:
        """As `el-convert` takes it."""
        return f"{self.library}/{self.model}"

    def facts(self) -> tuple[object, ...]:
        """All that must not differ from run to run."""
        return astuple(self)[:-1]

    def line(self) -> str:
        return "\t".join([*map(str, astuple(self)[:-1]), f"{self.seconds:.2f}"])

    @classmethod
    def parse(cls, line: str) -> Row:
        library, model, kind, convolutions, binarized, kept, bare, seconds = line.split("\t")
        counts = (int(convolutions), int(binarized), kept, int(bare))
        return cls(library, model, kind, *counts, float(seconds))


def header() -> list[str]:
    versions = (f"{lib} {importlib.metadata.version(lib)}" for lib in ("timm", "torchvision"))
    return ["# " + ", ".join(versions), "\t".join(field.name for field in fields(Row))]


def build(name: str) -> nn.Module:
    """The model without weights where its constructor allows it."""
    source = find_source(name)
    try:
        with torch.device("meta"):
            return create(source)
    except ConversionError:  # some constructors read values they have drawn
        return create(source)


def examine(name: str) -> Row:
    """Build and convert one model, in place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own, on construction
        model = build(name)
    start = time.process_time()
    found = survey(model)
    conversion = plan_sites(found.sites)
    apply(model, conversion)
    took = time.process_time() - start
    layers = sum(isinstance(module, BinaryLayer) for module in model.modules())
    if layers != len(conversion.binarized):
        raise AssertionError(f"{name}: {layers} binary layers of {len(conversion.binarized)}")
    return summarized(name, model, found, conversion, took)


def summarized(
    name: str, model: nn.Module, found: Survey, conversion: Conversion, took: float
) -> Row:
    counts = Counter(decision.pattern for decision in conversion.kept)
    if found.functional:
        counts["functional"] = len(found.functional)
    library, _, bare_name = name.partition("/")
    return Row(
        library,
        bare_name,
        type(model).__name__,
        len(conversion.decisions),
        len(conversion.binarized),
        ",".join(f"{pattern}:{count}" for pattern, count in sorted(counts.items())),
        sum(not site.uses for site in found.sites),
        took,
    )


def read(path: Path) -> list[Row]:
    """The rows of a snapshot; none where there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Row.parse(line) for line in lines if not line.startswith(("#", "library\t"))]


def write(path: Path, rows: Iterable[Row]) -> None:
    lines = [*header(), *(row.line() for row in sorted(rows, key=lambda row: row.name))]
    replace_file(path, lambda part: _write_text(part, "\n".join(lines) + "\n"))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


_COUNTS = "models | with something to binarize | convolutions | binarized | kept |"


def coverage(rows: list[Row]) -> str:
    """The README's coverage table, as Markdown."""
    lines = [f"| library | {_COUNTS}", "|---|--:|--:|--:|--:|---|"]
    for library in ("timm", "torchvision"):
        part = [row for row in rows if row.library == library]
        lines.append(f"| {library} | {_counts(part)} |")
    return "\n".join(lines)


def coverage_by_class(rows: list[Row]) -> str:
    """The README's table of every model class, as Markdown."""
    classes: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        classes.setdefault((row.library, row.cls), []).append(row)
    lines = [f"| library | class | {_COUNTS}", "|---|---|--:|--:|--:|--:|---|"]
    for library, kind in sorted(classes, key=lambda key: (key[0], key[1].lower())):
        lines.append(f"| {library} | {kind} | {_counts(classes[library, kind])} |")
    return "\n".join(lines)


def _counts(rows: list[Row]) -> str:
    kept: Counter[str] = Counter()
    for row in rows:
        pairs = (item.split(":") for item in row.kept.split(",") if item)
        kept.update({pattern: int(count) for pattern, count in pairs})
    cells = (
        f"{len(rows):,}",
        f"{sum(row.binarized > 0 for row in rows):,}",
        f"{sum(row.convolutions for row in rows):,}",
        f"{sum(row.binarized for row in rows):,}",
        ", ".join(f"{count:,} {pattern}" for pattern, count in kept.most_common()),
    )
    return " | ".join(cells)


def part_path(index: int, count: int) -> Path:
    return Path(__file__).with_name(f"zoo_snapshot.part-{index}-of-{count}.tsv")


def sweep(names: list[str], path: Path) -> Iterator[Row]:
    """Examine what a part does not hold yet, adding each row as it comes."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    done = {row.name: row for row in read(path)}
    yield from (done[name] for name in names if name in done)
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name in progress.track([n for n in names if n not in done], description="models"):
            row = examine(name)
            with path.open("a", encoding="utf-8") as stream:
                stream.write(row.line() + "\n")
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("glob", nargs="?", default="*")
    parser.add_argument("--shard", default="1/1", help="I/N: part I of N")
    parser.add_argument("--merge", type=int, metavar="N", help="join N parts to the snapshot")
    parser.add_argument("--out", type=Path, help="write there instead")
    parser.add_argument("--table", action="store_true", help="print the README's coverage table")
    options = parser.parse_args()
    if options.table:
        print(coverage(read(SNAPSHOT)), coverage_by_class(read(SNAPSHOT)), sep="\n\n")
        return
    index, count = map(int, options.shard.split("/"))
    if options.merge:
        parts = [part_path(i + 1, options.merge) for i in range(options.merge)]
        write(options.out or SNAPSHOT, [row for part in parts for row in read(part)])
        return
    part = part_path(index, count)
    rows = list(sweep(model_names(options.glob)[index - 1 :: count], part))
    if options.out or count == 1:
        write(options.out or SNAPSHOT, rows)
        part.unlink(missing_ok=True)
    total = sum(row.convolutions for row in rows)
    print(f"{len(rows)} models, {total} convolutions, {sum(r.binarized for r in rows)} binarized")


if __name__ == "__main__":
    main()
