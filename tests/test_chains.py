"""Packed layers run as one give the bits that they give one by one, and see every change."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from kernel_cases import needs_engine
from models import CASES, Case
from torch import Tensor, nn

import el_convert.kernels.chain
from el_convert.chains import Chain, PackedBlock, PackedSequential
from el_convert.convert import binarize
from el_convert.errors import ConversionError
from el_convert.kernels.chain import NativeChain
from el_convert.kernels.native import NativeConv
from el_convert.packed import PackedConv
from el_convert.packing import pack
from el_convert.recipes import RECIPES

pytestmark = [needs_engine, pytest.mark.filterwarnings("ignore:the model looks untrained")]


LAYERS = 20  # of `small`


class Counts:
    """How many layers the engine ran by themselves, and how many in chains."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alone = self.chained = 0
        chain, conv = NativeChain.__call__, NativeConv.__call__

        def of_chain(native: Any, input: Tensor) -> Tensor:
            self.chained += len(native._steps)
            return chain(native, input)

        def of_conv(*args: Any) -> Tensor:
            self.alone += 1
            return conv(*args)

        monkeypatch.setattr(NativeChain, "__call__", of_chain)
        monkeypatch.setattr(NativeConv, "__call__", of_conv)

    def take(self) -> tuple[int, int]:
        counts = self.chained, self.alone
        self.chained = self.alone = 0
        return counts


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


@contextmanager
def one_by_one() -> Iterator[None]:
    """Layers call each other in Python."""
    run = Chain.run
    Chain.run = lambda self, _: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Chain.run = run  # type: ignore[method-assign]


def packed_case(case: Case, recipe: str = "elastic-link") -> nn.Module:
    chosen = RECIPES[recipe].with_options({"link.gamma_init": 0.5}) if recipe != "plain" else recipe
    return pack(binarize(case.build(), chosen).eval(), inplace=True)


def small(recipe: Any = "elastic-link", name: str = "resnet18") -> nn.Module:
    torch.manual_seed(0)
    shape: dict[str, Any] = {}
    if name == "resnet18":  # whose last norms start at 0, so that nothing of a block would show
        shape = {"channels": (16, 16, 32, 32), "zero_init_last": False}
    return pack(binarize(timm.create_model(name, **shape), recipe).eval(), inplace=True)


def both(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), one_by_one():
        expected = model(x)
    with torch.no_grad():
        return model(x), expected


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace("/", "-"))
def test_zoo_models_give_the_bits_of_their_layers(case: Case, batch: int) -> None:
    model = packed_case(case)
    given, expected = both(model, case.input(batch))
    assert torch.equal(given, expected)
    assert given.stride() == expected.stride()


@pytest.mark.parametrize("recipe", ["plain", "reactnet", "elastic-reactnet", "bi-real", "xnor"])
def test_recipes_give_the_bits_of_their_layers(recipe: str) -> None:
    given, expected = both(small(recipe), torch.randn(2, 3, 64, 64))
    assert torch.equal(given, expected)


# How many layers are in chains; the last of mobilenetv2 is by itself.
@pytest.mark.parametrize("downsample", ["average", "max"])
@pytest.mark.parametrize(
    ("name", "chained"),
    [("resnet18", LAYERS), ("resnet26", 28), ("mobilenetv1_100", 26), ("mobilenetv2_100", 50)],
)
def test_plain_networks_are_chains(
    counts: Counts, name: str, chained: int, downsample: str
) -> None:
    recipe = RECIPES["elastic-link"].with_options({"link.downsample": downsample})
    model, x = small(recipe, name), torch.randn(1, 3, 64, 64)
    layers = sum(isinstance(module, PackedConv) for module in model.modules())
    for _ in range(2):
        with torch.no_grad():
            model(x)
        assert counts.take() == (chained, layers - chained)


