"""ONNX files: what they hold, that other runtimes agree, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from click.testing import CliRunner
from torch import Tensor, nn

from el_convert import ConversionError, ExportError, binarize, export, exporting, load, pack, save
from el_convert.cli import main
from el_convert.link import ElasticLink
from el_convert.recipes import RECIPES

onnx: Any = pytest.importorskip("onnx", reason="the extra `export` is not installed")
pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
runtime: Any = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")

SIZE = (3, 20, 20)


class Net(nn.Module):
    """Every way in which a gate matches channels, odd counts of bits, strides and groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 9, 3, padding=1)
        self.norm = nn.BatchNorm2d(9)
        self.same = nn.Conv2d(9, 9, 3, padding=1, bias=False)
        self.expand = nn.Conv2d(9, 27, 1)
        self.strided = nn.Conv2d(27, 18, 3, stride=2, padding=1)  # 27 to 18: no whole number
        self.grouped = nn.Conv2d(18, 18, 3, padding=2, dilation=2, groups=3)
        self.depthwise = nn.Conv2d(18, 18, 5, padding=2, groups=18)
        self.squeeze = nn.Conv2d(18, 6, 1)
        self.act = nn.ReLU()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = self.expand(self.same(x))
        x = self.depthwise(self.grouped(self.strided(x)))
        return self.fc(F.adaptive_avg_pool2d(self.squeeze(x), 1).flatten(1))


