"""Imports go one way, and importing the package is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import el_convert

PACKAGE = Path(el_convert.__file__).parent

# Each layer may import from those above it, and from its own line where that is not circular.
LAYERS = (
    ("_version",),
    ("errors", "atomic", "bits", "train_options"),
    ("agreement", "openvino_check", "run_state", "kernels", "recipes", "tracing", "catalog"),
    ("channels", "functional"),
    (
        "calls",
        "console",
        "link",
        "onnx_graph",
        "processes",
        "run_log",
        "slopes",
        "torch_export",
        "watcher",
    ),
    ("facts", "openvino_graph"),
    ("sites", "nn", "objective"),
    ("activations", "latent", "nn_timm", "tail"),
    ("fast_path", "patterns"),
    ("planning",),
    ("convert",),
    ("datasets", "float_weights", "graphs", "linear", "packed", "stem", "zoo"),
    ("calibration", "evaluation", "fusion"),
    ("chain_structure", "stepping"),
    ("chains",),
    ("header", "limits", "packing", "render", "state"),
    ("folders",),
    ("checkpoint", "openvino_export", "report", "training"),
    ("observation", "peers", "progress", "timings"),
    ("benchmark", "exporting", "findings"),
    ("page_charts",),
    ("figures", "page"),
    ("reporting",),
    ("cli_files", "cli_options"),
    ("cli_export", "cli_report", "cli_training"),
    ("cli",),
    ("__main__", "__init__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
HEAVY = {"timm", "torchvision", "click", "rich"}
ALLOWED_HEAVY = {
    "cli": {"click", "rich"},
    "cli_export": {"click"},
    "cli_files": {"click"},
    "cli_options": {"click"},
    "cli_report": {"click"},
    "cli_training": {"click"},
    "console": {"click", "rich"},
    "datasets": {"timm"},
    "float_weights": {"timm"},
    "objective": {"timm"},
    "progress": {"rich"},
    "stepping": {"timm"},
    "render": {"rich"},
    "timings": {"rich"},
    "zoo": {"timm", "torchvision"},
    "catalog": {"timm", "torchvision"},
}
FILES = {path.stem: path for path in PACKAGE.glob("*.py")}
KERNELS = {path.stem: path for path in (PACKAGE / "kernels").glob("*.py")}
KERNEL_LAYERS = (
    "geometry", "structures", "version", "buffers", "memory_plan", "native", "chain", "passes",
    "reference", "operator", "__init__",
)  # fmt: skip
MODULES = sorted({*FILES, "kernels"})


def imported(path: Path) -> tuple[set[str], set[str]]:
    """(modules of this package, top-level packages) imported anywhere in a file."""
    own: set[str] = set()
    others: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "el_convert":
                names = [f"el_convert.{alias.name}" for alias in node.names]
        for name in names:
            top, _, rest = name.partition(".")
            (own if top == "el_convert" else others).add(rest if top == "el_convert" else top)
    own = {name if path.parent.name == "kernels" else name.split(".")[0] for name in own}
    return own, others


def test_every_module_has_a_place() -> None:
    assert set(MODULES) == set(LEVEL)


@pytest.mark.parametrize("name", [name for name in FILES if name != "__init__"])
def test_imports_go_one_way(name: str) -> None:
    own, others = imported(FILES[name])
    if name == "render":
        own.discard("report")  # for its types alone
    for used in own:
        assert LEVEL[used] < LEVEL[name], f"{name} imports {used}"
    assert others & HEAVY <= ALLOWED_HEAVY.get(name, set())


@pytest.mark.parametrize("name", KERNEL_LAYERS)
def test_kernels_import_one_way(name: str) -> None:
    assert set(KERNEL_LAYERS) == set(KERNELS)
    own, others = imported(KERNELS[name])
    below = {f"kernels.{module}" for module in KERNEL_LAYERS[: KERNEL_LAYERS.index(name)]}
    assert own <= below | {"bits"}
    assert not others & HEAVY


ENGINE = Path(__file__).parents[1] / "el_convert" / "kernels" / "source"
SOURCES = [*FILES.values(), *KERNELS.values(), *ENGINE.iterdir()]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_files_are_one_idea(path: Path) -> None:
    assert path.stem not in ("utils", "common", "core", "base", "helpers")
    assert len(path.read_text().splitlines()) <= 400


def loaded(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded after running code."""
    wanted = sorted(HEAVY | {"torch"})
    script = f"{code}\nimport sys\nprint([n for n in {wanted} if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(ast.literal_eval(run.stdout.splitlines()[-1]))


def test_import_is_lean() -> None:
    assert loaded("import el_convert; dir(el_convert); el_convert.__version__") == set()
    assert loaded("from el_convert import binarize, load, save, summarize") == {"torch"}


def test_no_module_hides_a_public_name() -> None:
    # Importing a submodule sets it as an attribute of the package.
    assert set(el_convert.__all__) & set(MODULES) == set()


def test_public_names_exist() -> None:
    assert dir(el_convert) == sorted(el_convert.__all__)
    for name in el_convert.__all__:
        assert getattr(el_convert, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'binarise'"):
        _ = el_convert.binarise  # type: ignore[attr-defined]
