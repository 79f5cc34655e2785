"""The README tells the truth: its code runs, its tables are the package's."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import el_convert
from el_convert.patterns import PATTERNS, Pattern, unregister_pattern
from el_convert.recipes import RECIPES, Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE_PATTERN = "clamped-conv2d"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def _patterns_restored() -> Iterator[None]:
    yield
    if any(row.name == EXAMPLE_PATTERN for row in PATTERNS):
        unregister_pattern(EXAMPLE_PATTERN)


@pytest.mark.usefixtures("_patterns_restored")
@pytest.mark.filterwarnings("ignore:the model looks untrained")  # the README trains nothing
def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "readme"}
    code = blocks("python")
    assert len(code) >= 6
    for number, block in enumerate(code):
        exec(compile(block, f"README.md, block {number}", "exec"), namespace)  # noqa: S102
    net, converted = namespace["net"], namespace["again"]
    assert type(net[2]).__name__ == "ClampedConv2d"
    assert type(converted[2]) is el_convert.BinaryConv2d
    assert namespace["result"].modified


def test_one_line_converts() -> None:
    assert 'model = binarize(timm.create_model("resnet50"))' in blocks("python")[0].splitlines()


def test_pattern_example_is_short() -> None:
    (block,) = [block for block in blocks("python") if "register_pattern(" in block]
    (call,) = [
        node
        for node in ast.parse(block).body
        if isinstance(node, ast.Expr)
        and "register_pattern" in (ast.get_source_segment(block, node) or "")
    ]
    assert (call.end_lineno or 0) - call.lineno + 1 <= 10


def test_shell_blocks() -> None:
    first, second = blocks("sh")
    assert first.splitlines() == ["pip install .", "el-convert resnet50 --out bnn.pt"]
    assert second.splitlines() == ['pip install ".[test]"', "pytest"]


def table_row(cells: list[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def recipe_row(recipe: Recipe) -> str:
    link, weight, replaced = recipe.link, recipe.weight, recipe.activation
    gamma = (
        f"{link.gamma} gamma" if link.gamma != "fixed" else f"gamma fixed at {link.gamma_init:g}"
    )
    scale = weight.scale if weight.binary else "none"
    family = "any" if replaced.which == "any" else "ReLU"
    cells = [
        f"`{recipe.name}`",
        recipe.summary,
        f"{link.where}, {link.place}, {gamma}" if link.enabled else "none",
        recipe.input.threshold,
        scale if recipe.input.scale == "none" else f"{scale}, input {recipe.input.scale}",
        "kept" if replaced.replacement == "keep" else f"{family} to {replaced.replacement}",
        ", ".join(f.name for f in fields(recipe.keep) if getattr(recipe.keep, f.name)),
    ]
    return table_row(cells)


def field_rows() -> Iterator[str]:
    """The first cells of every field's row; what follows is prose."""
    recipe = RECIPES["elastic-link"]
    for group in fields(recipe):
        options = getattr(recipe, group.name)
        if not is_dataclass(options):
            continue
        hints = get_type_hints(type(options))
        for leaf in fields(options):
            value = getattr(options, leaf.name)
            every: tuple[Any, ...] = (
                (True, False) if hints[leaf.name] is bool else get_args(hints[leaf.name])
            )
            others = ", ".join(_text(v) for v in every if v != value) or "any number"
            yield f"| `{group.name}.{leaf.name}` | {_text(value)} | {others} |"


def _text(value: Any) -> str:
    return f"`{str(value).lower()}`"


def pattern_row(row: Pattern) -> str:
    switch = f"`{row.option}`" if row.option else ""
    return table_row([f"`{row.name}`", row.action, switch, row.reason])


def test_accuracies_are_those_on_record() -> None:
    script = runpy.run_path(str(ROOT / "examples" / "cifar10.py"))
    lines = script["read"](ROOT / "examples" / "cifar10.csv")
    for rows in ([*script["ROWS"], *script["ABLATIONS"]], script["FORMER_ROWS"]):
        assert f"\n\n{script['table'](lines, rows)}\n\n" in README


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_recipe_table(recipe: Recipe) -> None:
    assert recipe_row(recipe) in README.splitlines()


def test_field_table() -> None:
    assert [row for row in field_rows() if row not in README] == []


def test_pattern_table_in_order() -> None:
    rows = [pattern_row(row) for row in PATTERNS if row.name != EXAMPLE_PATTERN]
    table = [
        line for line in README.splitlines() if re.match(r"\| `.*` \| (keep|binarize) \| ", line)
    ]
    assert table == rows


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", README)
    anchors = {
        "#" + heading.lower().replace(" ", "-")
        for heading in re.findall(r"^#+ ([\w ]+)$", README, re.MULTILINE)
    }
    local = [target for target in targets if not target.startswith("https://")]
    assert local
    for target in local:
        assert target in anchors if target.startswith("#") else (ROOT / target).is_file(), target


def test_changelog_has_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{el_convert.__version__}] - " in changelog
