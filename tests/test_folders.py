"""Folders of config.json and model.safetensors: written whole, read without a network, checked."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tampering import Bomb, float_model
from torch import nn

from el_convert import CheckpointError, binarize, load, pack, save
from el_convert.cli import main
from el_convert.header import KEY

pytestmark = pytest.mark.filterwarnings("ignore:the model looks untrained")

WEIGHTS, CONFIG = "model.safetensors", "config.json"
IMAGE = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)


def model(seed: int = 0, *, packed: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    binary = binarize(float_model())
    return pack(binary.eval()) if packed else binary


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "bnn"
    save(model(), f"{folder}/")
    return folder


@pytest.fixture
def bad(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(saved, tmp_path / "bad")
    return tmp_path / "bad"


def refused(folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_a_folder_gives_the_model_back(tmp_path: Path, packed: bool, half: bool) -> None:
    given = model(packed=packed)
    save(given, f"{tmp_path}/bnn/", half=half)
    assert names(tmp_path) == ["bnn"]
    assert names(tmp_path / "bnn") == [CONFIG, WEIGHTS]
    again = load(tmp_path / "bnn")
    assert again.training is not packed
    if not half:
        assert same(again, given)
        assert torch.equal(again.eval()(IMAGE), given.eval()(IMAGE))
    assert same(load(tmp_path / "bnn" / WEIGHTS), again)  # the weights alone are a file
    state = load_file(tmp_path / "bnn" / WEIGHTS)
    assert set(state) == set(given.state_dict())
    for key, value in given.state_dict().items():
        rounded = value.half() if half and value.is_floating_point() else value
        assert torch.equal(state[key], rounded), key


def test_folders_are_reproducible(saved: Path, tmp_path: Path) -> None:
    save(load(saved), tmp_path)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


def test_the_config_says_what_the_model_is(saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text())
    assert config["library_name"] == "el_convert"
    assert config[KEY]["source"]["name"] == "test_resnet"
    assert config[KEY]["recipe"]["name"] == "elastic-link"


def test_nothing_touches_the_network(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert same(load(saved), model())


def snapshot_of(folder: Path, cache: Path) -> Path:
    """The files as huggingface_hub caches them: links into a store named by content."""
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_snapshots_of_the_hub(saved: Path, tmp_path: Path) -> None:
    snapshot = snapshot_of(saved, tmp_path)
    assert same(load(snapshot), model())
    (tmp_path / "main").symlink_to(snapshot)
    assert same(load(tmp_path / "main"), model())
    before = {path: path.read_bytes() for path in (tmp_path / "blobs").iterdir()}
    save(model(1), snapshot)
    assert same(load(snapshot), model(1))
    assert {path: path.read_bytes() for path in before} == before  # other snapshots share them
    assert not (snapshot / WEIGHTS).is_symlink()


def test_a_snapshot_that_is_not_all_there(saved: Path, tmp_path: Path) -> None:
    snapshot = snapshot_of(saved, tmp_path)
    (snapshot / WEIGHTS).resolve().unlink()
    refused(snapshot, "is a link to .*blobs.*download it anew")
    (snapshot / WEIGHTS).unlink()
    refused(snapshot, "model.safetensors: no such file")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_pointer_of_git_lfs(bad: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    (bad / name).write_text(pointer)
    refused(bad, f"{name} is the pointer that Git LFS has.*git lfs pull")


def test_weights_without_a_header_go_by_the_config(bad: Path, saved: Path) -> None:
    state = load_file(bad / WEIGHTS)
    save_file(state, bad / WEIGHTS, metadata={"format": "pt"})  # as other programs write them
    assert same(load(bad), model())
    (bad / CONFIG).unlink()
    refused(bad, "neither does model.safetensors say")
    save_file(state, bad / WEIGHTS)
    refused(bad, "neither does model.safetensors say")
    shutil.copy(saved / CONFIG, bad / CONFIG)
    state["fc.bias"] = torch.zeros(7)
    save_file(state, bad / WEIGHTS)
    refused(bad, r"does not fit.*fc\.bias should be \[4\]")


def test_a_config_may_be_missing_or_say_more(bad: Path) -> None:
    config = json.loads((bad / CONFIG).read_text())
    (bad / CONFIG).write_text(json.dumps({"license": "mit", **config}, indent=4))
    assert same(load(bad), model())
    (bad / CONFIG).unlink()
    assert same(load(bad), model())


CONFIGS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "damaged"),
    "truncated": ('{"el_convert": {', "damaged"),
    "a list": ("[]", "not an object"),
    "no text": (b"\xff\xfe\x00", "damaged"),
    "another library's": ('{"model_type": "bert"}', "lacks 'el_convert'"),
    "no header": ('{"el_convert": "resnet18"}', "lacks 'el_convert'"),
    "too deep": ('{"a":' + "[" * 100_000, "too deeply"),
    "control characters": ('{"el_convert": {"a": "\\u001b[2J"}}', "control characters"),
    "too large": (" " * (17 << 20), "has 17825792 bytes"),
    "another model's": ('{"el_convert": {"format": 1}}', "are of two models"),
}


@pytest.mark.parametrize(("text", "match"), CONFIGS.values(), ids=CONFIGS)
def test_configs_that_are_refused(bad: Path, text: str | bytes, match: str) -> None:
    (bad / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(bad, match)


def test_hostile_headers_meet_the_checks_of_files(bad: Path) -> None:
    config = json.loads((bad / CONFIG).read_text())
    save_file(load_file(bad / WEIGHTS), bad / WEIGHTS)  # so that the config counts
    for field, value, match in (
        ("source", {"library": "timm", "name": "hf-hub:x/y", "kwargs": {}}, "hf-hub:x/y"),
        ("source", {**config[KEY]["source"], "kwargs": {"pretrained": True}}, "pretrained"),
        ("format", 2, "newer el_convert"),
        ("layers", [], "same layers"),
    ):
        (bad / CONFIG).write_text(json.dumps({KEY: {**config[KEY], field: value}}))
        refused(bad, match)


def test_code_in_a_folder_is_never_run(bad: Path, tmp_path: Path) -> None:
    torch.save({"el_convert": Bomb(tmp_path / "ran")}, bad / WEIGHTS)
    refused(bad, "damaged")
    (bad / WEIGHTS).rename(bad / "pytorch_model.bin")
    refused(bad, "no such file")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.9999])
def test_truncated_weights(bad: Path, part: float) -> None:
    raw = (bad / WEIGHTS).read_bytes()
    (bad / WEIGHTS).write_bytes(raw[: int(len(raw) * part)])
    refused(bad, "damaged")


def test_what_is_no_file(bad: Path, tmp_path: Path) -> None:
    for name in (WEIGHTS, CONFIG):
        (bad / name).unlink()
        os.mkfifo(bad / name)
        refused(bad, f"{name}: no file")
        (bad / name).unlink()
        (bad / name).mkdir()
        refused(bad, f"{name}: no file")
        (bad / name).rmdir()
        save(model(), bad)
    refused(tmp_path / "nowhere", "no such file")


def test_other_files_of_a_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("as it was")
    (tmp_path / ".git").mkdir()
    for seed in (0, 1):
        save(model(seed), tmp_path)
        assert same(load(tmp_path), model(seed))
    assert names(tmp_path) == [".git", "README.md", CONFIG, WEIGHTS]
    assert (tmp_path / "README.md").read_text() == "as it was"


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_another_programs_files_are_left_alone(tmp_path: Path, name: str) -> None:
    if name == CONFIG:
        (tmp_path / name).write_text('{"model_type": "bert"}')
    else:
        save_file({"a": torch.zeros(2)}, tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(CheckpointError, match="already holds something else"):
        save(model(), tmp_path)
    assert (tmp_path / name).read_bytes() == before
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("trouble", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_an_interrupted_save_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, trouble: BaseException
) -> None:
    if there:
        save(model(), f"{tmp_path}/bnn/")

    def torn(_: Any, path: Path, **__: Any) -> NoReturn:
        path.write_bytes(b"half")
        raise trouble

    monkeypatch.setattr("safetensors.torch.save_file", torn)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        save(model(1), f"{tmp_path}/bnn/")
    assert names(tmp_path) == (["bnn"] if there else [])
    if there:
        assert names(tmp_path / "bnn") == [CONFIG, WEIGHTS]
        assert same(load(tmp_path / "bnn"), model())


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from el_convert import binarize, save
from tampering import float_model
torch.manual_seed(1)
model, steps = binarize(float_model()), int(sys.argv[2])
def killing(step):
    def run(self, *args):
        global steps
        steps -= 1
        if steps < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args)
    return run
Path.rename, Path.replace = killing(Path.rename), killing(Path.replace)
save(model, sys.argv[1])
"""


