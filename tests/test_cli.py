"""The command: results on stdout, everything else on stderr, exit codes that mean something."""

from __future__ import annotations

import fnmatch
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.shell_completion import BashComplete
from click.testing import CliRunner, Result
from tampering import add, layer, put, rewrite, write_good
from torch import nn

from el_convert import RECIPES, binarize, load, plan, save
from el_convert.cli import main

SMALL = ("test_resnet", "--num-classes", "4")


def run(*args: object) -> Result:
    """Run the command; an exception that is not an exit is a traceback for the user."""
    result = CliRunner().invoke(main, [str(arg) for arg in args], prog_name="el-convert")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def succeed(*args: object) -> Result:
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    return result


def refused(code: int, *args: object) -> str:
    """stderr of a run that must exit so, with nothing on stdout."""
    result = run(*args)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Error: " in result.stderr
    return result.stderr.partition("Error: ")[2]


def header_of(path: Path) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(torch.load(path, weights_only=True)["el_convert"])
    return header


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_good(tmp_path_factory.mktemp("good"))


@pytest.fixture
def no_building(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test when a model is built."""
    monkeypatch.setattr("el_convert.zoo.create", lambda *_, **__: pytest.fail("built a model"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_convert_writes_a_file_that_loads(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"bnn{suffix}"
    result = succeed(*SMALL, "--out", out)
    assert names(tmp_path) == [out.name]
    assert "14 of 15 convolutions binarized, 1 kept" in result.stdout
    assert f"wrote {out}" in result.stdout
    wanted = binarize(timm.create_model("test_resnet", num_classes=4))
    assert list(load(out).state_dict()) == list(wanted.state_dict())


def test_the_command_may_be_named(tmp_path: Path) -> None:
    succeed("convert", *SMALL, "--out", tmp_path / "bnn.pt")
    assert names(tmp_path) == ["bnn.pt"]
    assert header_of(tmp_path / "bnn.pt")["source"]["kwargs"] == {"num_classes": 4}


def test_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = succeed(*SMALL, "--dry-run", "--out", "bnn.pt")
    assert names(tmp_path) == []
    assert "wrote" not in result.stdout
    assert "layer2.0.conv1" in result.stdout


def test_the_table_names_every_convolution_and_why_some_stay() -> None:
    result = succeed(*SMALL, "--dry-run")
    decisions = plan(timm.create_model("test_resnet", num_classes=4))
    assert all(decision.path in result.stdout for decision in decisions)
    assert all(d.reason in result.stdout for d in decisions if d.action == "keep")


def test_json_counts_resnet18_right() -> None:
    result = succeed("resnet18", "--dry-run", "--json")
    data = json.loads(result.stdout)
    stem, classifier = 64 * 3 * 7 * 7 * 112 * 112, 512 * 1000
    first_stage = 4 * 64 * 64 * 9 * 56 * 56
    later_stage = (64 * 128 * 9 + 3 * 128 * 128 * 9 + 64 * 128) * 28 * 28
    assert (data["convolutions"], data["binarized"], data["kept"]) == (20, 19, 1)
    assert data["total"]["float_macs"] == stem + classifier
    assert data["total"]["binary_macs"] == first_stage + 3 * later_stage
    assert data["total"]["ops"] == stem + classifier + (first_stage + 3 * later_stage) / 64
    assert data["input_size"] == [3, 224, 224]
    assert data["source"] == "timm/resnet18"
    assert data["file"] is None


def test_json_counts_the_bytes_of_the_file(tmp_path: Path) -> None:
    data = json.loads(succeed(*SMALL, "--json", "--out", tmp_path / "bnn.pt").stdout)
    state = torch.load(tmp_path / "bnn.pt", weights_only=True)["state_dict"]
    assert data["file"] == str(tmp_path / "bnn.pt")
    assert data["total"]["stored_bytes"] == sum(value.nbytes for value in state.values())
    for name in ("float_macs", "binary_macs", "link_macs", "ops"):
        assert data["total"][name] == sum(row[name] for row in data["layers"])


def test_progress_goes_to_stderr_only(tmp_path: Path) -> None:
    result = succeed(*SMALL, "--json", "--out", tmp_path / "bnn.pt")
    assert len(result.stdout.splitlines()) == 1
    for word in ("loading", "building test_resnet", "binarizing", "writing"):
        assert word in result.stderr
        assert word not in succeed(*SMALL, "--out", tmp_path / "bnn.pt").stdout


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_be_chosen(recipe: str) -> None:
    data = json.loads(succeed(*SMALL, "--dry-run", "--json", "--recipe", recipe).stdout)
    assert data["recipe"] == recipe


def test_set_changes_fields_of_every_type(tmp_path: Path) -> None:
    options = ("link.gamma=scalar", "link.gamma_init=0.5", "keep.shortcut=true")
    flags = [part for option in options for part in ("--set", option)]
    succeed(*SMALL, "--out", tmp_path / "bnn.pt", *flags)
    recipe = header_of(tmp_path / "bnn.pt")["recipe"]
    assert recipe["link"]["gamma"] == "scalar"
    assert recipe["link"]["gamma_init"] == 0.5
    assert recipe["keep"]["shortcut"] is True
    loaded: Any = load(tmp_path / "bnn.pt")
    assert torch.equal(loaded.layer1[0].conv1.link.gamma, torch.tensor([0.5]))


def test_keep_leaves_layers_in_float(tmp_path: Path) -> None:
    globs = ("--keep", "layer1.*", "--keep", "*.downsample.*")
    succeed(*SMALL, "--out", tmp_path / "bnn.pt", *globs)
    kept = {row["path"] for row in header_of(tmp_path / "bnn.pt")["kept"]}
    convs = [d.path for d in plan(timm.create_model("test_resnet", num_classes=4))]
    globbed = {p for p in convs if p.startswith("layer1.") or ".downsample." in p}
    assert kept == globbed | {"conv1.0"}
    assert len(globbed) > 2


def test_num_classes(tmp_path: Path) -> None:
    succeed("test_resnet", "--num-classes", "7", "--out", tmp_path / "bnn.pt")
    loaded: Any = load(tmp_path / "bnn.pt")
    assert loaded.get_classifier().out_features == 7
    assert "between 0" in refused(2, "test_resnet", "--dry-run", "--num-classes", 2_000_000)
    refused(2, "test_resnet", "--dry-run", "--num-classes", -1)


@pytest.mark.parametrize("glob", ["test_res*", "timm/test_vit*", "torchvision/vgg1?", "resnet18"])
def test_models_lists_what_matches(glob: str) -> None:
    listed = [line.split("\t")[0] for line in succeed("models", glob).stdout.splitlines()]
    assert listed == sorted(listed)
    assert listed
    for name in listed:
        assert fnmatch.fnmatch(name, glob) or fnmatch.fnmatch(name.partition("/")[2], glob)


def test_models_lists_both_libraries() -> None:
    listed = [line.split("\t")[0] for line in succeed("models").stdout.splitlines()]
    assert {"timm/resnet18", "torchvision/resnet18", "torchvision/squeezenet1_1"} <= set(listed)
    assert len(listed) > 1000


def test_models_says_how_many_would_be_binarized() -> None:
    (line,) = (
        line
        for line in succeed("models", "timm/resnet50").stdout.splitlines()
        if line.startswith("timm/resnet50\t")
    )
    assert line == "timm/resnet50\t52\t53"


def test_models_that_do_not_exist() -> None:
    assert "did you mean 'resnet50'" in refused(2, "models", "resnet5")
    assert "el-convert models" in refused(2, "models", "*nothing*")


def test_inspect_says_what_convert_said(tmp_path: Path) -> None:
    out = tmp_path / "bnn.safetensors"
    written = json.loads(succeed(*SMALL, "--json", "--recipe", "plain", "--out", out).stdout)
    read = json.loads(succeed("inspect", out, "--json").stdout)
    assert {key: read[key] for key in written} == written
    assert f"torch {version('torch')}" in read["created_with"]
    text = succeed("inspect", out).stdout
    assert "timm/test_resnet" in text
    assert "recipe plain" in text
    assert "14 of 15 convolutions binarized" in text


@pytest.mark.parametrize(
    ("args", "near"),
    [
        (["resnet5", "--dry-run"], "'resnet50'"),
        (["timm/resnet5", "--dry-run"], "'timm/resnet50'"),
        (["torchvision/resnet5", "--dry-run"], "'torchvision/resnet50'"),
        (["transformers/resnet50", "--dry-run"], "'resnet50'"),
        ([*SMALL, "--dry-run", "--recipe", "elastic"], "'elastic-link'"),
        ([*SMALL, "--dry-run", "--set", "link.gama=1"], "'link.gamma'"),
        ([*SMALL, "--dry-run", "--set", "link.gamma=chanel"], "channel, scalar, fixed"),
        ([*SMALL, "--dry-run", "--set", "link.gamma_init=much"], "finite number"),
        ([*SMALL, "--dry-run", "--set", "link.gamma_init=nan"], "finite number"),
        ([*SMALL, "--dry-run", "--set", "keep.shortcut=maybe"], "true or false"),
        ([*SMALL, "--dry-run", "--set", "link.gamma"], "FIELD=VALUE"),
        ([*SMALL, "--dry-run", "--keep", "layer4"], "'layer4.*'"),
        ([*SMALL, "--dry-run", "--keep", "layer1.0.conv9"], "'layer1.0.conv1'"),
        (["hf-hub:timm/resnet18", "--dry-run"], "unknown model"),
        (["local-dir:/tmp", "--dry-run"], "unknown model"),
        (["../resnet18", "--dry-run"], "unknown model"),
        (["test_resnet"], "--out FILE"),
        (["convert"], "MODEL"),
        (["inspect"], "FILE"),
        (["inspect", "nowhere.pt"], "does not exist"),
        ([*SMALL, "--dry-run", "--bogus"], "--bogus"),
    ],
)
def test_mistyped_arguments_exit_2_and_name_the_nearest(args: list[str], near: str) -> None:
    assert near in refused(2, *args)


@pytest.mark.usefixtures("no_building")
@pytest.mark.parametrize("name", ["bnn.bin", "bnn", "missing/bnn.pt", "folder.pt"])
def test_an_output_that_cannot_be_is_refused_first(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.pt").mkdir()
    message = refused(2, *SMALL, "--out", tmp_path / name)
    assert "--out" in message
    assert (str(tmp_path / "missing") if "missing" in name else name) in message
    assert names(tmp_path) == ["folder.pt"]


@pytest.mark.usefixtures("no_building")
def test_a_read_only_folder_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.access

    def access(path: Any, mode: int, **options: Any) -> bool:
        return real(path, mode, **options) and not (mode & os.W_OK and Path(path) == tmp_path)

    monkeypatch.setattr(os, "access", access)
    assert f"{tmp_path} is not writable" in refused(2, *SMALL, "--out", tmp_path / "bnn.pt")


@pytest.mark.usefixtures("no_building")
@pytest.mark.parametrize("option", [("--recipe", "elastic"), ("--set", "link.gama=1")])
def test_a_wrong_recipe_is_refused_first(option: tuple[str, str]) -> None:
    refused(2, *SMALL, "--dry-run", *option)


@pytest.mark.parametrize("args", [["test_vit"], [*SMALL, "--keep", "*"]])
def test_nothing_to_binarize_exits_1(tmp_path: Path, args: list[str]) -> None:
    message = refused(1, *args, "--out", tmp_path / "bnn.pt")
    assert "no convolution to binarize" in message
    assert names(tmp_path) == []


def test_a_file_that_cannot_be_written_exits_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("torch.save", full)
    assert "No space left on device" in refused(1, *SMALL, "--out", tmp_path / "bnn.pt")
    assert names(tmp_path) == []


def test_a_tampered_file_exits_1(good: Path, tmp_path: Path) -> None:
    path = rewrite(good, tmp_path / "bad.pt", layer("pattern", "nobody's"))
    assert "nobody's" in refused(1, "inspect", path)
    path.write_bytes(good.read_bytes()[:-100])
    assert "damaged" in refused(1, "inspect", path, "--json")


def test_a_file_without_source_says_how_to_read_it(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1))
    save(binarize(plain), tmp_path / "mine.pt")
    assert "load(path, model=...)" in refused(1, "inspect", tmp_path / "mine.pt")


def test_names_in_a_file_are_not_markup(good: Path, tmp_path: Path) -> None:
    path = rewrite(good, tmp_path / "odd.pt", put("[/bold]", "kept", 0, "pattern"))
    assert "keep: [/bold]" in succeed("inspect", path).stdout


def test_a_file_cannot_steer_the_terminal(good: Path, tmp_path: Path) -> None:
    clear = "\x1b[2J\x1b]0;title\x07"
    left = {"kind": "relu", "action": "leave", "replacement": "", "channels": 0, "reason": clear}
    changes = (
        put(clear, "created_with", "torch"),
        put(clear, "kept", 0, "reason"),
        add({"path": "layer1", **left}, "activations"),
        put(clear, "source", "name"),
    )
    for number, change in enumerate(changes):
        result = run("inspect", rewrite(good, tmp_path / f"{number}.pt", change))
        assert "\x1b" not in result.output


def test_help_is_the_same_by_each_flag() -> None:
    long, short = succeed("--help").stdout, succeed("-h").stdout
    assert "models" in long
    assert short == long
    assert succeed("convert", "-h").stdout == succeed("convert", "--help").stdout


def test_no_arguments_show_the_help() -> None:
    result = run()
    assert result.exit_code == 2
    assert "el-convert resnet50 --out bnn.pt" in result.stderr


def completions(*words: str) -> set[str]:
    *before, incomplete = words
    shell = BashComplete(main, {}, "el-convert", "_EL_CONVERT_COMPLETE")
    return {item.value for item in shell.get_completions(before, incomplete)}


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["resnet1"], {"resnet18", "resnet152"}),
        (["timm/test_res"], {"timm/test_resnet"}),
        (["torchvision/squeeze"], {"torchvision/squeezenet1_0", "torchvision/squeezenet1_1"}),
        (["convert", "resnet1"], {"resnet18"}),
        ([""], {"convert", "models", "inspect"}),
        (["ins"], {"inspect"}),
        (["resnet18", "--re"], {"--recipe"}),
        (["resnet18", "--"], {"--out", "--set", "--keep", "--pretrained", "--dry-run", "--json"}),
        (["resnet18", "--recipe", "elastic"], {"elastic-link", "elastic-reactnet"}),
        (["convert", "resnet18", "--recipe", ""], set(RECIPES)),
        (["inspect", "bnn.pt", "--"], {"--json"}),
    ],
)
def test_completion(words: list[str], wanted: set[str]) -> None:
    found = completions(*words)
    assert wanted <= found
    assert all(value.startswith(words[-1]) for value in found)


def test_bench_takes_names_and_files(tmp_path: Path) -> None:
    done = run("bench", "test_resnet", "--rounds", "1", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert "packed" in json.dumps(result) and "torch" in json.dumps(result)
    file = tmp_path / "bnn.pt"
    assert run("test_resnet", "--out", str(file)).exit_code == 0
    done = run("bench", str(file), "--rounds", "1", "--layers")
    assert done.exit_code == 0, done.output
    assert "packed is" in done.stdout and "conv 3x3" in done.stdout


def test_bench_refuses_what_it_does_not_know() -> None:
    for arguments, message in (
        (("bench", "test_resnett"), "test_resnet"),
        (("bench", "test_resnet", "--against", "onnx"), "onnxruntime"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2
        assert message in done.stderr
