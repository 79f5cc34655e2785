"""A file is replaced whole or stays as it was, whatever interrupts the writing."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from torch import nn

from el_convert import CheckpointError, binarize, load, save
from el_convert.atomic import replace_files

HALF = b"the first half of a file"
WRITERS = {".pt": "torch.save", ".safetensors": "safetensors.torch.save_file"}
TROUBLES = {
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "interrupt": KeyboardInterrupt(),
    "exit": SystemExit(3),
}
NET = """
import sys
from torch import nn
from el_convert import CheckpointError, binarize, save
plain = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(),
                      nn.Conv2d(64, 2, 1))
model = binarize(plain)
"""
DISK_FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for path in sys.argv[1:]:
    try:
        save(model, path)
    except CheckpointError as error:
        print("refused:", error)
"""
KILLED = """
import os, signal
from pathlib import Path
from unittest import mock
def torn(content, target, *args, **kwargs):
    if hasattr(target, "write"):
        target.write(b"half")
        target.flush()
    else:
        Path(target).write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
with mock.patch("torch.save", torn), mock.patch("safetensors.torch.save_file", torn):
    save(model, sys.argv[1])
"""


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )


def tear(monkeypatch: pytest.MonkeyPatch, suffix: str, trouble: BaseException) -> None:
    """Make the format's writer fail halfway, as it would on a full disk or at Ctrl-C."""

    def torn(content: Any, target: Any, *args: Any, **kwargs: Any) -> NoReturn:
        if hasattr(target, "write"):
            target.write(HALF)
        else:
            Path(target).write_bytes(HALF)
        raise trouble

    monkeypatch.setattr(WRITERS[suffix], torn)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def python(code: str, *args: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("old", [b"what was there before", None])
def test_an_interrupted_save_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, trouble: str, old: bytes | None
) -> None:
    path = tmp_path / f"bnn{suffix}"
    if old is not None:
        path.write_bytes(old)
    tear(monkeypatch, suffix, TROUBLES[trouble])
    expected = CheckpointError if trouble == "full" else type(TROUBLES[trouble])
    with pytest.raises(expected):
        save(binarize(small_net()), path)
    assert names(tmp_path) == ([] if old is None else [path.name])
    assert old is None or path.read_bytes() == old


def test_the_refusal_says_what_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tear(monkeypatch, ".pt", TROUBLES["full"])
    with pytest.raises(CheckpointError) as caught:
        save(binarize(small_net()), tmp_path / "bnn.pt")
    message = str(caught.value)
    assert "bnn.pt" in message
    assert "No space left on device" in message
    assert "nothing was changed" in message


@pytest.mark.parametrize("suffix", WRITERS)
def test_data_that_does_not_reach_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    def refuse(descriptor: int) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / f"bnn{suffix}"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(binarize(small_net()), path)
    assert names(tmp_path) == [path.name]
    assert path.read_bytes() == b"old"


def test_a_name_that_cannot_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "bnn.pt").mkdir()
    with pytest.raises(CheckpointError, match=r"bnn\.pt"):
        save(binarize(small_net()), tmp_path / "bnn.pt")
    assert names(tmp_path) == ["bnn.pt"]
    assert names(tmp_path / "bnn.pt") == []


@pytest.mark.parametrize("suffix", WRITERS)
def test_success_leaves_the_file_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    path, plain = tmp_path / f"bnn{suffix}", small_net()
    path.write_bytes(b"old")
    save(binarize(plain), path)
    assert names(tmp_path) == [path.name]
    assert type(load(path, model=plain)) is nn.Sequential


def test_the_file_has_the_usual_permissions(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        save(binarize(small_net()), tmp_path / "bnn.pt")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "bnn.pt").stat().st_mode) == 0o640


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    paths = [tmp_path / f"bnn{suffix}" for suffix in WRITERS]
    for path in paths:
        path.write_bytes(b"old")
    result = python(NET + DISK_FULL, *paths)
    assert result.returncode == 0, result.stderr
    assert names(tmp_path) == sorted(path.name for path in paths)
    for path, line in zip(paths, result.stdout.splitlines(), strict=True):
        assert path.read_bytes() == b"old"
        assert line.startswith(f"refused: could not write {path}")
        assert "File too large" in line


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_process_killed_while_writing(tmp_path: Path, suffix: str) -> None:
    path, plain = tmp_path / f"bnn{suffix}", small_net()
    save(binarize(plain), path)
    before = path.read_bytes()
    result = python(NET + KILLED, path)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert path.read_bytes() == before
    save(binarize(plain), path)
    assert type(load(path, model=plain)) is nn.Sequential


def pair(folder: Path, text: str) -> None:
    (folder / "a.xml").write_text(f"{text} graph")
    (folder / "a.bin").write_text(f"{text} weights")


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("broken", range(5))
def test_files_that_belong_together(
    there: bool, broken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at any move, all are as they were; at none, all are new."""
    paths = [tmp_path / "a.xml", tmp_path / "a.bin"]
    if there:
        pair(tmp_path, "old")
    before = contents(tmp_path)
    moves, replace = 0, Path.replace
    moving = 4 if there else 2

    def interrupted(self: Path, target: Path) -> Path:
        nonlocal moves
        moves += 1
        visible = contents_of_files(tmp_path)
        assert "a.xml" not in visible or visible["a.bin"][:3] == visible["a.xml"][:3]
        if moves == broken + 1:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    if broken < moving:
        with pytest.raises(KeyboardInterrupt):
            replace_files(paths, lambda folder: pair(folder, "new"))
        assert contents(tmp_path) == before
    else:
        replace_files(paths, lambda folder: pair(folder, "new"))
        assert contents(tmp_path) == {"a.xml": "new graph", "a.bin": "new weights"}


def contents_of_files(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir() if file.is_file()}


def test_files_whose_writing_fails(tmp_path: Path) -> None:
    pair(tmp_path, "old")
    before = contents(tmp_path)

    def half(folder: Path) -> None:
        (folder / "a.xml").write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")

    paths = [tmp_path / "a.xml", tmp_path / "a.bin"]
    with pytest.raises(OSError, match="No space"):
        replace_files(paths, half)
    with pytest.raises(FileNotFoundError):  # the second was not made
        replace_files(paths, lambda folder: (folder / "a.xml").touch())
    assert contents(tmp_path) == before
    with pytest.raises(IsADirectoryError):
        replace_files([tmp_path / "b.xml", tmp_path], lambda folder: None)
