"""`torch.compile` in training: whole graphs, and the losses of the model as it is."""

from __future__ import annotations

import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from el_convert import binarize

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler"),
]


def losses(name: str, *, compiled: bool) -> list[float]:
    """Of some steps, from the same start on the same images."""
    torch.manual_seed(0)
    model: nn.Module = binarize(timm.create_model(name, num_classes=10), inplace=True).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    run = torch.compile(model, fullgraph=True) if compiled else model
    found = []
    for _ in range(5):
        images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
        optimizer.zero_grad()
        loss = F.cross_entropy(run(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
def test_compiled_training_has_the_same_losses(name: str) -> None:
    torch.compiler.reset()
    eager = losses(name, compiled=False)
    assert losses(name, compiled=True) == pytest.approx(eager, rel=1e-3)
