"""`el-convert train`, `evaluate` and `calibrate` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from pictures import draw_folder, float_network, pack_tar

from el_convert.checkpoint import load
from el_convert.cli import main
from el_convert.latent import binary_layers

SMALL = ["--image-size", "32", "--batch-size", "8", "--workers", "0", "--device", "cpu"]


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    draw_folder(folder / "data" / "train")
    draw_folder(folder / "data" / "val", seed=1)
    return folder / "data"


@pytest.fixture(scope="module")
def network(folder: Path) -> Path:
    path = folder / "bnn.pt"
    done = run("mobilenetv3_small_050", "--num-classes", 3, "--out", path)
    assert done.exit_code == 0, done.output
    return path


@pytest.fixture(scope="module")
def trained(folder: Path, data: Path, network: Path) -> Path:
    path = folder / "trained.pt"
    done = run("train", network, "--data", data, "--out", path, "--epochs", 2, *SMALL)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"wrote {path}: loss ")
    assert "top-1" in done.stdout
    assert "epoch 2/2: loss" in done.stderr
    return path


def test_a_trained_file_is_evaluated_and_packed_to_the_same(
    trained: Path, data: Path, folder: Path
) -> None:
    lines = (trained.with_suffix(".run") / "log.csv").read_text().splitlines()
    small = folder / "small.pt"
    assert run("pack", trained, "--out", small).exit_code == 0
    found = []
    for file in (trained, small):
        done = run("evaluate", file, "--data", data, "--json", "--per-class", *SMALL)
        assert done.exit_code == 0, done.output
        found.append(json.loads(done.stdout))
    assert found[0]["top1"] == pytest.approx(float(lines[-1].split(",")[4]), abs=1e-3)
    assert found[0]["top1"] == found[1]["top1"]
    assert found[0]["images"] == 24
    assert [name for name, _, _ in found[0]["per_class"]] == ["class0", "class1", "class2"]


def test_evaluation_in_words(trained: Path, data: Path) -> None:
    done = run("evaluate", trained, "--data", data / "val", "--per-class", *SMALL)
    assert done.stdout.startswith("top-1 ")
    assert "24 images" in done.stdout
    assert "class2" in done.stdout


def test_a_run_goes_on(trained: Path, data: Path, network: Path, folder: Path) -> None:
    words = ("train", network, "--data", data, "--out", trained, "--epochs", 2, *SMALL)
    again = run(*words)
    assert again.exit_code == 1
    assert "holds a run: go on with --resume" in again.stderr
    before = load(trained).state_dict()
    assert run(*words, "--resume").exit_code == 0
    after = load(trained).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_calibrating_before_training(network: Path, data: Path, folder: Path) -> None:
    out = folder / "fitted.pt"
    done = run("calibrate", network, "--data", data, "--out", out, "--batches", 2, *SMALL)
    assert done.exit_code == 0, done.output
    assert "34 norms and the thresholds of 0 layers, from 2 batches" in done.stdout
    before, after = load(network).state_dict(), load(out).state_dict()
    assert torch.equal(before["conv_stem.weight"], after["conv_stem.weight"])
    assert not torch.equal(before["bn1.running_var"], after["bn1.running_var"])


def test_a_tar_a_teacher_and_float_weights(network: Path, data: Path, folder: Path) -> None:
    tar = pack_tar(data / "train")
    weights = folder / "float.pth"
    import timm

    torch.save(timm.create_model("mobilenetv3_small_050", num_classes=3).state_dict(), weights)
    done = run(
        "train", network, "--data", tar, "--out", folder / "taught.pt", "--epochs", 1,
        "--weights", weights, "--teacher", "mobilenetv3_small_050", "--teacher-weights", weights,
        "--loss", "both", "--steps", 2, *SMALL,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "epoch 2/2" in done.stderr
    assert all(layer.recipe.weight.binary for _, layer in binary_layers(load(folder / "taught.pt")))


def refusal(code: int, *words: object) -> str:
    done = run(*words)
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    return done.stderr


def test_refusals_come_before_any_work(
    network: Path, trained: Path, data: Path, folder: Path
) -> None:
    out = folder / "never.pt"
    train = ("train", network, "--out", out, *SMALL)
    assert "nowhere does not exist" in refusal(1, *train, "--data", folder / "nowhere")
    assert "--num-classes 2" in refusal(1, *train, "--data", draw_folder(folder / "two", 2))
    assert "pass a smaller --batch-size" in refusal(1, *train, "--data", data, "--batch-size", 1000)
    assert "Invalid value for '--steps'" in refusal(2, *train, "--data", data, "--steps", 3)
    assert "must end in .pt" in refusal(2, "train", network, "--data", data, "--out", "x.onnx")
    assert "unknown optimizer" in refusal(2, *train, "--data", data, "--opt", "adamv")
    assert "did you mean" in refusal(2, *train, "--data", data, "--teacher", "resnet5O")
    assert "--device" in refusal(2, *train, "--data", data, "--device", "tpu9")
    small = folder / "packed.pt"
    assert run("pack", trained, "--out", small).exit_code == 0
    packed = refusal(1, "train", small, "--data", data, "--out", out, *SMALL)
    assert "train the file it was packed from" in packed
    other = folder / "four.pth"
    torch.save(float_network(4).state_dict(), other)
    four = ("--teacher", "resnet18", "--teacher-weights", other)
    assert "it lacks" in refusal(1, *train, "--data", data, *four)
    assert not out.exists()
    assert not out.with_suffix(".run").exists()


def test_corrupt_images_are_named(trained: Path, folder: Path) -> None:
    images = draw_folder(folder / "bad")
    (images / "class1" / "2.png").write_bytes(b"no image")
    done = run("evaluate", trained, "--data", images, *SMALL)
    assert done.exit_code == 0
    assert "1 images do not decode and were skipped" in done.stderr
    assert "2.png" in done.stderr
    refused = refusal(1, "evaluate", trained, "--data", images, "--corrupt", "refuse", *SMALL)
    assert "2.png is no readable image" in refused


def test_help_names_every_option_without_torch() -> None:
    done = run("train", "--help")
    assert done.exit_code == 0
    for option in ("--lr", "--mixup", "--no-clip-latent", "--amp", "--teacher", "--resume"):
        assert option in done.stdout
