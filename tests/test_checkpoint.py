"""What `save` writes, `load` gives back bit for bit, or refuses with a reason."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from torch import Tensor, nn

from el_convert import (
    RECIPES,
    BinaryConv2d,
    CheckpointError,
    ConversionError,
    Pattern,
    Source,
    UnknownNameError,
    binarize,
    load,
    register_pattern,
    save,
    unregister_pattern,
)
from el_convert.convert import conversion_of
from el_convert.zoo import create

SUFFIXES = (".pt", ".safetensors")
TRAINED_RECIPES = [name for name in RECIPES if name != "identity"]


class Doubled(nn.Conv2d):
    """A convolution class no library knows."""

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = super().forward(input)
        return 2 * output


class Net(nn.Module):
    """A user's network; `middle` is what the tests vary."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.act = nn.ReLU()
        self.first = middle
        self.second = middle
        self.last = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.second(self.first(self.act(self.stem(image))))
        scores: Tensor = self.head(self.last(x).mean((2, 3)))
        return scores


class Counted(nn.Sequential):
    """Keeps more than tensors in its state_dict."""

    def get_extra_state(self) -> dict[str, int]:
        return {"epoch": 3}


def user_net() -> Net:
    return Net(nn.Conv2d(16, 16, 3, padding=1))


def scrambled(model: nn.Module) -> nn.Module:
    """Give fresh norms, gates and biases, all alike, values that show a mix-up."""
    for value in model.state_dict().values():
        if value.dim() < 2:
            value.copy_(torch.rand(value.shape) + 0.5 if value.is_floating_point() else 7)
    return model.eval()


def assert_same_tensors(given: nn.Module, wanted: nn.Module) -> None:
    first, second = given.state_dict(), wanted.state_dict()
    assert list(first) == list(second)
    for key, value in second.items():
        assert first[key].dtype == value.dtype, key
        assert torch.equal(first[key], value), key


def assert_same(given: nn.Module, wanted: nn.Module, side: int = 64) -> None:
    assert type(given) is type(wanted)
    assert_same_tensors(given, wanted)
    first, second = conversion_of(given), conversion_of(wanted)
    assert first.recipe == second.recipe
    assert set(first.decisions) == set(second.decisions)
    assert set(first.activations) == set(second.activations)
    image = torch.randn(2, 3, side, side, dtype=next(wanted.parameters()).dtype)
    with torch.no_grad():
        output, reference = given.eval()(image), wanted.eval()(image)
    assert reference.isfinite().all()
    assert reference.unique().numel() > 1
    assert torch.equal(output, reference)


def header_of(path: Path) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(torch.load(path, weights_only=True)["el_convert"])
    return header


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """Read-only: tests that change it take another."""
    return scrambled(binarize(timm.create_model("test_resnet", num_classes=4)))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["resnet18", "nf_resnet26"])
def test_timm_models_come_back(tmp_path: Path, name: str, suffix: str) -> None:
    model = scrambled(binarize(timm.create_model(name, num_classes=10)))
    path = tmp_path / f"bnn{suffix}"
    save(model, path)
    assert_same(load(path), model)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_torchvision_models_come_back(tmp_path: Path, suffix: str) -> None:
    source = Source("torchvision", "squeezenet1_1", {"num_classes": 10})
    model = scrambled(binarize(create(source)))
    save(model, tmp_path / f"bnn{suffix}")
    assert_same(load(tmp_path / f"bnn{suffix}"), model)


@pytest.mark.parametrize("transform", [False, True])
def test_googlenet_keeps_its_input_transform(tmp_path: Path, transform: bool) -> None:
    options = {"num_classes": 10, "transform_input": transform}
    model = scrambled(binarize(create(Source("torchvision", "googlenet", options))))
    save(model, tmp_path / "bnn.pt")
    loaded: Any = load(tmp_path / "bnn.pt")
    assert loaded.transform_input is transform
    assert_same(loaded, model)


def test_an_input_transform_is_never_lost_silently(tmp_path: Path) -> None:
    model = torchvision.models.googlenet(
        init_weights=False, aux_logits=False, num_classes=10, transform_input=True
    )
    source = Source("torchvision", "googlenet", {"num_classes": 10, "aux_logits": False})
    try:
        save(binarize(model), tmp_path / "bnn.pt", source=source)
    except CheckpointError:
        return
    loaded: Any = load(tmp_path / "bnn.pt")
    assert loaded.transform_input is True


@pytest.mark.parametrize("recipe", TRAINED_RECIPES)
def test_every_recipe_comes_back(tmp_path: Path, recipe: str) -> None:
    model = scrambled(binarize(timm.create_model("resnet18", num_classes=10), recipe))
    save(model, tmp_path / "bnn.pt")
    assert_same(load(tmp_path / "bnn.pt"), model)


