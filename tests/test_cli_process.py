"""The command as its own process, and trained weights found in the libraries' own caches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torchvision
from click.testing import CliRunner, Result
from torch import Tensor

from el_convert import __version__
from el_convert.catalog import model_names
from el_convert.cli import main

COMMAND = Path(sys.executable).with_name("el-convert")
HEAVY = ("torch", "timm", "torchvision")
LIST_IMPORTS = f"""
import sys
from el_convert.cli import main
try:
    main(prog_name="el-convert")
except SystemExit as error:
    print("exit", error.code, *sorted({set(HEAVY)} & set(sys.modules)), file=sys.stderr)
"""
TIMM_WEIGHTS = """
import json, os
from pathlib import Path
import timm, torch
from click.testing import CliRunner
from safetensors.torch import save_file
from el_convert.cli import main

def run(*args):
    result = CliRunner().invoke(main, ["test_resnet", "--pretrained", "--out", "bnn.pt", *args])
    return [result.exit_code, result.stdout, result.stderr, Path("bnn.pt").exists()]

def differing():
    state = torch.load("bnn.pt", weights_only=True)["state_dict"]
    return [key for key in trained if not torch.equal(state[key], trained[key])]

offline = run()
model = timm.create_model("test_resnet")
trained = {k: torch.rand(v.shape).to(v.dtype) for k, v in model.state_dict().items()}
name = "models--" + model.pretrained_cfg["hf_hub_id"].replace("/", "--")
repository, revision = Path(os.environ["HF_HOME"]) / "hub" / name, "0" * 40
(repository / "refs").mkdir(parents=True)
(repository / "refs" / "main").write_text(revision)
(repository / "snapshots" / revision).mkdir(parents=True)
save_file(trained, repository / "snapshots" / revision / "model.safetensors")
results = {"offline": offline}
for name, args in {"as trained": [], "fewer classes": ["--num-classes", "4"]}.items():
    results[name] = [*run(*args), differing()]
print(json.dumps(results))
"""


def process(*command: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **env},
    )


def test_both_ways_to_start_it_say_the_same() -> None:
    module = process(sys.executable, "-m", "el_convert", "--version")
    script = process(COMMAND, "--version")
    assert module.returncode == script.returncode == 0
    assert module.stdout == script.stdout == f"el-convert, version {__version__}\n"
    assert module.stderr == script.stderr == ""


@pytest.mark.parametrize("args", [["--help"], ["convert", "--help"], ["resnet50"], ["bnn", "--x"]])
def test_help_and_mistakes_import_no_torch(args: list[str]) -> None:
    result = process(sys.executable, "-c", LIST_IMPORTS, *args)
    assert result.stderr.splitlines()[-1] == f"exit {0 if '--help' in args else 2}"


def test_a_process_writes_a_file_and_pure_json(tmp_path: Path) -> None:
    out = tmp_path / "bnn.pt"
    result = process(sys.executable, "-m", "el_convert", "test_resnet", "--json", "--out", out)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["file"] == str(out)
    assert "Warning" not in result.stderr
    assert out.stat().st_size > 1_000_000


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["resnet5"], "resnet50"),
        (["ins"], "inspect"),
        (["resnet50", "--rec"], "--recipe"),
        (["resnet50", "--recipe", "pl"], "plain"),
    ],
)
def test_bash_completion_needs_no_torch(words: list[str], wanted: str) -> None:
    assert "timm/resnet50" in model_names()  # listed once, kept for the shell
    env = {
        "_EL_CONVERT_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["el-convert", *words]),
        "COMP_CWORD": str(len(words)),
    }
    result = process(sys.executable, "-c", LIST_IMPORTS, **env)
    assert f"plain,{wanted}" in result.stdout.splitlines()
    assert result.stderr == "exit 0\n"


def test_the_installed_command_completes() -> None:
    model_names()
    words = {"COMP_WORDS": "el-convert timm/test_resn", "COMP_CWORD": "1"}
    result = process(COMMAND, _EL_CONVERT_COMPLETE="bash_complete", **words)
    assert result.stdout == "plain,timm/test_resnet\n"
    source = process(COMMAND, _EL_CONVERT_COMPLETE="bash_source")
    assert "_EL_CONVERT_COMPLETE=bash_complete" in source.stdout


def test_trained_weights_of_timm(tmp_path: Path) -> None:
    script = ["-c", f"import os; os.chdir({str(tmp_path)!r})\n{TIMM_WEIGHTS}"]
    result = process(sys.executable, *script, HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    results = json.loads(result.stdout)
    code, stdout, stderr, written = results["offline"]
    assert (code, stdout, written) == (1, "", False)
    assert "pretrained weights of timm/test_resnet" in stderr
    assert results["as trained"][0] == results["fewer classes"][0] == 0
    assert results["as trained"][-1] == []
    assert results["fewer classes"][-1] == ["fc.weight", "fc.bias"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torchvision's weights, and no network."""

    def no_network(*_: Any, **__: Any) -> NoReturn:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def train(cache: Path, name: str, **options: Any) -> dict[str, Tensor]:
    """Put weights into the cache as if torchvision had downloaded them."""
    model = torchvision.models.get_model(name, weights=None, **options)
    state = {k: torch.rand(v.shape).to(v.dtype) for k, v in model.state_dict().items()}
    url: str = torchvision.models.get_model_weights(name).DEFAULT.url
    torch.save(state, cache / url.rpartition("/")[2])
    return state


