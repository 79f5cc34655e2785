"""OpenVINO's 1-bit convolutions, as packed models are timed against them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from el_convert.openvino_peer import layer_types, openvino_binary_run
from el_convert.peers import PEERS, Workload

openvino: Any = pytest.importorskip("openvino", reason="the extra `bench` is not installed")
pytest.importorskip("onnx", reason="the extra `bench` is not installed")


class Net(nn.Module):
    """A float stem, then two convolutions that become binary, the first without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 32, 3, bias=False)
        self.conv2 = nn.Conv2d(32, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(F.relu(self.stem(x)))
        return self.conv2(F.relu(x))


def run(model: nn.Module, input: Tensor, folder: Path) -> Tensor:
    with torch.no_grad():
        output: Any = PEERS["openvino-binary"].prepare(Workload(model.eval(), input, 1, folder))()
    return torch.from_numpy(output[0].copy())


def test_it_computes_on_zeros_and_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(2, 3, 12, 12)

    def binary(conv: nn.Conv2d, input: Tensor) -> Tensor:
        weight = torch.where(conv.weight > 0, 1.0, -1.0)
        scale = conv.weight.abs().mean((1, 2, 3)).view(-1, 1, 1)
        sums = F.conv2d((input > 0).float(), weight) * scale
        return sums if conv.bias is None else sums + conv.bias.view(-1, 1, 1)

    with torch.no_grad():
        expected = binary(net.conv2, F.relu(binary(net.conv1, F.relu(net.stem(x)))))
    torch.testing.assert_close(run(net, x, tmp_path), expected)


def test_its_convolutions_are_of_one_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []

    def spy(compiled: Any) -> set[str]:
        seen.append(layer_types(compiled))
        return seen[-1]

    monkeypatch.setattr("el_convert.openvino_peer.layer_types", spy)
    run(Net(), torch.randn(1, 3, 12, 12), tmp_path)
    assert "BinaryConvolution" in seen[0]


def test_a_model_without_any_is_refused(tmp_path: Path) -> None:
    path, x = tmp_path / "model.onnx", torch.randn(1, 3, 8, 8)
    with pytest.warns(DeprecationWarning):
        torch.onnx.export(nn.Conv2d(3, 8, 3), (x,), path, dynamo=False)
    with pytest.raises(RuntimeError, match="no convolution of this model at 1 bit"):
        openvino_binary_run(path, x, 1)
