"""What must hold for models of users' own: plan, conversion, files, graphs, and odd states."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import user_models as own
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrizations, parametrize, prune
from user_cases import CASES, Case, Snapshot, counted, graded, image, same
from user_layers import Wrapped

from el_convert import BinaryConv2d, binarize, load, plan, save, to_graph
from el_convert.convert import conversion_of
from el_convert.errors import ConversionError
from el_convert.graphs import link_nodes
from el_convert.link import ElasticLink
from el_convert.nn import BinaryConv

MODES = pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])


def only(*graphs: str) -> pytest.MarkDecorator:
    """The cases of a kind of graph; those with options have their own test."""
    chosen = {name: c for name, c in CASES.items() if c.graph in graphs and not c.kwargs}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen)


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.param
    return chosen


def test_the_plan_covers_exactly_the_convolutions(case: Case) -> None:
    model = case.model()
    decisions = plan(model)
    convs = [path for path, module in model.named_modules() if isinstance(module, _ConvNd)]
    assert [decision.path for decision in decisions] == convs
    assert len(convs) == case.convolutions
    assert {d.path for d in decisions if d.action == "keep"} == set(case.kept.split())
    assert all(decision.reason for decision in decisions)


@MODES
def test_the_identity_recipe_changes_nothing(case: Case, train: bool) -> None:
    model = case.model()
    swapped = binarize(model, "identity")
    assert any(isinstance(module, BinaryConv) for module in swapped.modules())
    assert same(case.run(swapped, train), case.run(model, train))
    state = swapped.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_the_model_is_left_alone(case: Case) -> None:
    model = case.model()
    first = plan(model)
    with torch.no_grad():
        case.run(model)  # fills what it caches
    next(model.children()).train()  # a mode of its own
    before, random = Snapshot(model), torch.get_rng_state()
    assert plan(model) == first
    binary = binarize(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert before.holds()
    assert {id(module) for module in model.modules()}.isdisjoint(map(id, binary.modules()))


def test_eval_repeats_and_in_place_is_the_same(case: Case) -> None:
    model, binary = case.both()
    outputs = case.run(binary)
    assert all(output.isfinite().all() for output in outputs)
    assert same(case.run(binary), outputs)
    assert binarize(model, inplace=True) is model
    assert same(case.run(model), outputs)


@MODES
def test_every_call_of_a_binarized_convolution_passes_its_gate(case: Case, train: bool) -> None:
    model, binary = case.both()
    chosen = {decision.path for decision in conversion_of(binary).binarized}
    convs = counted(model, _ConvNd, lambda: case.run(model, train))
    gates = counted(binary, ElasticLink, lambda: case.run(binary, train))
    assert gates == {f"{path}.link": calls for path, calls in convs.items() if path in chosen}
    assert gates.total() >= 1


def test_whatever_had_a_gradient_has_one(case: Case) -> None:
    model, binary = case.both()
    had = graded(model, lambda: case.run(model, train=True))
    has = graded(binary, lambda: case.run(binary, train=True))
    gates = counted(binary, ElasticLink, lambda: case.run(binary, train=True))
    assert had | {f"{path}.gamma" for path in gates} <= has


def test_a_saved_model_agrees(case: Case, tmp_path: Path) -> None:
    model, binary = case.both()
    case.run(binary, train=True)  # so that norms have statistics
    expected = case.run(binary)
    for path in (tmp_path / "bnn.pt", tmp_path / "bnn.safetensors"):
        save(binary, path)
        again = load(path, model=model)
        assert type(again) is type(binary)
        assert same(case.run(again), expected)


@MODES
@only("whole")
def test_the_graph_agrees(case: Case, train: bool) -> None:
    _, binary = case.both()
    binary.train(train)
    graph = to_graph(binary)
    graph.graph.lint()
    assert same(case.run(graph, train), case.run(binary, train))
    calls = counted(binary, ElasticLink, lambda: case.run(binary, train))
    assert len(link_nodes(graph)) == calls.total()


@only("refused")
def test_a_graph_that_cannot_be_is_refused(case: Case) -> None:
    _, binary = case.both()
    with pytest.raises(ConversionError, match=r"does not trace \(.*: call to_graph on its subm"):
        to_graph(binary)


@only("either")
def test_a_graph_is_refused_rather_than_wrong(case: Case) -> None:
    _, binary = case.both()
    try:
        graph = to_graph(binary.eval())
    except ConversionError as error:
        assert "does not trace" in str(error)
    else:
        assert same(case.run(graph), case.run(binary))


@only("refused", "either")
def test_what_does_not_trace_is_a_node_of_what_does(case: Case) -> None:
    binary = Wrapped(case.both()[1]).eval()
    assert same(case.run(to_graph(binary)), case.run(binary))


def test_a_graph_does_not_lose_what_a_hook_does() -> None:
    net, input = own.Net(), image(2, 3, 32, 32)
    net.body.register_forward_hook(lambda part, inputs, output: 2 * output)
    binary = binarize(net).eval()
    try:
        graph = to_graph(binary)
    except ConversionError as error:
        assert "hook" in str(error)
    else:
        assert torch.equal(graph(input), binary(input))


def test_options_of_a_graph_are_fixed_at_their_defaults() -> None:
    binary = binarize(own.KeywordOnly()).eval()
    graph, input = to_graph(binary), image(2, 3, 32, 32)
    assert torch.equal(graph(input, None, False), binary(input))
    with pytest.raises(AssertionError, match="return_features has been specialized"):
        graph(input, None, True)


def test_the_advice_of_a_refused_graph_works() -> None:
    input = image(1, 3, 32, 32)
    listed, wrapper = binarize(own.FromList()).eval(), binarize(own.AnyArguments()).eval()
    assert torch.equal(to_graph(listed.net)(input), listed([input]))
    assert torch.equal(to_graph(wrapper.inner)(input), wrapper(input))


# Weights that are computed.

COMPUTED: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_computed_weight_is_kept_until_it_is_a_weight(kind: str, tmp_path: Path) -> None:
    net, input = own.Net(), image(2, 3, 32, 32)
    conv: Any = net.body[0]
    COMPUTED[kind](conv)
    before = Snapshot(net)
    assert [d.path for d in plan(net) if d.pattern == "parametrized"] == ["body.0"]
    with pytest.warns(
        UserWarning, match=r"body\.0: .*first call .*: torch.*remove_parametrizations"
    ):
        binary = binarize(net)
    assert before.holds()
    assert parametrize.is_parametrized(binary.body[0])
    assert isinstance(binary.tail[0], BinaryConv2d)
    save(binary, tmp_path / "bnn.pt")
    again = load(tmp_path / "bnn.pt", model=net)
    assert torch.equal(again.eval()(input), binary.eval()(input))

    parametrize.remove_parametrizations(conv, "weight")  # as the reason says
    free = binarize(net)
    assert isinstance(free.body[0], BinaryConv2d)
    assert torch.equal(free.body[0].weight, conv.weight)
    assert free(input).isfinite().all()


OLD: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "pruning": (prune.RandomUnstructured.apply, prune.remove),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", OLD)
def test_a_weight_that_a_hook_computes_is_kept_until_it_is_gone(kind: str) -> None:
    net, input = own.Net(), image(2, 3, 32, 32)
    conv: Any = net.body[0]
    compute, remove = OLD[kind]
    compute(conv, "weight", **{"amount": 0.5} if kind == "pruning" else {})
    net(input)
    (decision,) = (d for d in plan(net) if d.path == "body.0")
    assert decision.action == "keep"
    assert kind in decision.reason  # "remove your hooks" would not tell the user what to call
    with pytest.raises(ConversionError, match=r"remove weight_norm, pruning or stored"):
        binarize(net)
    remove(conv, "weight")
    binary = binarize(net)
    assert isinstance(binary.body[0], BinaryConv2d)
    assert torch.equal(binary.body[0].weight, conv.weight)
    assert binary(input).isfinite().all()


# Other dtypes, layouts, and parameters that do not train.

DTYPES = (torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["u-net", "audio", "video", "geometry", "siamese", "caches"])
def test_other_dtypes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.model().to(dtype).eval()
    inputs = [value.to(dtype) for value in case.args()]
    assert copy.deepcopy(model)(*inputs).isfinite().all()
    binary = binarize(model)
    assert {value.dtype for value in binary.parameters()} == {dtype}
    output = binary(*inputs)
    assert output.isfinite().all()
    assert output.dtype == dtype
    save(binary, tmp_path / "bnn.pt")
    assert torch.equal(load(tmp_path / "bnn.pt", model=model).eval()(*inputs), output)


@pytest.mark.parametrize("name", ["u-net", "geometry", "siamese", "own resnet"])
def test_channels_last_gives_the_same(name: str) -> None:
    case = CASES[name]
    model = case.model().double().eval()
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    inputs = [value.double() for value in case.args()]
    binary, other = binarize(model), binarize(last)
    convs = [m for m in other.modules() if isinstance(m, BinaryConv)]
    assert all(c.weight.is_contiguous(memory_format=torch.channels_last) for c in convs)
    output = other(*(value.contiguous(memory_format=torch.channels_last) for value in inputs))
    assert torch.allclose(output, binary(*inputs))


@pytest.mark.parametrize("name", ["u-net", "shared block", "own resnet", "siamese"])
def test_frozen_parameters_stay_frozen(name: str) -> None:
    case = CASES[name]
    model = case.model()
    for index, value in enumerate(model.parameters()):
        value.requires_grad = index % 2 == 1
    frozen = {key for key, value in model.named_parameters() if not value.requires_grad}
    binary = binarize(model)
    names = {key for key, _ in binary.named_parameters()}
    assert {key for key, value in binary.named_parameters() if not value.requires_grad} == frozen
    assert graded(binary, lambda: case.run(binary, train=True)) == names - frozen


# Models that were used before.


def test_activations_kept_from_training_stay() -> None:
    model = own.Remembers()
    model(image(2, 3, 32, 32))
    before = Snapshot(model)
    plan(model)
    assert before.holds()


def test_what_cannot_be_copied_converts_in_place() -> None:
    model, input = own.Remembers(), image(2, 3, 32, 32)
    model(input)
    before = Snapshot(model)
    with pytest.raises(ConversionError, match=r"Remembers cannot be copied.*inplace=True"):
        binarize(model)
    assert before.holds()
    assert binarize(model, inplace=True) is model
    assert model(input).isfinite().all()
    assert all(isinstance(value, Tensor) for value in [model.last, *model.seen])


def test_a_filled_cache_is_copied_and_only_forbids_a_graph() -> None:
    model, input = own.Caches().eval(), image(2, 3, 32, 32)
    model(input)
    binary = binarize(model)
    assert binary.size == (32, 32)
    with pytest.raises(ConversionError, match="Caches does not trace"):
        to_graph(binary)
    assert binary(image(1, 3, 24, 24)).isfinite().all()
    assert (binary.size, model.size) == ((24, 24), (32, 32))


def test_a_computed_weight_of_the_stem_leaves_the_plan() -> None:
    net = own.Net()
    parametrizations.weight_norm(net.stem[0])
    with warnings.catch_warnings():
        # It would be kept in any case: a warning may come and is not demanded.
        warnings.simplefilter("ignore", UserWarning)
        binary = binarize(net)
    assert not isinstance(binary.stem[0], BinaryConv2d)
    assert isinstance(binary.body[0], BinaryConv2d)