def convert(name: str, out: Path, *args: str) -> Result:
    command = [f"torchvision/{name}", "--pretrained", "--out", str(out), *args]
    result = CliRunner().invoke(main, command)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def saved(out: Path, trained: dict[str, Tensor]) -> tuple[dict[str, Any], set[str]]:
    """The source a file names, and which trained tensors it does not hold as they were."""
    content = torch.load(out, weights_only=True)
    state = content["state_dict"]
    lost = {key for key in trained if key not in state or not torch.equal(state[key], trained[key])}
    return json.loads(content["el_convert"])["source"], lost


def test_trained_weights_of_torchvision(cache: Path, tmp_path: Path) -> None:
    trained, out = train(cache, "squeezenet1_1"), tmp_path / "bnn.pt"
    assert convert("squeezenet1_1", out).exit_code == 0
    assert saved(out, trained)[1] == set()
    assert convert("squeezenet1_1", out, "--num-classes", "4").exit_code == 0
    assert saved(out, trained)[1] == {"classifier.1.weight", "classifier.1.bias"}


def test_trained_weights_that_want_another_input(cache: Path, tmp_path: Path) -> None:
    trained, out = train(cache, "googlenet", init_weights=False), tmp_path / "bnn.pt"
    result = convert("googlenet", out)
    assert result.exit_code == 0, result.stderr
    source, lost = saved(out, trained)
    assert source["kwargs"]["transform_input"] is True
    assert {key for key in lost if not key.startswith("aux")} == set()


def test_another_input_with_other_classes(cache: Path, tmp_path: Path) -> None:
    trained, out = train(cache, "googlenet", init_weights=False), tmp_path / "bnn.pt"
    result = convert("googlenet", out, "--num-classes", "4")
    assert result.exit_code == 0, result.stderr
    source, lost = saved(out, trained)
    assert {key for key in lost if not key.startswith("aux")} == {"fc.weight", "fc.bias"}
    assert source["kwargs"]["transform_input"] is True


@pytest.mark.parametrize("args", [[], ["--num-classes", "4"]])
def test_no_weights_and_no_network(cache: Path, tmp_path: Path, args: list[str]) -> None:
    result = convert("squeezenet1_1", tmp_path / "bnn.pt", *args)
    assert result.exit_code == 1
    assert "pretrained weights of torchvision/squeezenet1_1" in result.stderr
    assert "no network" in result.stderr
    assert not (tmp_path / "bnn.pt").exists()


def test_downloading_leaves_stdout_to_the_result(cache: Path, tmp_path: Path) -> None:
    assert convert("squeezenet1_1", tmp_path / "bnn.pt", "--json").stdout == ""
