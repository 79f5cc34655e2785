"""Programs of torch.export: read back elsewhere they agree, and what does not is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
import torch._inductor
from click.testing import CliRunner
from test_exporting import SIZE, Branching, Net, Two, trained
from torch import Tensor, nn

from el_convert import ExportError, export, save
from el_convert.cli import main

ELSEWHERE = """
import sys
import torch
import el_convert.kernels
program = torch.export.load(sys.argv[1]).module()
assert not {"timm", "torchvision"} & set(sys.modules)
torch.save(program(torch.load(sys.argv[2])), sys.argv[3])
"""


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return trained(Net())


@pytest.fixture(scope="module")
def file(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    done = export(net, path, format="torch", input_size=SIZE, images=torch.rand(5, *SIZE))
    assert (done.path, done.bytes, done.packed) == (path, path.stat().st_size, 6)
    assert (done.opset, done.images, done.any_batch) == (0, 1 + 4 + 5, True)
    assert done.error <= 1e-6
    return path


def test_another_process_agrees(net: nn.Module, file: Path, tmp_path: Path) -> None:
    x = torch.randn(7, *SIZE)
    torch.save(x, tmp_path / "x.pt")
    words = [str(file), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        torch.testing.assert_close(torch.load(words[2]), net(x), rtol=1e-5, atol=1e-5)


def test_convolutions_are_one_operator_each_on_bits(file: Path) -> None:
    program = torch.export.load(file)
    operator = torch.ops.el_convert.binary_conv2d.default
    assert sum(node.target is operator for node in program.graph.nodes) == 6
    bits = [value for value in program.state_dict.values() if value.dtype == torch.uint8]
    assert len(bits) == 6
    with zipfile.ZipFile(file) as archive:
        (text,) = [archive.read(name) for name in archive.namelist() if "models/" in name]
    assert str(Path(__file__).parent).encode() not in text  # nobody's folders


def test_models_of_the_zoo_are_bit_equal(tmp_path: Path) -> None:
    model = trained(timm.create_model("test_resnet"), size=(3, 64, 64))
    assert export(model, tmp_path / "a.pt2", format="torch", input_size=(3, 64, 64)).error == 0


def test_several_outputs(tmp_path: Path) -> None:
    done = export(trained(Two()), tmp_path / "two.pt2", format="torch", input_size=SIZE)
    assert done.error <= 1e-6


class Counting(Two):
    """It counts its images in Python, so that the traced number is fixed."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = self.conv(self.stem(x))
        return torch.stack([x[i].mean(0) for i in range(int(x.shape[0]))])


def test_a_fixed_batch_is_said(tmp_path: Path) -> None:
    done = export(trained(Counting()), tmp_path / "one.pt2", format="torch", input_size=SIZE)
    assert not done.any_batch
    assert done.images == 5
    program = torch.export.load(tmp_path / "one.pt2").module()
    assert program(torch.randn(1, *SIZE)).shape == (1, 18, 18)


def test_refusals(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_text("as it was")
    with pytest.raises(ExportError, match=r"the program differs.*more than the tolerance"):
        export(net, path, format="torch", input_size=SIZE, tolerance=-1)
    with pytest.raises(ExportError, match="Branching cannot be exported"):
        export(trained(Branching()), path, format="torch", input_size=SIZE)
    with pytest.raises(ExportError, match="float_weights is for format 'onnx'"):
        export(net, path, format="torch", input_size=SIZE, float_weights=True)
    with pytest.raises(ExportError, match=r"does not run on a batch of \[1, 4, 9, 9\].*input_size"):
        export(net, path, format="torch", input_size=(4, 9, 9))
    assert path.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [path]


def test_the_command(tmp_path: Path) -> None:
    file, out = tmp_path / "bnn.pt", tmp_path / "bnn.pt2"
    save(trained(timm.create_model("test_resnet"), size=(3, 64, 64)), file)
    words = ["export", str(file), "--to", "torch", "--image-size", "64", "--out"]
    done = CliRunner().invoke(main, [*words, str(out)])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"wrote {out} (")
    assert "any batch): 14 convolutions at 1 bit; the program differs by" in done.stdout
    assert torch.export.load(out).module()(torch.randn(2, 3, 64, 64)).shape == (2, 1000)
    assert CliRunner().invoke(main, [*words, str(tmp_path / "bnn.onnx")]).exit_code == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_ahead_of_time_compilation(net: nn.Module, file: Path, tmp_path: Path) -> None:
    package = torch._inductor.aoti_compile_and_package(
        torch.export.load(file), package_path=str(tmp_path / "compiled.pt2")
    )
    compiled = torch._inductor.aoti_load_package(package)
    for batch in (1, 2, 5):
        x = torch.randn(batch, *SIZE)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-5)
