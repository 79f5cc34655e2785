"""`el-convert report` as a user types it."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest
import timm
from click.testing import CliRunner, Result
from page_reader import Page
from pictures import draw_folder, pack_tar
from torch import nn

from el_convert.checkpoint import load, save
from el_convert.cli import main
from el_convert.convert import binarize
from el_convert.packing import pack
from el_convert.report import summarize

SMALL = ["--image-size", "64", "--batch-size", "5", "--workers", "0"]


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


def refusal(code: int, *words: object) -> str:
    done = run(*words)
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    return done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli-report")


@pytest.fixture(scope="module")
def network(folder: Path) -> Path:
    save(binarize(timm.create_model("test_resnet", num_classes=3)), folder / "bnn.pt")
    return folder / "bnn.pt"


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    draw_folder(folder / "data" / "val")
    return folder / "data"


def test_a_page_with_images(network: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    done = run(
        "report", network, "--data", data, "--out", out, "--images", 6, "--note", "<i>new</i>",
        *SMALL,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"wrote {out} (")
    assert "14 of 15 convolutions at 1 bit" in done.stdout
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert set(page.tables) == {"where", "kept", "signs", "gates", "agreement", "layers"}
    assert page.texts["h1"] == ["timm/test_resnet, binarized"]
    assert "<i>new</i>" in page.text
    assert "on 6 images of data" in page.text
    assert "top-1" in page.texts["dt"]
    assert "input 3x64x64; bnn.pt, written by el_convert" in page.text
    assert str(tmp_path.parent) not in text  # nor any other folder of this machine
    before = summarize(timm.create_model("test_resnet", num_classes=3), (3, 64, 64))
    after = summarize(load(network), (3, 64, 64))
    assert f"{before.stored_bytes / after.packed_bytes:.1f}x smaller" in done.stdout
    assert f"{(before.float_macs or 0) / (after.ops or 1):.1f}x fewer operations" in done.stdout


def test_without_images(network: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    done = run("report", network, "--out", out, "--image-size", 64)
    assert done.exit_code == 0, done.output
    page = Page(out.read_text(encoding="utf-8"))
    assert "signs" not in page.tables
    assert "--data DIR" in page.text


def test_a_tar_of_other_classes_a_packed_file_and_figures(
    network: Path, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    tar = pack_tar(draw_folder(tmp_path / "two", classes=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(pack(load(network)), tmp_path / "small.pt")
    out, figures = tmp_path / "report.html", tmp_path / "figures"
    words = ("report", tmp_path / "small.pt", "--data", tar, "--out", out, "--figures", figures)
    done = run(*words, *SMALL)
    assert done.exit_code == 0, done.output
    assert "two.tar has 2 classes, the model 3" in done.stderr
    page = Page(out.read_text(encoding="utf-8"))
    assert "top-1" not in page.texts["dt"]
    assert "on 16 images of two.tar" in page.text
    assert "packed already" in page.text
    assert len(list(figures.iterdir())) == 4


def test_refusals(
    network: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report.html"
    command = ("report", network, "--out", out)
    assert "must end in .html" in refusal(2, "report", network, "--out", "r.pdf")
    assert "nowhere does not exist" in refusal(1, *command, "--data", tmp_path / "nowhere")
    assert "is a file" in refusal(2, *command, "--figures", network)
    assert "mkdir -p" in refusal(2, *command, "--figures", tmp_path / "a" / "b")
    assert "does not exist" in refusal(2, "report", tmp_path / "none.pt", "--out", out)
    own = tmp_path / "own.pt"
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    save(binarize(net), own)
    assert "what this command does is a function" in refusal(1, "report", own, "--out", out)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = refusal(1, *command, "--figures", tmp_path / "figures")
    assert "pip install 'el_convert[report]'" in missing
    assert [path.name for path in tmp_path.iterdir()] == ["own.pt"]


def test_corrupt_images_are_named(network: Path, tmp_path: Path) -> None:
    images = draw_folder(tmp_path / "bad")
    (images / "class1" / "2.png").write_bytes(b"no image")
    done = run("report", network, "--data", images, "--out", tmp_path / "r.html", *SMALL)
    assert done.exit_code == 0
    assert "1 images do not decode and were skipped" in done.stderr
