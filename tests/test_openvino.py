"""OpenVINO's files: what OpenVINO itself makes of them, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

from el_convert import Exported, ExportError, binarize, export, pack, save
from el_convert.cli import main
from el_convert.link import ElasticLink
from el_convert.nn_timm import BinaryConv2dSame
from el_convert.openvino_check import run_apart
from el_convert.packed import PackedConv

openvino: Any = pytest.importorskip("openvino", reason="the extra `export` is not installed")
pytest.importorskip("onnx", reason="the extra `export` is not installed")
pytest.importorskip("onnxscript", reason="the extra `export` is not installed")

SIZE = (3, 20, 21)
FITS = ["expand", "shortcut", "wide", "reflecting", "strided", "squeeze", "narrow"]
REASONS = {
    "stem": "it reads the image",
    "grouped": "it has 2 groups",
    "depthwise": "depthwise",
    "odd": "its 12 input channels are not a multiple of 8",
}


class Net(nn.Module):
    """Binary convolutions that fit OpenVINO's and some that do not, a sum of two among them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.expand = nn.Conv2d(8, 32, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(8, 32, 1)
        self.act = nn.ReLU()
        self.wide = nn.Conv2d(32, 32, (5, 3), padding=(4, 2), dilation=2)
        self.reflecting = nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.strided = nn.Conv2d(32, 48, 3, stride=2, padding=1)  # 32 to 48: no whole number
        self.squeeze = nn.Conv2d(48, 12, 1)
        self.odd = nn.Conv2d(12, 24, 3, padding=1)
        self.narrow = nn.Conv2d(24, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = self.act(self.expand(x) + self.shortcut(x))
        x = self.reflecting(self.wide(x))
        x = self.strided(self.depthwise(self.grouped(x)))
        x = self.narrow(self.odd(self.squeeze(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def trained(
    net: nn.Module, recipe: str = "elastic-link", size: tuple[int, ...] = SIZE
) -> nn.Module:
    """A binarized network whose gates, thresholds and norms are no longer as they started."""
    torch.manual_seed(0)
    model: nn.Module = binarize(net, recipe, inplace=True).train()
    for module in model.modules():
        if isinstance(module, ElasticLink) and module.gamma is not None:
            nn.init.uniform_(module.gamma, 0.2, 1.0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("threshold", "shift_in", "shift_out")):
                value.normal_(0, 0.1)
        for _ in range(3):
            model(torch.randn(4, *size))
    return model.eval()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return trained(Net())


def small() -> nn.Module:
    """Two binary convolutions, as most networks have them."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 16, 1), (16, 16, 1), (16, 32, 2)):
        conv = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(32, 5, 1))


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return trained(small())


@pytest.fixture(scope="module")
def written(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    path = tmp_path_factory.mktemp("openvino") / "net.xml"
    return export(net, path, format="openvino", input_size=SIZE, images=torch.rand(5, *SIZE))


def compiled(path: Path, batch: int | None = None) -> Any:
    core = openvino.Core()
    model = core.read_model(path)
    if batch is not None:
        model.reshape({0: [batch, *SIZE]})
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def kernels(model: Any) -> Iterator[str]:
    """Those that its binary convolutions run on."""
    for node in model.get_runtime_model().get_ordered_ops():
        facts = node.get_rt_info()
        if facts["layerType"].astype(str) == "BinaryConvolution":
            yield facts["primitiveType"].astype(str)


def assert_agrees(given: Any, expected: Tensor) -> None:
    bound = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(torch.from_numpy(given.copy()), expected, rtol=0, atol=bound)


def test_openvino_agrees_on_its_1_bit_kernels(net: nn.Module, written: Exported) -> None:
    path = written.path
    files = sorted(path.parent.iterdir())
    assert [file.name for file in files] == ["net.bin", "net.xml"]
    assert written.bytes == sum(file.stat().st_size for file in files)
    assert (sorted(written.binary), written.images, written.opset) == (sorted(FITS), 10, 0)
    assert written.error <= 1e-5
    model = compiled(path)
    found = list(kernels(model))
    assert len(found) == written.packed == len(FITS)
    assert all(kernel.startswith("jit_") and kernel.endswith("_u1") for kernel in found)
    x = torch.randn(1, *SIZE)
    with torch.no_grad():
        assert_agrees(model(x.numpy())["output"], net(x))


def test_what_stays_in_float_has_a_reason(written: Exported) -> None:
    reasons = dict(written.in_float)
    assert set(reasons) == set(REASONS)
    assert all(reasons[name].startswith(reason) for name, reason in REASONS.items())


def test_weights_are_the_bits_of_packed_layers(net: nn.Module, written: Exported) -> None:
    stored = written.path.with_suffix(".bin").read_bytes()
    packed = {name: m for name, m in pack(net).named_modules() if isinstance(m, PackedConv)}
    assert all(packed[name].bits.numpy().tobytes() in stored for name in FITS)


def test_other_batch_sizes(net: nn.Module, written: Exported) -> None:
    x, model = torch.randn(5, *SIZE), compiled(written.path, 5)
    assert len(list(kernels(model))) == len(FITS)
    with torch.no_grad():
        assert_agrees(model(x.numpy())["output"], net(x))


def test_the_batch_size_is_an_option(tiny: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.xml"
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    assert export(tiny, path, format="openvino", input_size=SIZE, batch=3).images == 5
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    x = torch.randn(3, *SIZE)
    with torch.no_grad():
        assert_agrees(compiled(path)(x.numpy())["output"], tiny(x))


@pytest.mark.parametrize("recipe", ["elastic-reactnet", "reactnet", "bi-real", "xnor", "plain"])
def test_recipes(recipe: str, tmp_path: Path) -> None:
    model, path = trained(small(), recipe), tmp_path / "net.xml"
    done = export(model, path, format="openvino", input_size=SIZE)
    assert done.binary == ("3", "6")
    x = torch.randn(1, *SIZE)
    with torch.no_grad():
        assert_agrees(compiled(path)(x.numpy())["output"], model(x))


class Two(nn.Module):
    """Several outputs, padding as TensorFlow's, a layer called twice, a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.low, self.high = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 2, 1)
        self.twice = nn.Conv2d(16, 16, 3, padding=1)
        self.same = timm.layers.Conv2dSame(16, 16, 3, stride=2)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.up(self.twice(self.twice(self.stem(x))))
        return {"low": self.low(self.same(x)), "high": self.high(x)}


def test_several_outputs_and_calls(tmp_path: Path) -> None:
    path = tmp_path / "two.xml"
    model = trained(Two())
    assert isinstance(model.same, BinaryConv2dSame)
    done = export(model, path, format="openvino", input_size=SIZE)
    assert sorted(done.binary) == ["same", "twice"]
    assert dict(done.in_float)["up"] == "transposed, 2d"
    ran, x = compiled(path), torch.randn(1, *SIZE)
    assert len(list(kernels(ran))) == 3
    found = ran(x.numpy())
    with torch.no_grad():
        expected = model(x)
    assert_agrees(found["output0"], expected["low"])
    assert_agrees(found["output1"], expected["high"])


def test_what_does_not_agree_is_not_written(tiny: nn.Module, tmp_path: Path) -> None:
    path, weights = tmp_path / "net.xml", tmp_path / "net.bin"
    path.write_text("as it was")
    weights.write_text("and this")
    with pytest.raises(ExportError, match=r"OpenVINO differs .* more than the tolerance"):
        export(tiny, path, format="openvino", input_size=SIZE, tolerance=0)
    assert (path.read_text(), weights.read_text()) == ("as it was", "and this")
    assert sorted(tmp_path.iterdir()) == [weights, path]


def test_crashes_of_openvino_are_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    for script, message in (("kill -SEGV $$", "crashes"), ("echo no >&2; exit 1", r"\(no\)")):
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        with pytest.raises(ExportError, match=message):
            run_apart(tmp_path / "net.xml", [], tmp_path)


def test_a_machine_without_its_kernels_is_refused(
    tiny: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("el_convert.openvino_export.run_apart", lambda *_: ([], {"3"}))
    with pytest.raises(ExportError, match="runs 1 of 2 binary convolutions on no 1-bit kernel"):
        export(tiny, tmp_path / "net.xml", format="openvino", input_size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_refusals(tiny: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.xml"
    with pytest.raises(ExportError, match=r"must end in \.xml"):
        export(tiny, tmp_path / "net.onnx", format="openvino")
    with pytest.raises(ExportError, match="float_weights is for format 'onnx'"):
        export(tiny, path, format="openvino", float_weights=True)
    with pytest.raises(ExportError, match="at least 1, not 0"):
        export(tiny, path, format="openvino", batch=0)
    with pytest.raises(ExportError, match="another input_size"):
        export(tiny, path, format="openvino", input_size=SIZE, images=torch.rand(2, 3, 9, 9))
    with pytest.raises(ExportError, match="leave it out"):
        export(tiny, tmp_path / "net.onnx", batch=2)
    narrow = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1))
    with pytest.raises(ExportError, match=r"no convolution fits .*1: its 4 input channels"):
        export(trained(narrow), path, format="openvino", input_size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path) -> None:
    file, out = tmp_path / "bnn.pt", tmp_path / "bnn.xml"
    save(trained(timm.create_model("test_resnet"), size=(3, 64, 64)), file)
    words = ["export", str(file), "--to", "openvino", "--image-size", "64", "--out"]
    done = CliRunner().invoke(main, [*words, str(out)])
    assert done.exit_code == 0, done.output
    first, second = done.stdout.splitlines()
    assert first.startswith(f"wrote {out} and bnn.bin (")
    assert "OpenVINO runs 14 convolutions as BinaryConvolution at 1 bit and 1 in float" in first
    assert second.startswith("in float, it reads the image")
    assert second.endswith(": conv1.0")
    assert len(list(kernels(compiled(out)))) == 14
    for wrong in ([str(tmp_path / "a.onnx")], [str(out), "--float-weights"]):
        assert CliRunner().invoke(main, [*words, *wrong]).exit_code == 2
    onnx = ["export", str(file), "--out", str(tmp_path / "a.onnx"), "--batch", "2"]
    assert CliRunner().invoke(main, onnx).exit_code == 2
    refused = CliRunner().invoke(main, [*words, str(out), "--tolerance", "0"])
    assert refused.exit_code == 1
    assert "nothing was written" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("resnet18", 19), ("resnet50", 52)])
def test_every_convolution_of_a_resnet(name: str, layers: int, tmp_path: Path) -> None:
    size, path = (3, 64, 64), tmp_path / "model.xml"
    model = trained(timm.create_model(name), size=size)
    done = export(model, path, format="openvino", input_size=size)
    assert len(done.binary) == len(list(kernels(compiled(path)))) == layers
    assert [name for name, _ in done.in_float] == ["conv1"]
    assert done.error <= 1e-4
