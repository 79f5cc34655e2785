"""Models as folders of `config.json` and `model.safetensors`, as the Hugging Face hub has them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from el_convert.atomic import replace_folder
from el_convert.errors import CheckpointError
from el_convert.header import KEY, json_object

WEIGHTS, CONFIG = "model.safetensors", "config.json"

_LARGEST = 16 << 20  # bytes of a config.json; those of the largest models have a fiftieth of it
_POINTER = b"version https://git-lfs"


def write_safetensors(path: Path, header: str, state: Mapping[str, Tensor]) -> None:
    """A `.safetensors` file whose metadata holds the header."""
    from safetensors.torch import save_file

    unshared = {key: value.clone() for key, value in state.items()}  # as the format demands
    # One entry: safetensors writes several in an order that differs from run to run.
    save_file(unshared, path, metadata={KEY: header})


def read_safetensors(path: Path) -> tuple[str | None, dict[str, Tensor]]:
    """The header in a `.safetensors` file's metadata, where it has one, and its tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as content:
        header = (content.metadata() or {}).get(KEY)
        return header, {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118


def write_folder(folder: Path, header: str, state: Mapping[str, Tensor]) -> None:
    """Write both files. The header is in each: either the weights alone are the model, or both.

    Args:
        folder: to create, or to put them into; other files of it are left alone.
        header: a JSON string.
        state: contiguous tensors on the CPU.

    Raises:
        CheckpointError: the folder is something else's.
        OSError: it cannot be written; it is as it was.
    """
    _refuse_foreign(folder)

    def write(part: Path) -> None:
        write_safetensors(part / WEIGHTS, header, state)
        config = {"library_name": KEY, KEY: json.loads(header)}
        (part / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    replace_folder(folder, WEIGHTS, CONFIG, write)


def _refuse_foreign(folder: Path) -> None:
    """Leave another program's files alone, which by their names could well be there."""
    config, weights = folder / CONFIG, folder / WEIGHTS
    try:
        if os.path.lexists(config):
            _config_header(config)
        elif os.path.lexists(weights) and read_safetensors(weights)[0] is None:
            raise CheckpointError(f"{weights} is no file of el_convert")
    except Exception as error:  # a damaged file may be anybody's
        raise CheckpointError(
            f"{folder} already holds something else ({error}): name another folder, or remove it"
        ) from error


def read_folder(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """Read both files, or the one of them that says what the other says too.

    Args:
        folder: with `model.safetensors`, which may be a link, and `config.json`. Where the
            weights' metadata has the header the other may be missing, but must not say otherwise.

    Returns:
        The header, unchecked, and the tensors.

    Raises:
        CheckpointError: a file is missing or no file of el_convert, or they are of two models.
    """
    weights, config = folder / WEIGHTS, folder / CONFIG
    check_present(weights)
    header, state = read_safetensors(weights)
    said = _config_header(config) if os.path.lexists(config) else None
    if header is None and said is None:
        raise CheckpointError(
            f"{folder} is no model of el_convert: neither does {WEIGHTS} say what it is of, nor is "
            f"there a {CONFIG}"
        )
    if header is None:
        return json.dumps(said), state
    if said is not None and said != _object(weights, header):
        raise CheckpointError(
            f"{folder}: {CONFIG} and {WEIGHTS} are of two models; get both anew, or read the "
            f"weights alone: load({str(weights)!r})"
        )
    return header, state


def _config_header(config: Path) -> dict[str, Any]:
    check_present(config)
    size = config.stat().st_size
    if size > _LARGEST:
        raise CheckpointError(f"{config} is no file of el_convert: it has {size} bytes")
    content = _object(config, config.read_bytes().decode(errors="replace"))
    if not isinstance(content.get(KEY), dict):
        raise CheckpointError(f"{config} is no file of el_convert: it lacks {KEY!r}")
    header: dict[str, Any] = content[KEY]
    return header


def _object(path: Path, text: str) -> dict[str, Any]:
    try:
        return json_object(text)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def check_present(path: Path) -> None:
    """Refuse what stands in the place of a file that was never downloaded, or is none.

    Raises:
        CheckpointError: says what it is instead.
    """
    if path.is_symlink() and not path.exists():
        raise CheckpointError(
            f"{path}: no such file, it is a link to {path.readlink()}: download it anew"
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: {'no file' if path.exists() else 'no such file'}")
    with path.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(
                f"{path} is the pointer that Git LFS has in a file's place: git lfs pull"
            )


def is_saved(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a file, or a folder with weights, rather than a model's name."""
    return Path(path).is_file() or os.path.lexists(Path(path) / WEIGHTS)


def stored_bytes(path: str | os.PathLike[str]) -> int:
    """The size of a saved model: of its file, or of both files of its folder."""
    path = Path(path)
    files = [path / WEIGHTS, path / CONFIG] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.exists())
