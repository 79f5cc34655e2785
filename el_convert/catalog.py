"""The names of all models, without importing torch: listing and completion ask for them often."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import os
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path

from el_convert.atomic import replace_file

LIBRARIES = ("timm", "torchvision")
LIST_MODELS = "`el-convert models` lists all"


def model_names(pattern: str = "*") -> list[str]:
    """Every model as "library/name", sorted, matching a glob on either form.

    The list is kept in the user's cache folder, per installed version, because listing takes
    seconds of imports and shell completion asks for it at every key.
    """
    names = _cached_names() or _list_names()
    return [
        name
        for name in names
        if fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name.partition("/")[2], pattern)
    ]


def _cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    versions = "-".join(f"{lib}{importlib.metadata.version(lib)}" for lib in LIBRARIES)
    return Path(root) / "el_convert" / f"models-{versions}.txt"


def _cached_names() -> list[str]:
    try:
        return _cache_file().read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):  # not there yet, or damaged: the caller lists
        return []


def _list_names() -> list[str]:
    import timm
    import torchvision

    listed: Iterable[str] = (
        *(f"timm/{name}" for name in timm.list_models()),
        *(f"torchvision/{name}" for name in torchvision.models.list_models()),
    )
    names = sorted(listed)
    path = _cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda part: _write_lines(part, names))
    except OSError:  # a read-only home only costs time
        return names
    return names


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@cache
def snapshot_counts() -> dict[str, tuple[int, int]]:
    """(binarized, all convolutions) by "library/name", with the default recipe, as recorded.

    Models newer than the record are missing.
    """
    text = resources.files("el_convert").joinpath("zoo_snapshot.tsv").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    columns = rows[0]
    names = [columns.index(name) for name in ("library", "model", "binarized", "convolutions")]
    picked = [[row[index] for index in names] for row in rows[1:]]
    return {f"{lib}/{model}": (int(done), int(total)) for lib, model, done, total in picked}


def bare_names() -> list[str]:
    """Every model's name without its library, each once."""
    return list(dict.fromkeys(name.partition("/")[2] for name in model_names()))
