"""What must hold for any model, shown on architectures that differ in what they stress."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator

import pytest
import torch
from models import CASES, Case, flat_tensors
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from el_convert.checkpoint import load, save
from el_convert.convert import binarize
from el_convert.errors import ConversionError
from el_convert.graphs import link_nodes, to_graph
from el_convert.link import ElasticLink
from el_convert.nn import BinaryConv
from el_convert.patterns import Pattern, register_pattern, unregister_pattern
from el_convert.planning import plan

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torchvision")


# One model's tests on one worker, so that each model is built once.
PARAMS = [pytest.param(c, id=c.name, marks=pytest.mark.xdist_group(c.name)) for c in CASES]


@pytest.fixture(params=PARAMS, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.param
    return chosen


@pytest.fixture(scope="module")
def model(case: Case) -> nn.Module:
    """The float model; property 3 is that no test changes it."""
    return case.build()


@pytest.fixture(scope="module")
def binary(model: nn.Module) -> nn.Module:
    return binarize(model)


@pytest.fixture
def identity_rows() -> Iterator[None]:
    """Make the table swap every convolution for an ordinary twin."""

    def twin(conv: nn.Module, _: object) -> nn.Module:
        return copy.copy(conv)

    register_pattern(Pattern("twin", lambda site: True, "binarize", "a copy", twin))
    yield
    unregister_pattern("twin")


def run(model: nn.Module, input: Tensor, train: bool = False, seed: int = 3) -> list[Tensor]:
    model.train(train)
    torch.manual_seed(seed)
    with torch.no_grad():
        return flat_tensors(model(input))


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_1_identity_recipe_changes_nothing(case: Case, model: nn.Module, train: bool) -> None:
    reference, swapped = copy.deepcopy(model), binarize(model, "identity")
    assert sum(isinstance(m, BinaryConv) for m in swapped.modules()) == case.binarized
    assert same(run(swapped, case.input(), train), run(reference, case.input(), train))
    state, expected = swapped.state_dict(), reference.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.usefixtures("identity_rows")
def test_1_identity_builder_changes_nothing(case: Case, model: nn.Module) -> None:
    reference, swapped = copy.deepcopy(model), binarize(model, "identity")
    replaced = [path for path, m in swapped.named_modules() if isinstance(m, _ConvNd)]
    assert len(replaced) == case.convolutions
    for train in (False, True):
        assert same(run(swapped, case.input(), train), run(reference, case.input(), train))


def test_2_plan_covers_exactly_the_convolutions(case: Case, model: nn.Module) -> None:
    decisions = plan(model)
    convs = [path for path, module in model.named_modules() if isinstance(module, _ConvNd)]
    assert [decision.path for decision in decisions] == convs
    assert len(convs) == case.convolutions
    assert sum(decision.action == "binarize" for decision in decisions) == case.binarized
    assert all(decision.reason for decision in decisions)


def test_3_the_model_is_left_alone(case: Case, model: nn.Module) -> None:
    model.train()
    next(model.children()).eval()  # a mode of its own
    handle = model.register_forward_hook(lambda *_: None)
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    binarize(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [len(m._forward_hooks) for m in model.modules()] == [
        len(m._forward_hooks) for m in before.modules()
    ]
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert str(model) == str(before)
    now = model.state_dict()
    assert all(torch.equal(now[key], value) for key, value in before.state_dict().items())
    handle.remove()


def test_4_eval_repeats_and_train_varies_if_it_did(
    case: Case, model: nn.Module, binary: nn.Module
) -> None:
    first, second = (run(binary, case.input(), seed=seed) for seed in (0, 1))
    assert same(first, second)
    assert all(output.isfinite().all() for output in first)
    reference = copy.deepcopy(model)
    float_varies = not same(*(run(reference, case.input(), True, seed) for seed in (0, 1)))
    trial = copy.deepcopy(binary)
    trial_varies = not same(*(run(trial, case.input(), True, seed) for seed in (0, 1)))
    assert trial_varies == float_varies


def test_5_the_public_surface_survives(model: nn.Module, binary: nn.Module) -> None:
    assert type(binary) is type(model)
    assert {name for name in dir(model) if name not in dir(binary)} == set()
    state, added = list(model.state_dict()), []
    for key in binary.state_dict():
        if key not in state:
            added.append(key)
    assert [key for key in state if key not in binary.state_dict()] == []
    endings = (".link.gamma", ".weight")  # gates, and slopes of per-channel activations
    assert all(key.endswith(endings) for key in added)
    for name in ("forward_features", "get_classifier", "reset_classifier", "feature_info"):
        assert hasattr(binary, name) == hasattr(model, name)
    if hasattr(binary, "get_classifier"):
        assert isinstance(binary.get_classifier(), nn.Module)
        assert inspect.signature(binary.forward) == inspect.signature(model.forward)


def test_6_whatever_had_a_gradient_has_one(case: Case, model: nn.Module, binary: nn.Module) -> None:
    def graded(network: nn.Module) -> set[str]:
        trial = copy.deepcopy(network).train()
        torch.manual_seed(0)
        loss = sum(output.square().sum() for output in flat_tensors(trial(case.input())))
        assert isinstance(loss, Tensor)
        loss.backward()
        named = list(trial.named_parameters())
        assert all(p.grad.isfinite().all() for _, p in named if p.grad is not None)
        return {name for name, p in named if p.grad is not None}

    had, has = graded(model), graded(binary)
    assert had <= has
    gates = {name for name, _ in binary.named_parameters() if name.endswith("link.gamma")}
    assert len(gates) == case.binarized
    assert gates <= has


def test_7_twice_is_refused(binary: nn.Module) -> None:
    with pytest.raises(ConversionError, match="binarized already"):
        binarize(binary)
    with pytest.raises(ConversionError, match="binarized already"):
        plan(nn.Sequential(binary))


def test_8_the_graph_agrees(case: Case, binary: nn.Module) -> None:
    binary.eval()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handles = [m.register_forward_hook(count) for m in binary.modules() if is_link(m)]
    expected = run(binary, case.input())
    for handle in handles:
        handle.remove()
    graph = to_graph(binary)
    assert same(run(graph, case.input()), expected)
    assert len(link_nodes(graph)) == calls


def is_link(module: nn.Module) -> bool:
    return isinstance(module, ElasticLink)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_9_a_saved_model_agrees(
    case: Case, binary: nn.Module, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("saved") / f"bnn.{suffix}"
    save(binary, path, source=case_source(binary))
    again = load(path)
    assert type(again) is type(binary)
    assert same(run(again, case.input()), run(binary, case.input()))


def case_source(binary: nn.Module) -> None:
    """Nothing: the model itself says where it came from."""
    assert hasattr(binary, "el_convert_source")


# Tracing for the compiler takes about as long as all other tests together.
QUICK = ("timm/resnet18", "timm/mobilenetv1_100", "timm/vgg11_bn", "torchvision/squeezenet1_1")
COMPILED = [
    pytest.param(c, id=c.name, marks=[] if c.name in QUICK else pytest.mark.slow) for c in CASES
]


@pytest.mark.parametrize("case", COMPILED)
def test_9_a_compiled_model_agrees(case: Case) -> None:
    binary = binarize(case.build()).eval()
    torch._dynamo.reset()
    compiled = torch.compile(binary, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(case.input()), binary(case.input()))
