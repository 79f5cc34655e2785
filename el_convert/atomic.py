"""Writing files so that nothing is ever half-written or lost."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a sibling temporary file, then put it in the place of `path` in one step.

    Args:
        path: the file to create or replace; its folder must exist.
        write: fills the temporary file it is given.

    Raises:
        Whatever `write` raises, an interrupt included; then `path` is as it was and the temporary
        file is gone.
    """
    path = _real(path)
    temporary = _sibling(path)
    try:
        write(temporary)
        _flush(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_files(paths: Sequence[Path], write: Callable[[Path], None]) -> None:
    """The same for files that belong together, of which the first is the one that is opened.

    They cannot all change in one step. The first file is taken away before the others change and
    comes last, so that nobody ever finds it beside files of another version: if the process is
    killed in between, it is missing, and what was there lies in `.el_convert-*.tmp` beside it.

    Args:
        paths: the files, in one folder, which must exist.
        write: makes files of the same names in the temporary folder it is given.

    Raises:
        Whatever `write` raises, an interrupt included, and IsADirectoryError; then all files are
        as they were and the temporary folder is gone.
    """
    targets = [_real(path) for path in paths]
    for target in targets:
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder")
    folder = _sibling(targets[0])
    old = folder / "old"
    old.mkdir(parents=True)
    new = [folder / path.name for path in paths]
    kept = [old / path.name for path in paths]
    try:
        write(folder)
        for file in new:
            _flush(file)
        try:
            for target, backup in zip(targets, kept, strict=True):
                if target.exists():
                    target.replace(backup)
            for file, target in reversed(list(zip(new, targets, strict=True))):
                file.replace(target)
        except BaseException:
            _put_back(targets, new, kept)
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_back(targets: Sequence[Path], new: Sequence[Path], kept: Sequence[Path]) -> None:
    """Undo as much of an exchange as was done, the first file last."""
    for target, file, backup in reversed(list(zip(targets, new, kept, strict=True))):
        if backup.exists():
            backup.replace(target)
        elif not file.exists():  # it is at its target, where nothing was
            target.unlink(missing_ok=True)


def replace_folder(folder: Path, main: str, beside: str, write: Callable[[Path], None]) -> None:
    """Put two files into a folder, of which `main` counts with or without the one `beside` it.

    A new folder appears in one step. In one that exists, `beside` is taken away, `main` replaced in
    one step, and the new `beside` put in place: whenever that stops, the folder holds the old
    `main` or the new one, and never beside another's. Other files are left alone. A link is
    replaced, not what it points to: files of a download cache are shared.

    Args:
        folder: to create, or to put the files into; the folder it is in must exist.
        main, beside: the names of the files.
        write: fills the temporary folder it is given with both.

    Raises:
        Whatever `write` raises, an interrupt included; then everything is as it was.
    """
    folder = _real(folder)
    exists = folder.is_dir()
    part = (folder if exists else folder.parent) / _temporary_name()
    try:
        part.mkdir()
        write(part)
        _flush(part / main)
        _flush(part / beside)
        if exists:
            _exchange(folder, part, main, beside)
        else:
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _exchange(folder: Path, part: Path, main: str, beside: str) -> None:
    aside = part / f"{beside}.old"
    for name in (main, beside):
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{folder / name} is a folder")
    try:
        if os.path.lexists(folder / beside):
            (folder / beside).rename(aside)
        (part / main).replace(folder / main)
    finally:
        # An interrupt may come between any two steps: what is in place says which of the two fits.
        fitting = aside if (part / main).exists() else part / beside
        if os.path.lexists(fitting):
            fitting.replace(folder / beside)


def names_folder(path: str | os.PathLike[str], suffixes: tuple[str, ...]) -> bool:
    """Whether a path as it was typed means a folder: it ends with a slash, or is one.

    Args:
        path: to write to.
        suffixes: of files; a folder that ends in one is meant only with the slash.
    """
    text = os.fspath(path)
    if text.endswith(("/", os.sep)):
        return True
    return Path(text).is_dir() and Path(text).suffix not in suffixes


def _temporary_name() -> str:
    return f".el_convert-{secrets.token_hex(8)}.tmp"


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # through a link, not in its place


def _sibling(path: Path) -> Path:
    return path.with_name(_temporary_name())


def _flush(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
