"""The conversion users run first, ResNet-50, and the links of every recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from el_convert.checkpoint import load, save
from el_convert.convert import binarize, conversion_of
from el_convert.errors import ConversionError
from el_convert.nn import BinaryConv, BinaryConv2d
from el_convert.recipes import RECIPES, Recipe


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    return timm.create_model("resnet50")


@pytest.fixture(scope="module")
def binary50(resnet50: nn.Module) -> nn.Module:
    return binarize(resnet50)


def test_resnet50_in_numbers(binary50: nn.Module) -> None:
    convs = [m for m in binary50.modules() if isinstance(m, _ConvNd)]
    assert len(convs) == 53
    assert sum(isinstance(m, BinaryConv2d) for m in convs) == 52
    gates = [name for name, _ in binary50.named_parameters() if name.endswith(".link.gamma")]
    assert len(gates) == 52
    (kept,) = conversion_of(binary50).kept
    assert (kept.path, kept.pattern) == ("conv1", "reads-image")
    assert kept.reason


def test_float_weights_load_with_only_the_added_names_missing(
    resnet50: nn.Module, binary50: nn.Module
) -> None:
    result = binary50.load_state_dict(resnet50.state_dict(), strict=False)
    assert result.unexpected_keys == []
    gates = [f"{d.path}.link.gamma" for d in conversion_of(binary50).binarized]
    slopes = [f"{c.path}.weight" for c in conversion_of(binary50).activations]
    assert sorted(result.missing_keys) == sorted(gates + slopes)


def test_it_still_is_a_timm_resnet(binary50: nn.Module) -> None:
    assert isinstance(binary50, timm.models.ResNet)
    features = binary50.forward_features(torch.randn(1, 3, 64, 64))
    assert features.shape == (1, 2048, 2, 2)
    assert binary50.feature_info[-1]["num_chs"] == 2048


def test_a_new_classifier_survives_training_and_saving(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=1000)
    binary = binarize(model)
    binary.reset_classifier(7)
    optimizer = torch.optim.Adam(binary.parameters(), 1e-2)
    input, target = torch.randn(8, 3, 64, 64), torch.arange(8) % 7
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(binary(input), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    save(binary, tmp_path / "bnn.pt")
    again = load(tmp_path / "bnn.pt")
    input = torch.randn(2, 3, 64, 64)
    assert torch.equal(again.eval()(input), binary.eval()(input))


def block() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.Flatten(),
        nn.Linear(16 * 16, 2),
    )


def test_link_before_the_norm_by_hand() -> None:
    model = block().eval()
    binary = binarize(model)
    layer = binary[1]
    assert isinstance(layer, BinaryConv2d)
    assert layer.link is not None
    x = torch.randn(1, 8, 10, 10)
    counts = nn.functional.conv2d(x.sign(), model[1].weight.sign(), padding=1)
    scale = model[1].weight.abs().mean((1, 2, 3)).view(-1, 1, 1)
    with torch.no_grad():
        layer.link.gamma.fill_(0.25)  # type: ignore[union-attr]
    assert torch.allclose(layer(x), counts * scale + 0.25 * x, atol=1e-5)


def test_link_after_the_norm_moves_it_inside(tmp_path: Path) -> None:
    model = block()
    recipe = RECIPES["elastic-link"].with_options({"link.place": "after-norm"})
    binary = binarize(model, recipe)
    layer = binary[1]
    assert isinstance(layer, BinaryConv2d)
    assert isinstance(layer.norm, nn.BatchNorm2d)
    assert layer.link is not None
    assert type(binary[2]) is nn.Identity
    assert [d.norm for d in conversion_of(binary).binarized] == ["2", "5"]
    plain = binarize(model, "plain")
    x = torch.randn(4, 3, 10, 10)
    before, after = plain[:3](x), binary[:3](x)
    assert torch.allclose(after, before + 3 * binary[0](x), atol=1e-5)  # gamma starts at 3
    save(binary, tmp_path / "bnn.pt")
    again = load(tmp_path / "bnn.pt", model=block())
    assert torch.equal(again.eval()(x), binary.eval()(x))


class UsedTwice(nn.Module):
    """A norm with two callers cannot move."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.b(self.norm(self.a(self.stem(x)))))
        return self.fc(x.mean((2, 3)))


def test_a_norm_with_other_users_stays() -> None:
    binary = binarize(UsedTwice(), "bi-real")
    assert type(binary.norm) is nn.BatchNorm2d
    assert all(d.norm == "" for d in conversion_of(binary).decisions)


def test_fixed_links_where_channels_agree() -> None:
    binary = binarize(timm.create_model("resnet18"), "bi-real")
    layers = [m for m in binary.modules() if isinstance(m, BinaryConv)]
    assert len(layers) == 16  # 19 less three shortcut projections
    assert sum(layer.link is not None for layer in layers) == 13
    assert not any(name.endswith("gamma") for name, _ in binary.named_parameters())


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains(recipe: str) -> None:
    torch.manual_seed(0)
    binary = binarize(timm.create_model("resnet18", num_classes=4), recipe)
    loss = binary(torch.randn(2, 3, 64, 64)).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in binary.parameters())


class Twice(nn.Module):
    """One convolution under three names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.b, self.all = self.a, nn.ModuleList([self.a])
        self.fc = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.all[0](self.b(self.a(self.stem(x)))).mean((2, 3)))


def test_norms_at_zero_start_at_one_where_the_recipe_says_so() -> None:
    def built(recipe: Recipe, **arguments: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return binarize(timm.create_model("resnet26", **arguments), recipe).state_dict()

    kept = RECIPES["elastic-link"].with_options({"norm.zero_weights": "keep"})
    open_recipe = RECIPES["elastic-link"].with_options({"norm.zero_weights": "one"})
    assert not built(kept)["layer1.0.bn3.weight"].any()
    expected, given = built(kept, zero_init_last=False), built(open_recipe)
    assert all(torch.equal(given[name], value) for name, value in expected.items())
    float_shortcuts = RECIPES["elastic-link"].with_options({"keep.shortcut": "true"})
    assert built(float_shortcuts)["layer1.0.bn3.weight"].all()
    assert not built(RECIPES["elastic-link"])["layer1.0.bn3.weight"].any()
    assert not built(RECIPES["reactnet"])["layer1.0.conv3.norm.weight"].any()
    pruned = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten())
    nn.init.zeros_(pruned.get_parameter("1.weight").data[:3])
    net = binarize(nn.Sequential(pruned, nn.Linear(4, 2)), open_recipe)
    assert torch.equal(net.get_parameter("0.1.weight"), torch.tensor([0.0, 0.0, 0.0, 1.0]))


def test_shared_convolutions_stay_shared() -> None:
    binary = binarize(Twice())
    assert isinstance(binary.a, BinaryConv2d)
    assert binary.a is binary.b is binary.all[0]


def test_a_float_model_has_no_conversion() -> None:
    with pytest.raises(ConversionError, match="not a binarized model"):
        conversion_of(nn.Linear(2, 2))


def test_containers_that_hold_themselves() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    inner: list[Any] = [model[1]]
    inner.append(inner)
    pair = (model[1], "twice")
    model.pair, model.pair_again = pair, pair  # type: ignore[assignment]
    model.listed = inner  # type: ignore[assignment]
    binary = binarize(model)
    listed: Any = binary.listed
    assert listed[0] is binary[1]
    assert listed[1] is listed
    assert binary.pair[0] is binary.pair_again[0] is binary[1]  # type: ignore[index]
    assert inner[0] is model[1]