def trained(
    net: nn.Module, recipe: Any = "elastic-link", size: tuple[int, ...] = SIZE
) -> nn.Module:
    """A binarized network whose gates and norms are no longer as they started."""
    torch.manual_seed(0)
    model: nn.Module = binarize(net, recipe, inplace=True).train()
    for module in model.modules():
        if isinstance(module, ElasticLink) and module.gamma is not None:
            nn.init.uniform_(module.gamma, 0.2, 1.0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("threshold"):
                value.normal_(0, 0.1)
        for _ in range(3):
            model(torch.randn(4, *size))
    return model.eval()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return trained(Net())


def nodes(path: Path) -> set[str]:
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    return {node.op_type for node in graph.node}


def test_two_other_runtimes_agree(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    before = {name: value.clone() for name, value in net.state_dict().items()}
    done = export(net, path, input_size=SIZE, images=torch.rand(5, *SIZE))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert (done.path, done.bytes, done.packed) == (path, path.stat().st_size, 6)
    assert done.images == done.agreeing == 1 + 4 + 5
    assert done.error <= 1e-5
    onnx.checker.check_model(str(path), full_check=True)
    assert onnx.load(path).opset_import[0].version == done.opset
    x = torch.randn(7, *SIZE)
    with torch.no_grad():
        expected = net(x)
    reference = onnx.reference.ReferenceEvaluator(str(path))
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for run in (reference.run, session.run):
        (given,) = run(None, {"input": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(given), expected, rtol=1e-4, atol=1e-4)


def test_weights_are_bits_under_their_own_names(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export(net, path, input_size=SIZE)
    packed = pack(net)
    stored = {
        value.name: torch.from_numpy(onnx.numpy_helper.to_array(value).copy())
        for value in onnx.load(path).graph.initializer
    }
    bits = {name: value for name, value in packed.state_dict().items() if name.endswith("bits")}
    assert len(bits) == 6
    assert all(torch.equal(stored[name], value) for name, value in bits.items())
    assert "stem.weight" in stored
    assert not any(value.metadata_props for value in onnx.load(path).graph.node)


def test_weights_as_floats(net: nn.Module, tmp_path: Path) -> None:
    small, large = tmp_path / "small.onnx", tmp_path / "large.onnx"
    export(net, small, input_size=SIZE)
    export(pack(net), large, input_size=SIZE, float_weights=True)
    assert "BitShift" in nodes(small)
    assert "BitShift" not in nodes(large)
    assert large.stat().st_size > small.stat().st_size


@pytest.mark.parametrize("recipe", ["elastic-reactnet", "bi-real", "xnor", "plain"])
def test_recipes(recipe: str, tmp_path: Path) -> None:
    model = trained(Net(), RECIPES[recipe])
    assert export(model, tmp_path / "net.onnx", input_size=SIZE).error <= 1e-5


@pytest.mark.parametrize("float_weights", [False, True])
def test_transposed_convolutions(float_weights: bool, tmp_path: Path) -> None:
    path = tmp_path / "up.onnx"
    layers = (nn.Conv2d(3, 9, 3), nn.ConvTranspose2d(9, 6, 3, stride=2), nn.Conv2d(6, 4, 1))
    model = trained(nn.Sequential(*layers))
    done = export(model, path, input_size=SIZE, float_weights=float_weights)
    assert (done.packed, done.error <= 1e-5) == (1, True)
    assert ("BitShift" in nodes(path)) == (not float_weights)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        return {"low": self.head(self.conv(x)), "high": x.mean((2, 3))}


def test_several_outputs(tmp_path: Path) -> None:
    path = tmp_path / "two.onnx"
    export(trained(Two()), path, input_size=SIZE)
    assert [value.name for value in onnx.load(path).graph.output] == ["output0", "output1"]


class Gated(nn.Module):
    """A gate that is all but shut, on features whose sign still counts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * torch.sigmoid(x.abs().mean((2, 3), keepdim=True) - 30)
        return self.head(self.conv(x)).mean((2, 3))


def test_a_shut_gate_keeps_the_sign(tmp_path: Path) -> None:
    assert export(trained(Gated()), tmp_path / "net.onnx", input_size=SIZE).error <= 1e-5


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims: int, tmp_path: Path) -> None:
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    layers = (convolution(3, 5, 3), convolution(5, 9, 3), transposed(9, 6, 2), convolution(6, 4, 1))
    model = trained(nn.Sequential(*layers), size=(3, *[9] * dims))
    path = tmp_path / "net.onnx"
    done = export(model, path, input_size=(3, *[9] * dims))
    assert (done.packed, done.error <= 1e-5) == (2, True)
    bits = [v for v in onnx.load(path).graph.initializer if v.name.endswith("bits")]
    assert len(bits) == 2


class Tails(Two):
    """Signs of what an activation gives far from 0, where runtimes and torch round otherwise."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = self.stem(x) * 0.2 - 5
        x = F.gelu(x, approximate=self.kind) if self.kind != "silu" else F.silu(x)
        return self.head(self.conv(x))


@pytest.mark.parametrize("kind", ["tanh", "none", "silu"])
def test_tails_keep_their_signs(kind: str, tmp_path: Path) -> None:
    done = export(trained(Tails(kind)), tmp_path / "net.onnx", input_size=SIZE)
    assert (done.error <= 1e-5, done.agreeing) == (True, done.images)


class Attending(Two):
    """Attention within four blocks of the image."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = self.conv(self.stem(x))  # (N, 16, 18, 18)
        blocks = x.unflatten(2, (2, 9)).unflatten(4, (2, 9)).permute(0, 2, 4, 3, 5, 1)
        tokens = blocks.reshape(-1, 4, 81, 2, 8).transpose(2, 3)
        plain = F.scaled_dot_product_attention(tokens, tokens.flip(3), tokens)
        bias = torch.linspace(-1, 1, 81 * 81).view(81, 81)
        return plain + F.scaled_dot_product_attention(tokens, tokens, plain, attn_mask=bias)


def test_attention_in_blocks(tmp_path: Path) -> None:
    assert export(trained(Attending()), tmp_path / "net.onnx", input_size=SIZE).error <= 1e-5


def test_what_does_not_agree_is_not_written(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_text("as it was")
    with pytest.raises(ExportError, match="more than the tolerance"):
        export(net, path, input_size=SIZE, tolerance=0)
    assert path.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [path]


def test_one_image_may_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where rounding turns a sign: written all the same, and said."""
    file, out = tmp_path / "bnn.pt", tmp_path / "bnn.onnx"
    save(trained(timm.create_model("test_resnet"), size=(3, 64, 64)), file)
    runs_file = exporting._checked

    def second_of_four(path: Path) -> Callable[[Tensor], list[Tensor]]:
        run = runs_file(path)
        return lambda batch: [
            value * (1 + 0.5 * (torch.arange(len(value)) == 1))[:, None] for value in run(batch)
        ]

    monkeypatch.setattr(exporting, "_checked", second_of_four)
    done = export(load(file).eval(), out, input_size=(3, 64, 64))
    assert (done.images, done.agreeing, done.error) == (5, 4, pytest.approx(0.5, rel=1e-4))
    words = ["export", str(file), "--out", str(out), "--image-size", "64"]
    said = CliRunner().invoke(main, words)
    assert "agrees to 1e-04 on 4 of 5 images and differs by up to 5.0e-01" in said.stdout
    assert out.is_file()


class Branching(Two):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = self.conv(self.stem(x))
        return x if float(x.mean()) > 0 else -x


def test_refusals(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(ExportError, match="must be 'onnx', 'torch' or 'openvino', not 'tflite'"):
        export(net, path, format="tflite")
    with pytest.raises(ConversionError, match="binarize"):
        export(Net(), path, input_size=SIZE)
    with pytest.raises(ExportError, match="Branching cannot be exported"):
        export(trained(Branching()), path, input_size=SIZE)
    endless = trained(Net())
    with torch.no_grad():
        endless.get_submodule("fc").bias[0] = float("inf")  # type: ignore[index, operator]
    with pytest.raises(ExportError, match=r"not finite.*calibrate"):
        export(endless, path, input_size=SIZE)
    monkeypatch.setattr("el_convert.exporting.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install 'el_convert\[export\]'"):
        export(net, path, input_size=SIZE)
    assert not path.exists()


def test_the_command(tmp_path: Path) -> None:
    file, out = tmp_path / "bnn.pt", tmp_path / "bnn.onnx"
    save(trained(timm.create_model("test_resnet"), size=(3, 64, 64)), file)
    words = ["export", str(file), "--out", str(out), "--image-size", "64"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"wrote {out} (")
    assert "at 1 bit; ONNX Runtime differs by" in done.stdout
    assert "BitShift" in nodes(out)
    assert CliRunner().invoke(main, [*words[:3], str(tmp_path / "a.pt")]).exit_code == 2
    refused = CliRunner().invoke(main, [*words, "--tolerance", "0"])
    assert refused.exit_code == 1
    assert "nothing was written" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet50", "mobilenetv1_100", "convnext_atto", "googlenet", "densenet121"]
)
def test_models_of_the_zoo(name: str, tmp_path: Path) -> None:
    size = (3, 64, 64)
    if name == "googlenet":
        net: nn.Module = torchvision.models.googlenet(weights=None, init_weights=False)
    else:
        net = timm.create_model(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = export(trained(net, size=size), tmp_path / "model.onnx", input_size=size)
    assert done.error <= 1e-4
    if name == "resnet50":
        assert done.packed == 52
        assert done.bytes <= 12_000_000


@pytest.mark.slow
def test_a_backbone_for_detection(tmp_path: Path) -> None:
    size, path = (3, 96, 96), tmp_path / "backbone.onnx"
    backbone = trained(timm.create_model("resnet18", features_only=True), size=size)
    done = export(backbone, path, input_size=size)
    assert (done.packed, done.error <= 1e-4) == (19, True)
    x = torch.randn(2, *size)
    with torch.no_grad():
        expected = backbone(x)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == [f"output{i}" for i in range(5)]
    for given, wanted in zip(session.run(None, {"input": x.numpy()}), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(given), wanted, rtol=1e-3, atol=1e-3)
