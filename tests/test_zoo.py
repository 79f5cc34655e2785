"""The zoo against its snapshot: a changed pattern shows as a reviewable difference.

By default one model of every class; `pytest -m zoo` takes them all.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from zoo_sweep import SNAPSHOT, Row, coverage, coverage_by_class, examine, header, read

ROWS = read(SNAPSHOT)
SAME_ZOO = SNAPSHOT.read_text(encoding="utf-8").splitlines()[0] == header()[0]
INSTALLED = ", ".join(f"{lib} {importlib.metadata.version(lib)}" for lib in ("timm", "torchvision"))
pytestmark = pytest.mark.skipif(
    not SAME_ZOO, reason=f"the snapshot is of other versions than {INSTALLED}"
)


def sample() -> list[Row]:
    """Of every class the model with the fewest convolutions that are not all kept, if any."""
    chosen: dict[tuple[str, str], Row] = {}
    for row in sorted(ROWS, key=lambda row: (not row.binarized, row.convolutions, row.model)):
        chosen.setdefault((row.library, row.cls), row)
    return sorted(chosen.values(), key=lambda row: row.name)


SAMPLE = sample()


def check(row: Row) -> None:
    assert examine(row.name).facts() == row.facts()


@pytest.mark.parametrize("row", SAMPLE, ids=lambda row: row.name)
def test_sample(row: Row) -> None:
    check(row)


@pytest.mark.zoo
@pytest.mark.parametrize("row", [r for r in ROWS if r not in SAMPLE], ids=lambda row: row.name)
def test_all(row: Row) -> None:
    check(row)


def test_the_snapshot_is_whole() -> None:
    libraries = {row.library for row in ROWS}
    assert libraries == {"timm", "torchvision"}
    assert len(ROWS) == len({row.name for row in ROWS}) >= 1492
    for row in ROWS:
        kept = sum(int(part.partition(":")[2]) for part in row.kept.split(",") if part)
        assert row.binarized + kept == row.convolutions, row.name


def test_nearly_all_that_could_be_is_binarized() -> None:
    expected = {"reads-image", "feeds-output", "single-pixel", "position-code"}
    binarized = sum(row.binarized for row in ROWS)
    odd = 0
    for row in ROWS:
        parts = [part.split(":") for part in row.kept.split(",") if part]
        odd += sum(int(count) for pattern, count in parts if pattern not in expected)
    assert odd <= 0.005 * (binarized + odd)


def test_the_readme_has_the_coverage_table() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert coverage(ROWS) in readme
    assert coverage_by_class(ROWS) in readme