@pytest.mark.parametrize("there", [False, True])
def test_killed_between_any_two_steps_it_is_one_model_or_the_other(
    tmp_path: Path, there: bool
) -> None:
    search = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    found = []
    for steps in range(4 if there else 2):
        folder = tmp_path / f"{steps}"
        if there:
            save(model(), f"{folder}/")
        command = [sys.executable, "-c", KILLED, f"{folder}/", str(steps)]
        done = subprocess.run(command, env=search, capture_output=True, check=False, timeout=120)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        if not folder.exists():
            found.append("nothing")
            continue
        again = load(folder)
        found.append("new" if same(again, model(1)) else "old")
        assert same(again, model(1 if found[-1] == "new" else 0))
    # Steps: the old config away, the weights, the new config; or the folder as a whole.
    assert found == (["old", "old", "new", "new"] if there else ["nothing", "new"])


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("as it was")
    for path in (f"{tmp_path}/file/", f"{tmp_path}/nowhere/bnn/"):
        with pytest.raises(CheckpointError, match=r"could not write.*nothing was changed"):
            save(model(), path)
    (tmp_path / CONFIG).mkdir()
    with pytest.raises(CheckpointError, match=CONFIG):
        save(model(), tmp_path)
    assert names(tmp_path) == [CONFIG, "file"]


def run(*words: object) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_commands_take_folders(tmp_path: Path) -> None:
    folder, small = f"{tmp_path}/bnn/", tmp_path / "small"
    done = run("timm/test_resnet", "--num-classes", 4, "--out", folder)
    assert done.exit_code == 0, done.output
    assert f"wrote {folder} (" in done.stdout
    small.mkdir()
    done = run("pack", folder, "--out", small)
    assert done.exit_code == 0, done.output
    assert names(small) == [CONFIG, WEIGHTS]
    assert type(load(small)) is type(load(folder))
    shown = json.loads(run("inspect", small, "--json").stdout)
    assert shown["packed"]
    assert shown["bytes"] == sum((small / name).stat().st_size for name in names(small))
    done = run("bench", small, "--rounds", 1, "--json")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("out", "match"),
    [
        ("nowhere/bnn/", "does not exist: mkdir -p"),
        ("file/", "is a file"),
        ("bnn", "or in / for a folder"),
    ],
)
def test_mistyped_folders_exit_with_2(tmp_path: Path, out: str, match: str) -> None:
    (tmp_path / "file").write_text("as it was")
    done = run("timm/test_resnet", "--out", f"{tmp_path}/{out}")
    assert done.exit_code == 2
    assert match in " ".join(done.stderr.replace("│", " ").split())
    assert names(tmp_path) == ["file"]
