"""What is seen on images, against plain torch on hooks, and the report's figures against hand."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import seed_norms
from pictures import float_network
from torch import Tensor, nn

from el_convert import observation
from el_convert.checkpoint import load, save
from el_convert.convert import binarize
from el_convert.errors import ConversionError, DataError
from el_convert.findings import examine, spread
from el_convert.nn import OneBitLayer
from el_convert.observation import observe
from el_convert.packing import pack
from el_convert.report import summarize

SIZE = (3, 32, 32)


def network(recipe: str = "elastic-link") -> nn.Module:
    """Binarized, with norms and gates as if trained."""
    torch.manual_seed(3)
    model = seed_norms(binarize(seed_norms(float_network()), recipe)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("gamma", "threshold")):
                value.add_(torch.randn_like(value) / 4)
    return model


def images(count: int = 11, seed: int = 5) -> Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(seed))


def batches() -> list[tuple[Tensor, Tensor | None]]:
    """Uneven ones, of several chunks."""
    first, second = images().split([9, 2])
    return [(first, torch.zeros(9, dtype=torch.long)), (second, torch.ones(2, dtype=torch.long))]


def inputs_of(model: nn.Module, kind: type[nn.Module]) -> dict[str, Tensor]:
    """What every module of a kind reads, all images at once."""
    seen: dict[str, Tensor] = {}
    copied = copy.deepcopy(model).eval()
    for path, module in copied.named_modules():
        if isinstance(module, kind):
            module.register_forward_pre_hook(
                lambda _, args, path=path: seen.__setitem__(path, args[0])
            )
    with torch.no_grad():
        copied(images())
    return seen


@pytest.mark.parametrize("recipe", ["elastic-link", "elastic-reactnet"])
def test_signs_are_those_of_hooks(recipe: str) -> None:
    model = network(recipe)
    seen = observe(model, batches())
    expected = inputs_of(model, OneBitLayer)
    assert [layer.path for layer in seen.layers] == list(expected)
    for layer in seen.layers:
        value, module = expected[layer.path], model.get_submodule(layer.path)
        if recipe == "elastic-reactnet":
            value = value - module.threshold.view(1, -1, 1, 1)  # type: ignore[union-attr, operator]
        share = torch.where(value > 0, 1.0, 0.0).double().mean((0, 2, 3))
        assert layer.positive == pytest.approx(share.tolist(), abs=1e-12)
        assert layer.constant == int(((share == 0) | (share == 1)).sum())


def test_a_links_power_by_hand() -> None:
    model = network()
    seen = {layer.path: layer.link_share for layer in observe(model, batches()).layers}
    for path, value in inputs_of(model, OneBitLayer).items():
        layer = copy.deepcopy(model.get_submodule(path))
        with torch.no_grad():
            whole = layer(value).double()
            layer.link = None
            rest = layer(value).double()
        link = (whole - rest).square().mean()
        assert seen[path] == pytest.approx(float(link / (link + rest.square().mean())), rel=1e-4)


def test_packed_agrees_as_a_comparison_by_hand_says() -> None:
    model = network()
    seen = observe(model, batches())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = pack(model)
    with torch.no_grad():
        given, wanted = packed(images()), model(images())
    assert seen.difference == pytest.approx(
        float((given - wanted).abs().max() / wanted.abs().max())
    )
    assert seen.same_answer == int((given.argmax(1) == wanted.argmax(1)).sum()) == 11
    assert seen.right == int((wanted.argmax(1)[:9] == 0).sum() + (wanted.argmax(1)[9:] == 1).sum())
    assert all(layer.difference is not None and layer.difference < 1e-5 for layer in seen.layers)
    assert all(layer.flips == 0 for layer in seen.layers)


def test_a_packed_network_that_disagrees_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module) -> nn.Module:
        packed: Any = observation_pack(model)
        packed.get_submodule("layer2.0.conv1").bits.bitwise_not_()
        return packed  # type: ignore[no-any-return]

    observation_pack = observation.pack_layers
    monkeypatch.setattr(observation, "pack_layers", broken)
    seen = observe(network(), batches())
    flips = {layer.path: layer.flips or 0.0 for layer in seen.layers}
    place = list(flips).index("layer2.0.conv1") + 1
    before, after = list(flips.values())[:place], list(flips.values())[place:]
    assert set(before) == {0.0}
    assert max(after) > 1e-3
    assert (seen.difference or 0.0) > 1e-3
    # Alone each layer is compared with a packed layer of its own, which is whole.
    assert all((layer.difference or 0.0) < 1e-5 for layer in seen.layers)


def test_a_packed_layer_that_disagrees_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(observation.PackedConv):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs) * 1.5

    monkeypatch.setattr(observation, "PackedConv", Broken)
    seen = observe(network(), batches())
    assert [layer.difference for layer in seen.layers] == pytest.approx([0.5] * len(seen.layers))


def test_the_model_is_left_alone() -> None:
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    observe(model, batches())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    assert not any(after or before for after, before in hooks)


def test_what_it_refuses() -> None:
    with pytest.raises(ConversionError, match="not a binarized model"):
        observe(float_network(), batches())
    with pytest.raises(DataError, match="no image"):
        observe(network(), [])
    with pytest.raises(ConversionError, match="original is another network: '0'"):
        examine(network(), original=nn.Sequential(nn.Conv2d(3, 4, 1)), input_size=SIZE)


def test_outputs_that_are_not_finite_or_no_logits() -> None:
    model = network()
    with torch.no_grad():
        model.conv1.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]
    seen = observe(model, [(images(), None)])
    assert seen.difference != seen.difference
    assert (seen.right, seen.images) == (None, 11)
    maps = binarize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    found = observe(maps, [(images(), None)])
    assert found.same_answer is None
    assert found.difference is not None


@pytest.mark.parametrize("with_original", [True, False])
def test_before_and_after_are_summaries(with_original: bool) -> None:
    original, model = float_network(), network()
    found = examine(model, original=original if with_original else None, input_size=SIZE)
    before, after = summarize(original, SIZE), summarize(model, SIZE)
    assert found.after == after
    assert found.before.float_macs == before.float_macs
    assert [layer.before.path for layer in found.layers] == [row.path for row in before.layers]
    for layer, row in zip(found.layers, before.layers, strict=True):
        assert layer.before.stored_bytes == row.stored_bytes
        assert layer.before.float_macs == row.float_macs
    if with_original:
        assert found.before == before
        assert found.smaller == before.stored_bytes / after.packed_bytes
        assert found.cheaper == (before.float_macs or 0) / (after.ops or 1)
    bits = [(layer.weight_bits, layer.input_bits) for layer in found.layers]
    assert bits == [(32, 32), *[(1, 1)] * (len(bits) - 2), (32, 32)]


def test_a_packed_network_has_the_same_original() -> None:
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = pack(model)
    for original in (float_network(), None):
        whole = examine(model, batches(), original=original, input_size=SIZE)
        found = examine(packed, batches(), original=original, input_size=SIZE)
        assert found.packed
        assert found.cheaper == whole.cheaper
        assert [layer.path for layer in found.layers] == [layer.path for layer in whole.layers]
        assert [layer.gate for layer in found.layers] == [layer.gate for layer in whole.layers]
        for one, other in zip(found.layers, whole.layers, strict=True):
            assert one.before.stored_bytes == other.before.stored_bytes
            if one.observed and other.observed:
                assert one.observed.positive == other.observed.positive
                assert one.observed.difference is None


def test_gates_start_lower_where_no_norm_follows(tmp_path: Path) -> None:
    def build() -> nn.Module:
        layers = (nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        return nn.Sequential(*layers, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    model = binarize(build())
    starts = {"1": 3.0, "3": 1.0, "4": 3.0}
    save(model, tmp_path / "own.pt")
    again = load(tmp_path / "own.pt", model=build())
    for network, original in ((model, None), (model, build()), (again, build())):
        found = examine(network, original=original, input_size=(3, 8, 8))
        gates = {layer.path: layer.gate for layer in found.layers if layer.gate}
        assert {path: gate.start for path, gate in gates.items()} == starts
        assert all(set(gate.values) == {gate.start} for gate in gates.values())


def test_fixed_gates_and_none() -> None:
    fixed = examine(network("bi-real"), input_size=SIZE)
    gates = [layer.gate for layer in fixed.layers if layer.gate]
    assert gates
    assert all(not gate.learned and gate.values == (1.0,) for gate in gates)
    assert not any(layer.gate for layer in examine(network("plain"), input_size=SIZE).layers)


def test_spread_is_torchs_quantiles() -> None:
    values = torch.randn(37, dtype=torch.float64)
    found = spread(values.tolist())
    assert (found.low, found.high) == (values.min(), values.max())
    assert found.median == pytest.approx(float(values.sort().values[18]))
    assert found.tenth == pytest.approx(float(torch.quantile(values, 0.1)))
    assert found.ninetieth == pytest.approx(float(torch.quantile(values, 0.9)))
