"""ONNX files see what the networks see, on photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from test_packed_images import IMAGES, photographs
from torch import Tensor, nn

from el_convert.convert import binarize
from el_convert.exporting import export
from el_convert.link import ElasticLink
from el_convert.packing import pack
from el_convert.zoo import create, find_source

# Not MobileNet, EfficientNet and DenseNet: before training, one other sign moves them.
MODELS = [
    "timm/resnet18", "timm/resnet50", "torchvision/googlenet", "timm/convnext_atto", "backbone",
]  # fmt: skip


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "backbone":  # of detectors: four feature maps
        return timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3, 4))
    return create(find_source(name))


def scores(output: Any) -> Tensor:
    """(N, classes); of feature maps the last one's mean."""
    return output[-1].mean((2, 3)) if isinstance(output, list) else output


def distances(given: Any, wanted: Any) -> Tensor:
    """(N,): how far outputs are from each other, relative to their length; the worst of several."""
    pairs = zip(given, wanted, strict=True) if isinstance(wanted, list) else [(given, wanted)]
    found = [(a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1) for a, b in pairs]
    return torch.stack(found).amax(0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.skipif(not IMAGES.is_file(), reason="EL_CONVERT_IMAGES names no tar of images")
@pytest.mark.parametrize("name", MODELS)
def test_onnx_runtime_agrees_on_every_image(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model: Any = binarize(network(name))
    for gate in (module for module in model.modules() if isinstance(module, ElasticLink)):
        if gate.gamma is not None:
            torch.nn.init.uniform_(gate.gamma, 0.2, 1.0)  # as if trained
    images = torch.cat(list(photographs()))
    with torch.no_grad():
        for batch in images[:32].split(8):
            model.train()(batch)  # statistics for the norms, as training would give
        packed = pack(model.eval())
    path = tmp_path / "net.onnx"
    export(packed, path, tolerance=1.0)  # compared below
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    errors, same = [], 0
    for batch in images.split(8):
        with torch.no_grad():
            outputs = packed(batch)
        found = [torch.from_numpy(value) for value in session.run(None, {"input": batch.numpy()})]
        given = found if isinstance(outputs, list) else found[0]
        errors.append(distances(given, outputs))
        same += int((scores(given).argmax(1) == scores(outputs).argmax(1)).sum())
    assert same == len(images)
    # Where a runtime rounds a number near zero to the other side, its sign is another.
    assert float((torch.cat(errors) <= 1e-4).float().mean()) > 0.9