def test_changed_options_and_kept_layers_come_back(tmp_path: Path) -> None:
    options = {"link.gamma": "scalar", "link.gamma_init": 0.25, "weight.scale": "learned"}
    recipe = RECIPES["elastic-link"].with_options(options)
    model = binarize(timm.create_model("test_resnet", num_classes=4), recipe, keep=["layer1.*"])
    save(scrambled(model), tmp_path / "bnn.pt")
    assert_same(load(tmp_path / "bnn.pt"), model)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_come_back(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    model = timm.create_model("test_resnet", num_classes=4).to(dtype)
    model = scrambled(binarize(model))
    save(model, tmp_path / f"bnn{suffix}")
    assert_same(load(tmp_path / f"bnn{suffix}"), model)


def test_buffers_that_no_file_holds_are_there(tmp_path: Path) -> None:
    model = scrambled(binarize(timm.create_model("test_maxvit", num_classes=4)))
    held = set(dict(model.named_buffers())) - set(model.state_dict())
    save(model, tmp_path / "bnn.pt")
    loaded = load(tmp_path / "bnn.pt")
    assert held
    for name in held:
        assert torch.equal(loaded.get_buffer(name), model.get_buffer(name))
    assert_same(loaded, model, side=160)


def test_a_loaded_model_is_as_its_library_builds_it(tmp_path: Path, small: nn.Module) -> None:
    save(small, str(tmp_path / "bnn.pt"))
    loaded = load(str(tmp_path / "bnn.pt"), device=torch.device("cpu"))
    assert all(module.training for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_loaded_model_saves_again(tmp_path: Path, small: nn.Module) -> None:
    save(small, tmp_path / "first.pt")
    save(load(tmp_path / "first.pt"), tmp_path / "second.safetensors")
    assert_same(load(tmp_path / "second.safetensors"), small)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_user_model_comes_back_on_the_model_given(tmp_path: Path, suffix: str) -> None:
    plain, path = user_net(), tmp_path / f"bnn{suffix}"
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    model = scrambled(binarize(plain))
    save(model, path)
    with pytest.raises(CheckpointError, match=r"load\(path, model=\.\.\.\)"):
        load(path)
    assert_same(load(path, model=plain), model)
    assert [type(m) for m in plain.modules()] == [type(m) for m in user_net().modules()]
    assert list(plain.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_module_under_two_names_stays_one(tmp_path: Path, suffix: str) -> None:
    model = scrambled(binarize(user_net()))
    assert model.first is model.second
    save(model, tmp_path / f"bnn{suffix}")
    loaded = load(tmp_path / f"bnn{suffix}", model=user_net())
    assert loaded.first is loaded.second
    assert_same(loaded, model)


@pytest.fixture
def doubled_row() -> Iterator[Pattern]:
    row = Pattern(
        "doubled", lambda site: type(site.conv) is Doubled, "binarize", "", BinaryConv2d.from_float
    )
    register_pattern(row)
    yield row
    unregister_pattern("doubled")


def test_a_user_pattern_is_needed_at_load(tmp_path: Path, doubled_row: Pattern) -> None:
    plain = Net(Doubled(16, 16, 3, padding=1))
    model = scrambled(binarize(plain))
    assert type(model.first) is BinaryConv2d
    save(model, tmp_path / "bnn.pt")
    unregister_pattern("doubled")
    with pytest.raises(CheckpointError, match=r"'doubled'.*register_pattern"):
        load(tmp_path / "bnn.pt", model=plain)
    register_pattern(doubled_row)
    assert_same(load(tmp_path / "bnn.pt", model=plain), model)


def test_a_pattern_that_kept_is_not_needed_at_load(tmp_path: Path) -> None:
    register_pattern(Pattern("mine", lambda site: site.path == "last", "keep", "as told"))
    try:
        model = scrambled(binarize(user_net()))
        save(model, tmp_path / "bnn.pt")
    finally:
        unregister_pattern("mine")
    assert type(model.last) is nn.Conv2d
    assert_same(load(tmp_path / "bnn.pt", model=user_net()), model)


def test_the_pt_file_is_plain_data(tmp_path: Path, small: nn.Module) -> None:
    save(small, tmp_path / "bnn.pt")
    content = torch.load(tmp_path / "bnn.pt", weights_only=True)
    assert set(content) == {"el_convert", "state_dict"}
    assert type(content["el_convert"]) is str
    assert json.loads(content["el_convert"])["source"]["name"] == "test_resnet"
    assert list(content["state_dict"]) == list(small.state_dict())
    assert all(type(value) is Tensor for value in content["state_dict"].values())


def test_the_safetensors_file_holds_the_same(tmp_path: Path, small: nn.Module) -> None:
    save(small, tmp_path / "bnn.pt")
    save(small, tmp_path / "bnn.safetensors")
    with safe_open(tmp_path / "bnn.safetensors", framework="pt") as content:
        assert json.loads(content.metadata()["el_convert"]) == header_of(tmp_path / "bnn.pt")
        assert set(content.keys()) == set(small.state_dict())


@pytest.mark.parametrize("source", ["test_resnet", "timm/test_efficientnet"])
def test_a_wrong_source_is_refused(tmp_path: Path, small: nn.Module, source: str) -> None:
    with pytest.raises(CheckpointError, match=f"{source} does not rebuild this model"):
        save(small, tmp_path / "bnn.pt", source=source)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "bnn.pt").write_bytes(b"old")
    with pytest.raises(CheckpointError):
        save(small, tmp_path / "bnn.pt", source=source)
    assert (tmp_path / "bnn.pt").read_bytes() == b"old"


def test_other_refusals_write_nothing(tmp_path: Path, small: nn.Module) -> None:
    with pytest.raises(UnknownNameError, match="test_resnet"):
        save(small, tmp_path / "bnn.pt", source="test_resne")
    with pytest.raises(CheckpointError, match=r"\.pt or \.safetensors"):
        save(small, tmp_path / "bnn.bin")
    with pytest.raises(CheckpointError, match="nothing was changed"):
        save(small, tmp_path / "missing" / "bnn.pt")
    with pytest.raises(ConversionError, match="binarize"):
        save(user_net(), tmp_path / "bnn.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_state_of_more_than_tensors_is_refused(tmp_path: Path) -> None:
    model = binarize(Counted(user_net()))
    with pytest.raises(CheckpointError, match=r"_extra_state.*dict"):
        save(model, tmp_path / "bnn.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_timm_model_built_otherwise_is_not_taken_for_the_plain_one(tmp_path: Path) -> None:
    plain = timm.create_model("resnet18", num_classes=4, act_layer=nn.SiLU)
    model = scrambled(binarize(plain))
    with pytest.warns(UserWarning, match="timm/resnet18 does not rebuild it .*SiLU"):
        save(model, tmp_path / "bnn.pt")
    assert header_of(tmp_path / "bnn.pt")["source"] is None
    assert_same(load(tmp_path / "bnn.pt", model=plain), model)


@pytest.mark.parametrize("known", [False, True])
def test_a_dropout_rate_is_never_lost_silently(tmp_path: Path, known: bool) -> None:
    options: dict[str, Any] = {"num_classes": 4, "drop_rate": 0.5}
    model = binarize(timm.create_model("test_resnet", **options))
    given = Source("timm", "test_resnet", options) if known else None
    save(model, tmp_path / "bnn.pt", source=given)
    source = header_of(tmp_path / "bnn.pt")["source"]
    assert source is None or load(tmp_path / "bnn.pt").drop_rate == 0.5


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_channels_last_weights_come_back(tmp_path: Path, suffix: str) -> None:
    plain = timm.create_model("test_resnet", num_classes=4)
    model: Any = scrambled(binarize(plain.to(memory_format=torch.channels_last)))
    assert model.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    save(model, tmp_path / f"bnn{suffix}")
    loaded = load(tmp_path / f"bnn{suffix}")
    assert_same_tensors(loaded, model)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(image), model(image))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_random_state_is_untouched(tmp_path: Path, small: nn.Module, suffix: str) -> None:
    plain = timm.create_model("test_resnet", num_classes=4)
    before, python = torch.get_rng_state(), random.getstate()
    save(small, tmp_path / f"bnn{suffix}")
    assert torch.equal(torch.get_rng_state(), before)
    load(tmp_path / f"bnn{suffix}")
    assert torch.equal(torch.get_rng_state(), before)
    load(tmp_path / f"bnn{suffix}", model=plain)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python


def test_saving_leaves_the_model_as_it_was(tmp_path: Path, small: nn.Module) -> None:
    before = {key: value.clone() for key, value in small.state_dict().items()}
    modes = [module.training for module in small.modules()]
    save(small, tmp_path / "bnn.pt")
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    assert [module.training for module in small.modules()] == modes


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_model_gives_the_same_bytes(tmp_path: Path, small: nn.Module, suffix: str) -> None:
    save(small, tmp_path / f"one{suffix}")
    save(small, tmp_path / f"other{suffix}")
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"other{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_view_of_something_large_is_saved_alone(tmp_path: Path, suffix: str) -> None:
    plain = user_net()
    large = torch.randn(1_000_000)
    plain.last.weight = nn.Parameter(large[:256].view(16, 16, 1, 1))
    save(binarize(plain, inplace=True), tmp_path / f"bnn{suffix}")
    assert (tmp_path / f"bnn{suffix}").stat().st_size < 100_000


def test_a_pt_file_holds_shared_tensors_once(tmp_path: Path) -> None:
    model = binarize(Net(nn.Conv2d(16, 16, 31, padding=15)))
    tensors = sum(value.nbytes for value in model.parameters())
    save(model, tmp_path / "bnn.pt")
    assert tensors < (tmp_path / "bnn.pt").stat().st_size < 1.2 * tensors


def test_a_last_module_taken_away_is_not_lost_silently(tmp_path: Path) -> None:
    model: Any = binarize(torchvision.models.squeezenet1_1(num_classes=4))
    del model.classifier[3]  # the last one, and without parameters
    with pytest.raises(CheckpointError, match=r"AdaptiveAvgPool2d.* became nothing"):
        save(
            model,
            tmp_path / "bnn.pt",
            source=Source("torchvision", "squeezenet1_1", {"num_classes": 4}),
        )