@pytest.mark.parametrize("size", [(64, 64), (65, 50), (33, 97), (32, 32)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_sizes_and_layouts(size: tuple[int, int], layout: torch.memory_format) -> None:
    model = small()
    x = torch.randn(2, 3, *size).to(memory_format=layout)
    given, expected = both(model, x)
    assert torch.equal(given, expected)
    stage = torch.randn(2, 64, 9, 9).to(memory_format=layout)
    given, expected = both(model.layer1, stage)
    assert torch.equal(given, expected)
    assert given.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("floats", [1, 3000, 1 << 30])
def test_images_are_taken_together_or_one_by_one(
    monkeypatch: pytest.MonkeyPatch, floats: int
) -> None:
    monkeypatch.setattr(el_convert.kernels.chain, "_CACHE_FLOATS", floats)
    given, expected = both(small(), torch.randn(5, 3, 40, 40))
    assert torch.equal(given, expected)


# Maps of several strips each, which threads share, and help each other with.
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["resnet26", "mobilenetv1_100"])
def test_strips(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    model = small(name=name)
    for size in ((200, 168), (176, 310)):
        given, expected = both(model, torch.randn(1, 3, *size))
        assert torch.equal(given, expected)


def test_pointwise_layers_join_the_layer_before() -> None:
    """Of a bottleneck the 3x3 convolution, the 1x1 after it and the next block's first."""
    groups: list[list[int]] = []
    plan = el_convert.kernels.chain.place_maps

    def watch(*args: Any) -> Any:
        groups.append(args[3])
        return plan(*args)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(el_convert.kernels.chain, "place_maps", watch)
        small(name="resnet26")(torch.randn(1, 3, 64, 64))
    # Each stage: 1x1, 3x3, the shortcut, 1x1 and the next 1x1, then 3x3 and 1x1.
    assert groups == [[0, 1, 2, 3, 3, 4, 4]] * 4


def test_several_threads_of_torch(counts: Counts) -> None:
    model, x = small(), torch.randn(2, 3, 96, 96)
    one, _ = both(model, x)
    torch.set_num_threads(2)
    assert torch.equal(both(model, x)[0], one)


def test_two_threads_run_one_model() -> None:
    model, batches = small(), [torch.randn(2, 3, 64, 64) for _ in range(2)]
    expected = [both(model, x)[1] for x in batches]
    model = copy.deepcopy(model)  # nothing is prepared yet
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(model(batches[number]), expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def _gamma(model: Any) -> None:
    with torch.no_grad():
        model.layer2[1].conv1.link.gamma.mul_(-1.5)


def _bits(model: Any) -> None:
    model.layer2[1].conv2.bits.bitwise_not_()


def _swapped(model: Any) -> None:
    model.layer1[1], model.layer2[1] = model.layer2[1], model.layer1[1]


def _dropped(model: Any) -> None:
    del model.layer1[1]


def _appended(model: Any) -> None:
    model.layer1.append(nn.ReLU())


def _other_layer(model: Any) -> None:
    model.layer2[1].conv2 = copy.deepcopy(model.layer2[1].conv2)
    model.layer2[1].conv2.bits.bitwise_not_()


def _loaded(model: Any) -> None:
    model.load_state_dict(
        {k: v * 2 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    )


def _converted(model: Any) -> None:
    model.double().float()


def _patched(model: Any) -> None:
    forward = model.layer3[0].conv2.forward
    model.layer3[0].conv2.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 2


def _no_link(model: Any) -> None:
    model.layer3[1].conv1.link = None


def _edited(model: Any) -> None:
    block = model.layer1[0]
    (output,) = (node for node in block.graph.nodes if node.op == "output")
    with block.graph.inserting_before(output):
        output.args = (block.graph.call_function(torch.neg, (output.args[0],)),)
    block.recompile()


CHANGES: list[Callable[[Any], None]] = [
    _gamma, _bits, _swapped, _dropped, _appended, _other_layer, _loaded, _converted, _patched,
    _no_link, _edited,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_are_seen(change: Callable[[Any], None]) -> None:
    model, x = small("elastic-reactnet"), torch.randn(1, 3, 64, 64)
    before, _ = both(model, x)
    change(model)
    given, expected = both(model, x)
    assert torch.equal(given, expected)
    if change is not _converted:
        assert not torch.equal(given, before)


@pytest.mark.parametrize("kind", ["slope", "shift_in", "shift_out"])
def test_activations_tensors_are_seen(kind: str) -> None:
    model, x = small("elastic-reactnet"), torch.randn(1, 3, 64, 64)
    before, _ = both(model, x)
    found = [p for name, p in model.layer2.named_parameters() if name.endswith(kind)]
    assert found
    with torch.no_grad():
        found[0].add_(1)
    given, expected = both(model, x)
    assert torch.equal(given, expected)
    assert not torch.equal(given, before)


@pytest.mark.parametrize("path", ["layer1", "layer1.0", "layer2.1.conv1", "layer2.1.conv2.link"])
def test_hooks_are_called(counts: Counts, path: str) -> None:
    model, x = small(), torch.randn(1, 3, 64, 64)
    before, _ = both(model, x)
    seen: list[Any] = []
    module = model.get_submodule(path)
    handles = [
        module.register_forward_hook(lambda *_: seen.append("after")),
        module.register_forward_pre_hook(lambda *_: seen.append("before")),
    ]
    with torch.no_grad():
        assert torch.equal(model(x), before)
    # A gate's own forward is within the native layer: its hooks need the layer to be opened.
    assert seen == ([] if path.endswith("link") else ["before", "after"])
    for handle in handles:
        handle.remove()
    counts.take()
    with torch.no_grad():
        model(x)
    assert counts.take()[0] > 0


def test_global_hooks_are_called() -> None:
    model, x = small(), torch.randn(1, 3, 64, 64)
    both(model, x)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    with torch.no_grad():
        model(x)
    handle.remove()
    assert sum(isinstance(module, PackedConv) for module in seen) == LAYERS


def test_training_mode_of_a_part_is_refused() -> None:
    model, x = small(), torch.randn(1, 3, 64, 64)
    both(model, x)
    model.layer2[1].conv1.train()
    with pytest.raises(ConversionError, match="packed layer does not train"):
        both(model, x)


def test_gradients_of_the_input_flow() -> None:
    model = small()
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None


def test_copies_are_apart() -> None:
    model, x = small(), torch.randn(1, 3, 64, 64)
    before, _ = both(model, x)
    twin = copy.deepcopy(model)
    assert isinstance(twin.layer1, PackedSequential)
    assert isinstance(twin.layer1[0], PackedBlock)
    _gamma(twin)
    assert torch.equal(both(model, x)[0], before)
    given, expected = both(twin, x)
    assert torch.equal(given, expected)
    assert not torch.equal(given, before)


def test_functional_calls_use_what_they_are_given() -> None:
    model, x = small(), torch.randn(1, 3, 64, 64)
    before, _ = both(model, x)
    state = {k: v * 2 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    with torch.no_grad():
        given = torch.func.functional_call(model, state, (x,))
        with one_by_one():
            expected = torch.func.functional_call(model, state, (x,))
        assert torch.equal(given, expected)
        assert not torch.equal(given, before)
        assert torch.equal(model(x), before)


def test_wrong_channels_are_named() -> None:
    model = small()
    with pytest.raises(ValueError, match="not of 64 channels"):
        both(model.layer1, torch.randn(1, 8, 9, 9))
