"""Deciding and refusing: every row of the table, globs, and models that cannot be converted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from el_convert import patterns
from el_convert.convert import binarize
from el_convert.errors import ConversionError, UnknownNameError
from el_convert.nn import BinaryConv2d
from el_convert.patterns import PATTERNS, Pattern, register_pattern, unregister_pattern
from el_convert.planning import plan, plan_conversion
from el_convert.recipes import RECIPES


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )


def rows(model: nn.Module, **options: object) -> dict[str, str]:
    return {d.path: d.pattern for d in plan(model, **options)}  # type: ignore[arg-type]


def test_default_rows() -> None:
    assert rows(small()) == {"0": "reads-image", "2": "conv2d", "4": "conv2d"}


def test_recipes_switch_rows() -> None:
    recipe = RECIPES["plain"].with_options({"keep.depthwise": True, "keep.image": False})
    assert rows(small(), recipe=recipe) == {"0": "conv2d", "2": "depthwise", "4": "conv2d"}


def test_every_row_has_a_name_and_a_reason() -> None:
    assert len({row.name for row in PATTERNS}) == len(PATTERNS)
    assert all(row.reason for row in PATTERNS)
    assert PATTERNS[-1].action == "keep"


def test_keep_by_glob() -> None:
    decisions = {d.path: d for d in plan(small(), keep=["[2-3]"])}
    assert decisions["2"].action == "keep"
    assert decisions["2"].reason == "named by keep='[2-3]'"
    assert decisions["4"].action == "binarize"
    assert rows(small(), keep="4")["4"] == "named"


def test_idle_globs_are_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"no convolution matches; plan.*--dry-run"):
        plan(small(), keep=["7"])
    with pytest.raises(UnknownNameError, match=r"did you mean 'body\.\*'"):
        plan(Body(), keep=["bdy.*"])


def test_a_glob_that_names_a_container_says_what_to_type() -> None:
    with pytest.raises(UnknownNameError, match=r"try 'body\.\*'"):
        plan(nn.Sequential(), keep=[]) or plan(Body(), keep=["body"])


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = small()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_hooked_convolutions_are_kept_with_a_warning() -> None:
    model = small()
    seen: list[int] = []
    model[4].register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match=r"1 of 3 convolutions kept in float: 4: it has hooks"):
        binary = binarize(model)
    assert type(binary[4]) is nn.Conv2d  # type: ignore[index]
    binary(torch.randn(1, 3, 8, 8))
    assert seen == [1]


def computed_weight(kind: str, conv: nn.Module) -> None:
    if kind == "weight_norm":
        parametrizations.weight_norm(conv)
    elif kind == "spectral_norm":
        parametrizations.spectral_norm(conv)
    elif kind == "prune":
        prune.l1_unstructured(conv, "weight", amount=0.5)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(conv)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "prune", "old weight_norm"])
def test_computed_weights_are_kept(kind: str) -> None:
    model = small()
    computed_weight(kind, model[4])
    assert rows(model)["4"] in ("parametrized", "hooked")
    with pytest.warns(UserWarning, match="4: "):
        binarize(model, inplace=True)
    assert type(model[2]) is BinaryConv2d
    assert not isinstance(model[4], BinaryConv2d)
    assert model(torch.randn(2, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize("kind", ["prune", "old weight_norm"])
@pytest.mark.filterwarnings("ignore:1 of 3 convolutions kept")
def test_what_torch_cannot_copy_is_said(kind: str) -> None:
    model = small()
    computed_weight(kind, model[4])
    with pytest.raises(ConversionError, match=r"cannot be copied.*pass inplace=True"):
        binarize(model)


class Scaled(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_unknown_subclasses_are_kept_by_name() -> None:
    model = small()
    model[4] = Scaled(8, 8, 1)
    (decision,) = (d for d in plan(model) if d.path == "4")
    assert decision.pattern == "unknown-class"
    assert "Scaled" in decision.reason
    assert "register_pattern" in decision.reason
    with pytest.warns(UserWarning, match="Scaled"):
        binarize(model)


@pytest.fixture
def scaled_row() -> Iterator[None]:
    register_pattern(
        Pattern(
            name="scaled",
            match=lambda site: type(site.conv) is Scaled,
            action="binarize",
            reason="the factor goes into the weight scale",
            build=BinaryConv2d.from_float,
        )
    )
    yield
    unregister_pattern("scaled")


@pytest.mark.usefixtures("scaled_row")
def test_a_registered_row_binarizes_and_protects() -> None:
    model = small()
    model[4], model[0] = Scaled(8, 8, 1), Scaled(3, 8, 3)
    assert rows(model) == {"0": "reads-image", "2": "conv2d", "4": "scaled"}
    assert isinstance(binarize(model)[4], BinaryConv2d)  # type: ignore[index]
    with pytest.raises(ValueError, match="registered already"):
        register_pattern(patterns.find_pattern("scaled"))


def test_register_before_a_row() -> None:
    row = Pattern("all", lambda site: True, "keep", "nothing changes")
    register_pattern(row, before="reads-image")
    try:
        assert set(rows(small()).values()) == {"all"}
        with pytest.raises(ConversionError, match="all 3 are kept"):
            binarize(small())
    finally:
        unregister_pattern("all")
    with pytest.raises(UnknownNameError, match="did you mean 'reads-image'"):
        register_pattern(row, before="reads-imag")
    with pytest.raises(UnknownNameError, match="unknown pattern 'all'"):
        unregister_pattern("all")


def test_patterns_check_themselves() -> None:
    with pytest.raises(ValueError, match="needs build="):
        Pattern("x", lambda site: True, "binarize", "why")
    with pytest.raises(ValueError, match="action must be"):
        Pattern("x", lambda site: True, "drop", "why")  # type: ignore[arg-type]


def test_nothing_to_binarize_is_said() -> None:
    with pytest.raises(ConversionError, match="Linear has no convolution: there is nothing"):
        binarize(nn.Linear(2, 2))
    with pytest.raises(ConversionError, match="no convolution to binarize: all 1 are kept"):
        binarize(nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 2)))
    assert plan(nn.Linear(2, 2)) == ()


def test_no_module_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"takes a torch\.nn\.Module, not str"):
        binarize("resnet18")  # type: ignore[arg-type]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")  # torch's own, on wrapping for one process
def test_distributed_wrappers_are_refused() -> None:
    from torch.distributed.fsdp import fully_shard

    with pytest.raises(ConversionError, match=r"wrapped in DistributedDataParallel.*wrap it after"):
        binarize(nn.parallel.DistributedDataParallel(small()))
    sharded = fully_shard(small(), mesh=dist.init_device_mesh("cpu", (1,)))
    with pytest.raises(ConversionError, match="sharded by fully_shard"):
        binarize(sharded)


def test_fsdp_is_refused_by_name() -> None:
    # The real wrapper wants an accelerator; its name is what counts.
    home = "torch.distributed.fsdp.fully_sharded_data_parallel"
    wrapper = type("FullyShardedDataParallel", (nn.Sequential,), {"__module__": home})
    with pytest.raises(ConversionError, match="FSDP-wrapped"):
        binarize(wrapper(small()))


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated, and says so
def test_compiled_and_scripted_models_are_refused() -> None:
    with pytest.raises(ConversionError, match="DataParallel"):
        binarize(nn.DataParallel(small()))
    with pytest.raises(ConversionError, match=r"compiled by torch.compile"):
        binarize(torch.compile(small()))  # type: ignore[arg-type]
    in_place = small()
    in_place.compile()
    with pytest.raises(ConversionError, match="is compiled"):
        binarize(in_place)
    with pytest.raises(ConversionError, match="TorchScript"):
        binarize(torch.jit.script(small()))
    with pytest.raises(ConversionError, match="TorchScript"):
        binarize(torch.jit.trace(small(), torch.randn(1, 3, 8, 8)))


def test_lazy_convolutions_are_refused_by_name() -> None:
    with pytest.raises(ConversionError, match=r"1 \(LazyConv2d\) is lazy.*run one forward"):
        binarize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyConv2d(8, 3)))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_refusal_changes_nothing(inplace: bool) -> None:
    model = small()
    before = str(model)
    with pytest.raises(UnknownNameError):
        binarize(model, keep=["nosuch"], inplace=inplace)
    assert str(model) == before


def test_inplace_changes_the_model_itself() -> None:
    model = small()
    assert binarize(model, inplace=True) is model
    assert isinstance(model[2], BinaryConv2d)


def test_one_conversion_serves_a_twin() -> None:
    conversion = plan_conversion(small())
    assert [d.path for d in conversion.binarized] == ["2", "4"]
    assert [d.path for d in conversion.kept] == ["0"]
