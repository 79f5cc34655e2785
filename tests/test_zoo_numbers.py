"""What must hold for any model, on real weights, for one model of every class of both libraries."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import flat_tensors
from torch import Tensor, nn
from zoo_sweep import SNAPSHOT, read
from zoo_trials import EXCLUDED, TRIALS, Trial

from el_convert.checkpoint import load, save
from el_convert.convert import binarize, conversion_of
from el_convert.errors import ConversionError
from el_convert.graphs import link_nodes, to_graph
from el_convert.link import ElasticLink
from el_convert.packed import PackedConv
from el_convert.packing import pack
from el_convert.planning import plan
from el_convert.zoo import create, find_source

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning:torchvision"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchvision"),
    pytest.mark.filterwarnings("ignore:the model"),  # untrained, and packed all the same
]
PARAMS = [pytest.param(t, id=t.name, marks=pytest.mark.xdist_group(t.name)) for t in TRIALS]


@pytest.fixture(params=PARAMS, scope="module")
def trial(request: pytest.FixtureRequest) -> Trial:
    chosen: Trial = request.param
    return chosen


@pytest.fixture(scope="module")
def model(trial: Trial) -> nn.Module:
    return trial.build()


@pytest.fixture(scope="module")
def binary(trial: Trial, model: nn.Module) -> nn.Module:
    # Norms that have seen no image let gates that start at 3 multiply up in eval.
    return binarize(model, trial.recipe().with_options({"link.gamma_init": 1.0}))


def run(
    model: nn.Module, inputs: tuple[Any, ...], train: bool = False, seed: int = 3
) -> list[Tensor]:
    model.train(train)
    torch.manual_seed(seed)
    with torch.no_grad():
        return flat_tensors(model(*copy.deepcopy(inputs)))


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    # NaN is equal to itself here: a detection model may give it for an empty image.
    return len(left) == len(right) and all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_1_identity_recipe_changes_nothing(trial: Trial, model: nn.Module, train: bool) -> None:
    inputs = trial.training_inputs() if train else trial.inputs()
    reference, swapped = copy.deepcopy(model), binarize(model, trial.recipe("identity"))
    assert conversion_of(swapped).binarized
    assert same(run(swapped, inputs, train), run(reference, inputs, train))
    state, expected = swapped.state_dict(), reference.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_4_eval_repeats_and_train_varies_if_it_did(
    trial: Trial, model: nn.Module, binary: nn.Module
) -> None:
    first, second = (run(binary, trial.inputs(), seed=seed) for seed in (0, 1))
    assert same(first, second)
    assert all(output.isfinite().all() for output in first)
    inputs, reference, varied = trial.training_inputs(), copy.deepcopy(model), []
    for network in (reference, copy.deepcopy(binary)):
        varied.append(not same(*(run(network, inputs, True, seed) for seed in (0, 1))))
    assert varied[0] == varied[1]


def test_6_whatever_had_a_gradient_has_one(
    trial: Trial, model: nn.Module, binary: nn.Module
) -> None:
    had, has = graded(model, trial), graded(binary, trial)
    assert had <= has
    called = {
        f"{decision.path}.link.gamma"
        for decision in conversion_of(binary).binarized
        if f"{decision.path}.weight" in had
    }
    gates = {name for name, _ in binary.named_parameters() if name.endswith("link.gamma")}
    assert gates & called <= has
    assert len(gates) == len(conversion_of(binary).binarized)


def graded(network: nn.Module, trial: Trial) -> set[str]:
    """Names of the parameters that a training step gives a gradient, all finite."""
    network = copy.deepcopy(network).train()
    torch.manual_seed(0)
    outputs = flat_tensors(network(*copy.deepcopy(trial.training_inputs())))
    loss = sum(output.square().mean() for output in outputs if output.requires_grad)
    assert isinstance(loss, Tensor)
    loss.backward()
    named = list(network.named_parameters())
    assert all(p.grad.isfinite().all() for _, p in named if p.grad is not None)
    return {name for name, p in named if p.grad is not None}


def test_8_the_graph_agrees(trial: Trial, binary: nn.Module) -> None:
    part = binary.eval().get_submodule(trial.graph)
    inputs = inputs_of(part, binary, trial)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    links = [m for m in part.modules() if isinstance(m, ElasticLink)]
    handles = [link.register_forward_hook(count) for link in links]
    with torch.no_grad():
        expected = flat_tensors(part(*copy.deepcopy(inputs)))
    for handle in handles:
        handle.remove()
    graph = to_graph(part)
    with torch.no_grad():
        assert same(flat_tensors(graph(*copy.deepcopy(inputs))), expected)
    assert len(link_nodes(graph)) == calls > 0


def inputs_of(part: nn.Module, model: nn.Module, trial: Trial) -> tuple[Any, ...]:
    """What a part of a model is given when the model runs."""
    given: list[tuple[Any, ...]] = []
    handle = part.register_forward_pre_hook(lambda _, inputs: given.append(copy.deepcopy(inputs)))
    run(model, trial.inputs())
    handle.remove()
    return given[0]


def test_layers_kept_for_one_pixel_see_one_pixel(trial: Trial, model: nn.Module) -> None:
    seen: dict[nn.Module, set[int]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault(module, set()).add(inputs[0][0, 0].numel())

    trial_model = copy.deepcopy(model)
    kept = [d.path for d in plan(model, trial.recipe()) if d.pattern == "single-pixel"]
    for path in kept:
        trial_model.get_submodule(path).register_forward_pre_hook(note)
    run(trial_model, trial.inputs())
    assert all(sizes == {1} for sizes in seen.values())


def test_9_a_saved_model_agrees(
    trial: Trial, model: nn.Module, binary: nn.Module, tmp_path: Path
) -> None:
    source = find_source(trial.name, **trial.options) if trial.rebuilds else None
    if source is None:  # built with options that a file must not hold
        binary = copy.deepcopy(binary)
        vars(binary).pop("pretrained_cfg", None)
    save(binary, tmp_path / "bnn.pt", source=source)
    again = load(tmp_path / "bnn.pt", model=None if source else model)
    assert type(again) is type(binary)
    assert same(run(again, trial.inputs()), run(binary, trial.inputs()))


def test_9_a_packed_model_agrees(trial: Trial, binary: nn.Module) -> None:
    packed = pack(binary.eval())
    assert any(isinstance(module, PackedConv) for module in packed.modules())
    given, expected = run(packed, trial.inputs()), run(binary, trial.inputs())
    assert len(given) == len(expected)
    for output, wanted in zip(given, expected, strict=True):
        assert output.shape == wanted.shape
        error = (output.nan_to_num(7.0) - wanted.nan_to_num(7.0)).double().norm()
        assert error <= 1e-4 * wanted.nan_to_num(7.0).double().norm()


def test_every_class_is_tried() -> None:
    classes = {row.name: (row.library, row.cls) for row in read(SNAPSHOT)}
    tried = {classes[trial.name] for trial in TRIALS}
    excluded = {("timm", name) for name in EXCLUDED}
    assert tried | excluded == set(classes.values())
    assert not tried & excluded
    assert len(EXCLUDED) <= 10


@pytest.mark.parametrize("name", ["timm/gemma4_vit_167m", "timm/naflexvit_base_patch16_gap"])
def test_what_has_no_convolution_says_so(name: str) -> None:
    with torch.device("meta"):
        model = create(find_source(name))
    with pytest.raises(ConversionError, match="no convolution: there is nothing to binarize"):
        binarize(model)
