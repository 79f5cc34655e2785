"""Packed models in files: small, safe, and the same when they come back."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner
from tampering import float_model, put, rewrite
from torch import nn

from el_convert import CheckpointError, PackedConv, binarize, load, pack, save
from el_convert.checkpoint import read
from el_convert.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:the model looks untrained")


def packed_model() -> nn.Module:
    torch.manual_seed(0)
    return pack(binarize(float_model()).eval())


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "good.pt"
    save(packed_model(), path)
    return path


IMAGE = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_gives_the_model_back(suffix: str, tmp_path: Path) -> None:
    model = packed_model()
    save(model, tmp_path / f"small.{suffix}")
    again = load(tmp_path / f"small.{suffix}")
    assert not again.training
    assert torch.equal(again(IMAGE), model(IMAGE))
    save(again, tmp_path / f"again.{suffix}")
    first, second = (tmp_path / f"{name}.{suffix}" for name in ("small", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_a_file_holds_bits(good: Path) -> None:
    state = torch.load(good, weights_only=True)["state_dict"]
    assert state["layer2.0.conv1.bits"].dtype == torch.uint8
    assert "layer2.0.conv1.weight" not in state
    assert read(good)[0].packed
    mapped = torch.load(good, weights_only=True, mmap=True)["state_dict"]
    assert all(torch.equal(mapped[key], state[key]) for key in state)


def test_small_tensors_share_a_record(tmp_path: Path) -> None:
    model = packed_model()
    save(model, tmp_path / "small.pt")
    with zipfile.ZipFile(tmp_path / "small.pt") as archive:
        sizes = [e.file_size for e in archive.infolist() if "/data/" in e.filename]
    state = model.state_dict()
    assert sum(sizes) == sum(value.nbytes for value in state.values())
    assert len(sizes) < len(state) // 5
    stored = torch.load(tmp_path / "small.pt", weights_only=True)["state_dict"]
    assert list(stored) == list(state)
    assert all(torch.equal(stored[key], value) for key, value in state.items())
    assert all(stored[key].stride() == value.contiguous().stride() for key, value in state.items())


def test_models_of_ones_own(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(2))
    net(torch.randn(1, 3, 9, 9))
    packed = pack(binarize(net).eval())
    save(packed, tmp_path / "own.pt")
    x = torch.randn(1, 3, 9, 9)
    assert torch.equal(load(tmp_path / "own.pt", model=net)(x), packed(x))
    conv = nn.Conv2d(8, 8, 3)
    layer = pack(binarize(conv).eval())
    save(layer, tmp_path / "conv.pt")
    again = load(tmp_path / "conv.pt", model=conv)
    assert isinstance(again, PackedConv)
    assert torch.equal(again(x.new_ones(1, 8, 5, 5)), layer(x.new_ones(1, 8, 5, 5)))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_half_rounds_what_is_not_a_bit(suffix: str, tmp_path: Path) -> None:
    model = packed_model()
    save(model, tmp_path / f"half.{suffix}", half=True)
    again, own = load(tmp_path / f"half.{suffix}").state_dict(), model.state_dict()
    for key, value in own.items():
        rounded = value.half().to(value.dtype) if value.is_floating_point() else value
        assert torch.equal(again[key], rounded), key
    stored = read(tmp_path / f"half.{suffix}")[1]
    assert all(v.dtype == torch.float16 for v in stored.values() if v.is_floating_point())


def test_half_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    model = packed_model()
    model.get_parameter("fc.bias").data[0] = 1e6
    with pytest.raises(CheckpointError, match=r"fc\.bias has values beyond float16"):
        save(model, tmp_path / "half.pt", half=True)
    assert not list(tmp_path.iterdir())


def test_resnet50_is_small(tmp_path: Path) -> None:
    packed = pack(binarize(timm.create_model("resnet50")).eval(), inplace=True)
    save(packed, tmp_path / "small.pt")
    save(packed, tmp_path / "half.pt", half=True)
    # 23.4 M weights at 1 bit are 2.9 MB; the classifier alone is 8.2 MB in float32.
    assert (tmp_path / "small.pt").stat().st_size < 11.75e6
    assert (tmp_path / "half.pt").stat().st_size < 7.4e6


@pytest.mark.parametrize(
    ("change", "state", "reason"),
    [
        (put(False, "packed"), None, "missing, first 'conv1.*weight'|missing"),
        (put("yes", "packed"), None, "packed is 'yes'"),
        (put("float8", "stored"), None, "stored is 'float8'"),
        (None, put(torch.zeros(2, 2, dtype=torch.uint8), "layer2.0.conv1.bits"), "should be"),
        (None, put(torch.zeros(2, 2), "layer2.0.conv1.bits"), "should be"),
        (None, lambda state: state.pop("layer2.0.conv1.scale"), "missing"),
    ],
)
def test_changed_files_are_refused(
    good: Path, tmp_path: Path, change: object, state: object, reason: str
) -> None:
    options = {"header": change, "state": state}
    given = {name: value for name, value in options.items() if value is not None}
    bad = rewrite(good, tmp_path / "bad.pt", **given)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=reason):
        load(bad)


def test_the_command(tmp_path: Path) -> None:
    model, run = binarize(float_model()), CliRunner().invoke
    save(model, tmp_path / "bnn.pt")
    small, half = str(tmp_path / "small.pt"), str(tmp_path / "half.safetensors")
    done = run(main, ["pack", str(tmp_path / "bnn.pt"), "--out", small])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"wrote {small} (")
    assert "warning: the model looks untrained" in done.stderr
    again = load(small)(IMAGE)
    assert torch.equal(again, pack(model.eval())(IMAGE))
    # Float convolutions may round in another order: their weights are laid out anew.
    torch.testing.assert_close(again, model(IMAGE), rtol=1e-5, atol=1e-6)
    assert run(main, ["pack", str(tmp_path / "bnn.pt"), "--out", half, "--half"]).exit_code == 0
    shown = run(main, ["inspect", half]).stdout
    assert "packed, float16" in shown
    again = run(main, ["pack", small, "--out", half])
    assert again.exit_code == 1
    assert "packed already" in again.stderr
    assert run(main, ["pack", small]).exit_code == 2
    assert run(main, ["pack", small, "--out", "small.zip"]).exit_code == 2
