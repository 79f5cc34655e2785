"""Which activations are replaced, with how many parameters, and what is left and named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import BY_NAME
from torch import Tensor, nn

from el_convert.activations import ActivationChange
from el_convert.convert import binarize
from el_convert.planning import plan_conversion
from el_convert.recipes import RECIPES
from el_convert.slopes import RPReLU


def changes(model: nn.Module, recipe: str = "elastic-link") -> dict[str, ActivationChange]:
    return {change.path: change for change in plan_conversion(model, recipe).activations}


class Block(nn.Module):
    """One of each case."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.conv1 = nn.Conv2d(8, 16, 1)
        self.act1 = nn.ReLU6()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(16, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        self.act2 = nn.SiLU()
        self.conv3 = nn.Conv2d(32, 8, 1)
        self.last = nn.ReLU()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.conv1(self.stem(x)))
        x = self.conv2(self.pool(x * self.gate(x)))
        x = torch.cat([F.relu(x), self.act2(self.norm(x))], 1)
        return self.fc(self.last(self.conv3(x)).mean((2, 3)))


def test_the_relu_family_becomes_prelu_per_channel() -> None:
    found = changes(Block())
    assert set(found) == {"stem.2", "act1", ""}
    assert (found["stem.2"].replacement, found["stem.2"].channels) == ("prelu", 8)
    assert (found["act1"].kind, found["act1"].channels) == ("ReLU6", 16)
    assert (found[""].kind, found[""].action) == ("relu", "leave")
    assert "functional" in found[""].reason


def test_gates_and_last_activations_stay() -> None:
    binary = binarize(Block())
    assert isinstance(binary.get_submodule("act1"), nn.PReLU)
    for path in ("gate.2", "last"):
        assert type(binary.get_submodule(path)) is nn.ReLU
    assert type(binary.get_submodule("act2")) is nn.SiLU


def test_any_activation_becomes_rprelu() -> None:
    found = changes(Block(), "reactnet")
    assert {path for path, c in found.items() if c.action == "replace"} == {
        "stem.2",
        "act1",
        "act2",
    }
    layer = binarize(Block(), "reactnet").get_submodule("act2")
    assert isinstance(layer, RPReLU)
    assert layer.slope.shape == (16,)


def test_identity_and_keep() -> None:
    recipe = RECIPES["plain"].with_options({"activation.replacement": "identity"})
    assert type(binarize(Block(), recipe).get_submodule("act1")) is nn.Identity
    assert changes(Block(), "xnor") == {}


def test_slope_mode_and_dtype_follow() -> None:
    model = Block().eval().to(torch.bfloat16)
    recipe = RECIPES["plain"].with_options({"activation.slope": "0.1"})
    layer = binarize(model, recipe).get_submodule("act1")
    assert isinstance(layer, nn.PReLU)
    assert not layer.training
    assert layer.weight.dtype == torch.bfloat16
    assert torch.allclose(layer.weight.float(), torch.full((16,), 0.1), atol=1e-3)


class SharedActivation(nn.Module):
    """torchvision's habit: one ReLU for all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 8, 1)
        self.conv1, self.conv2 = nn.Conv2d(8, width, 1), nn.Conv2d(width, 8, 1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(self.relu(self.conv0(x))))
        return self.fc(self.conv2(x).mean((2, 3)))


@pytest.mark.parametrize(("width", "parameters"), [(8, 8), (16, 1)])
def test_a_shared_activation_fits_all_its_calls(width: int, parameters: int) -> None:
    model = SharedActivation(width)
    change = changes(model)["relu"]
    assert change.channels == parameters
    assert bool(change.reason) == (parameters == 1)
    assert binarize(model)(torch.randn(1, 3, 4, 4)).shape == (1, 2)


def test_hooked_activations_are_left() -> None:
    model = Block()
    model.act1.register_forward_hook(lambda *_: None)
    assert changes(model)["act1"].reason == "it has hooks"


@pytest.mark.parametrize(
    ("name", "replaced", "left"),
    [
        ("timm/resnet50", 48, 0),
        ("timm/mobilenetv1_100", 26, 0),  # inside BatchNormAct2d
        ("timm/efficientnet_b0", 0, 0),  # SiLU passes negative values
        ("torchvision/densenet121", 119, 0),
        ("torchvision/squeezenet1_1", 23, 0),  # stem and 8 x 3, less 2 before the classifier
        ("torchvision/shufflenet_v2_x0_5", 36, 0),  # stem, 16 x 2, and 3 of stride 2
    ],
)
def test_counts_in_the_zoo(name: str, replaced: int, left: int) -> None:
    found = changes(BY_NAME[name].build()).values()
    assert sum(change.action == "replace" for change in found) == replaced
    assert sum(change.action == "leave" for change in found) == left
    assert all(change.channels > 1 for change in found)


def test_functional_activations_are_named_with_their_module() -> None:
    found = changes(BY_NAME["torchvision/googlenet"].build())
    assert all(change.action == "leave" for change in found.values())
    assert found["inception3a.branch1"].kind == "relu"
