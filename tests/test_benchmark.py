"""Benchmarks have the right parts and disturb nothing. How fast anything is, is never asserted."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm.layers
import torch
from rich.console import Console
from torch import Tensor, nn

from el_convert import benchmark as module
from el_convert.benchmark import benchmark, layer_times, pack_untrained
from el_convert.errors import ConversionError, ElConvertError, UnknownNameError
from el_convert.packed import PackedConv
from el_convert.peers import PEERS, Peer, Run, Workload
from el_convert.timings import (
    FLOAT,
    PACKED,
    Benchmark,
    LayerTime,
    LayerTimes,
    quantiles,
    render_benchmark,
    to_json,
)

SIZE = (3, 8, 8)
NO_ENGINE = ("el_convert was installed without its native engine", "the native engine of")
pytestmark = pytest.mark.filterwarnings(*(f"ignore:{start}" for start in NO_ENGINE))
EXAMPLE = Path(__file__).parents[1] / "examples" / "benchmark.py"


class Net(nn.Module):
    """A stem that stays in float, and packed layers of several kinds; `again` is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.wide = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.again = nn.Conv2d(32, 32, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.up = nn.ConvTranspose2d(32, 32, 2, stride=2)
        self.same = timm.layers.Conv2dSame(32, 32, 3, stride=2)
        self.head = nn.Linear(32, 5)

    def forward(self, input: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.wide(self.stem(input))))
        x = x + self.again(self.again(x))
        x = self.same(self.up(self.depthwise(x)))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def note(name: str, seen: list[str]) -> Peer:
    """A peer that writes down when it runs."""
    return Peer(name, f"the peer {name}", ("torch",), lambda _: lambda: seen.append(name))


@pytest.fixture
def net() -> nn.Module:
    return Net().eval()


@pytest.fixture
def packed(net: nn.Module) -> nn.Module:
    return pack_untrained(net)


@pytest.fixture
def result(net: nn.Module, packed: nn.Module) -> Benchmark:
    return benchmark(packed, net, input_size=SIZE, batch=2, rounds=2, layers=True)


def test_contestants(result: Benchmark) -> None:
    assert [one.name for one in result.contestants] == [PACKED, "torch"]
    for one in result.contestants:
        assert 0 < one.low <= one.median <= one.high
        assert 0 < one.ratio_low <= one.ratio <= one.ratio_high
    assert result.contestants[0].ratio_low == result.contestants[0].ratio_high == 1
    assert (result.model, result.input, result.rounds) == ("Net", (2, *SIZE), 2)
    assert result.skipped == ()
    assert result.machine.cpu
    assert result.machine.torch == torch.__version__


def test_every_packed_layer_is_timed_or_named(result: Benchmark) -> None:
    assert result.layers is not None
    names = [layer.name for layer in result.layers.layers]
    assert names == ["wide", "again", "again", "depthwise", "same"]
    assert result.layers.omitted == ("up",)
    assert [layer.kind for layer in result.layers.layers] == [
        *("conv 3x3", "conv 1x1", "conv 1x1", "depthwise 3x3", "conv 3x3"),
    ]
    for layer in result.layers.layers:
        assert set(layer.times) == {PACKED, FLOAT}
        assert min(layer.times.values()) > 0
        assert layer.ratio(FLOAT) == layer.times[FLOAT] / layer.times[PACKED]


def test_multiply_adds_are_those_of_arithmetic(result: Benchmark) -> None:
    assert result.layers is not None
    pixels = 2 * 4 * 4  # of the output, in a batch of two
    assert [layer.macs for layer in result.layers.layers] == [
        pixels * 32 * 16 * 9,
        pixels * 32 * 32,
        pixels * 32 * 32,
        pixels * 32 * 9,
        pixels * 32 * 32 * 9,
    ]
    assert [layer.input for layer in result.layers.layers][-1] == (2, 32, 8, 8)


def test_sums() -> None:
    layers = (
        LayerTime("a", "conv 3x3", (1, 8, 4, 4), 6000, {PACKED: 2.0, FLOAT: 6.0, "x": 1.0}, 6e9),
        LayerTime("b", "conv 1x1", (1, 8, 4, 4), 2000, {PACKED: 2.0, FLOAT: 2.0}, 2e9),
    )
    times = LayerTimes(layers, threads=2)
    every, first, second = times.sums
    assert (every.name, first.name, second.name) == ("all 2", "1 conv 3x3", "1 conv 1x1")
    assert (every.macs, every.times) == (8000, {PACKED: 4.0, FLOAT: 8.0})
    assert every.ratio(FLOAT) == 2
    assert first.times == layers[0].times
    assert every.rate == pytest.approx(2e9)
    assert every.peak == pytest.approx(4e9)
    assert times.share(every) == pytest.approx(0.25)
    assert LayerTimes((), threads=1).sums == ()


def test_quantiles() -> None:
    assert quantiles([5.0], 0.1, 0.5, 0.9) == [5.0, 5.0, 5.0]
    assert quantiles([3.0, 1.0, 2.0], 0, 0.5, 0.75, 1) == [1.0, 2.0, 2.5, 3.0]


def test_float_convolutions_have_the_layers_outputs(packed: nn.Module) -> None:
    calls, _ = module._calls(packed, torch.randn(2, *SIZE))
    for call in calls:
        other = module._float_run(call)()
        assert isinstance(other, Tensor)
        assert other.shape == (2, 32, 4, 4)
        assert other.is_contiguous(memory_format=torch.channels_last)


def test_without_an_engine_there_is_no_peak(
    packed: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "engine", lambda: None)
    result = benchmark(packed, None, input_size=SIZE, rounds=1, layers=True)
    assert result.machine.isa == ""
    assert result.layers is not None
    assert [result.layers.share(each) for each in result.layers.sums] == [None] * 4
    assert "no native engine" in str(result)


def test_turns_are_taken(
    net: nn.Module, packed: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    for name in ("a", "b"):
        monkeypatch.setitem(PEERS, name, note(name, seen))
    packed.register_forward_hook(lambda *_: seen.append(PACKED))
    benchmark(packed, net, input_size=SIZE, rounds=3, peers=("a", "b"))
    last = seen[-18:]  # three rounds, each contestant twice
    assert last[::2] == last[1::2]
    assert last[::2] == [PACKED, "a", "b", "a", "b", PACKED, "b", PACKED, "a"]


def test_threads_come_back(net: nn.Module, packed: nn.Module) -> None:
    before, during = torch.get_num_threads(), []

    def look(_: str) -> None:
        during.append(torch.get_num_threads())

    result = benchmark(packed, net, input_size=SIZE, threads=2, rounds=1, progress=look)
    assert result.machine.threads == 2
    assert during == [2, 2]
    assert torch.get_num_threads() == before
    with pytest.raises(ConversionError):
        benchmark(packed, net, input_size=(4, 8, 8), threads=2)
    assert torch.get_num_threads() == before


def test_models_stay_as_they_were(net: nn.Module, packed: nn.Module) -> None:
    net.train()
    models = (net, packed)
    states = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    modes = [[m.training for m in model.modules()] for model in models]
    strides = [[p.stride() for p in model.parameters()] for model in models]
    random = torch.random.get_rng_state()
    benchmark(packed, net, input_size=SIZE, rounds=1, layers=True)
    assert torch.equal(random, torch.random.get_rng_state())
    for model, state, mode, layout in zip(models, states, modes, strides, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert [m.training for m in model.modules()] == mode
        assert [p.stride() for p in model.parameters()] == layout
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_refusals(net: nn.Module, packed: nn.Module) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'onnxruntime'"):
        benchmark(packed, net, input_size=SIZE, peers=("onnxruntim",))
    with pytest.raises(UnknownNameError, match="known are torch, torch-compile, onnxruntime"):
        benchmark(packed, net, input_size=SIZE, peers=("zzz",))
    with pytest.raises(ConversionError, match="Net is not packed: call pack"):
        benchmark(net, net, input_size=SIZE)
    with pytest.raises(ConversionError, match="Net is not packed"):
        layer_times(net, torch.randn(1, *SIZE))
    with pytest.raises(ConversionError, match=r"does not run on an input of \(1, 4, 8, 8\)"):
        benchmark(packed, net, input_size=(4, 8, 8))
    with pytest.raises(ConversionError, match=r"does not run on an input of \(1, 4, 8, 8\)"):
        layer_times(packed, torch.randn(1, 4, 8, 8))
    with pytest.raises(ConversionError, match="Linear does not run"):
        benchmark(packed, nn.Linear(3, 3), input_size=SIZE)
    for size in ((3, 8), (3, 0, 8)):
        with pytest.raises(ConversionError, match="input_size must be"):
            benchmark(packed, net, input_size=size)
    for wrong in ({"batch": 0}, {"threads": 0}, {"rounds": -1}):
        with pytest.raises(ElConvertError, match=f"{next(iter(wrong))} must be at least 1"):
            benchmark(packed, net, input_size=SIZE, **wrong)


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-int8", "openvino", "openvino-binary"])
def test_what_is_not_installed_is_skipped(
    name: str, net: nn.Module, packed: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, PEERS[name].modules[0], None)
    peers = ("torch", name)
    result = benchmark(packed, net, input_size=SIZE, rounds=1, peers=peers, layers=True)
    assert [one.name for one in result.contestants] == [PACKED, "torch"]
    assert [skipped.name for skipped in result.skipped] == [name]
    assert f"pip install {' '.join(PEERS[name].modules)} (" in result.skipped[0].reason
    assert str(result).count(f"skipped {name}: pip install") == 1
    assert result.layers is not None
    assert [skipped.name for skipped in result.layers.skipped] == (
        [] if name.startswith("openvino") else [name]
    )


def test_a_peer_that_fails_is_skipped(
    net: nn.Module, packed: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(work: object) -> Run:
        raise RuntimeError("no such operator\nand more")

    peer = Peer("torch", "", ("torch",), refuse, refuse)
    monkeypatch.setitem(PEERS, "torch", peer)
    result = benchmark(packed, net, input_size=SIZE, rounds=1, layers=True)
    reasons = [(each.name, each.reason) for each in result.skipped]
    assert reasons == [("torch", "RuntimeError: no such operator")]
    assert result.layers is not None
    assert result.layers.skipped == result.skipped
    assert set(result.layers.sums[0].times) == {PACKED, FLOAT}


def test_without_a_float_model(packed: nn.Module) -> None:
    result = benchmark(packed, None, input_size=SIZE, rounds=1)
    assert [one.name for one in result.contestants] == [PACKED]
    assert [(each.name, each.reason) for each in result.skipped] == [
        ("torch", "it needs the float model")
    ]
    assert result.layers is None


def test_progress_says_what_begins(net: nn.Module, packed: nn.Module) -> None:
    said: list[str] = []
    benchmark(packed, net, input_size=SIZE, rounds=1, layers=True, progress=said.append)
    assert said == ["preparing torch", "timing packed, torch", "timing 5 layers"]


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-int8", "openvino", "openvino-binary"])
def test_other_runtimes(name: str, net: nn.Module, packed: nn.Module) -> None:
    for needed in PEERS[name].modules:
        pytest.importorskip(needed)
    result = benchmark(packed, net, input_size=SIZE, batch=2, rounds=1, peers=(name,), layers=True)
    assert result.skipped == ()
    assert [one.name for one in result.contestants] == [PACKED, name]
    assert result.layers is not None
    assert result.layers.skipped == ()
    expected = {PACKED, FLOAT} | ({name} if PEERS[name].convolve else set())
    assert all(set(layer.times) == expected for layer in result.layers.layers)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "openvino-binary"])
def test_other_runtimes_compute_the_model(
    name: str, net: nn.Module, packed: nn.Module, tmp_path: Path
) -> None:
    for needed in PEERS[name].modules:
        pytest.importorskip(needed)
    input = torch.randn(2, *SIZE).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = packed(input) if name == "openvino-binary" else net(input)
        output: Any = PEERS[name].prepare(Workload(net, input, 1, tmp_path, packed))()
    scale = {"atol": 1e-4 * float(expected.abs().max())}
    torch.testing.assert_close(torch.from_numpy(output[0].copy()), expected, rtol=1e-5, **scale)


@pytest.mark.slow
def test_compiled(net: nn.Module, packed: nn.Module) -> None:
    result = benchmark(packed, net, input_size=SIZE, rounds=1, peers=("torch-compile",))
    # Where there is no compiler, the reason is given.
    assert len(result.contestants) + len(result.skipped) == 2


def test_json(result: Benchmark) -> None:
    data = json.loads(json.dumps(to_json(result)))
    assert [one["name"] for one in data["contestants"]] == [PACKED, "torch"]
    assert data["input"] == [2, *SIZE]
    assert data["machine"]["threads"] == 1
    assert data["layers"]["layers"][0]["macs"] == 2 * 4 * 4 * 32 * 16 * 9
    assert set(data["layers"]["layers"][0]["ratios"]) == {FLOAT}
    assert [each["name"] for each in data["layers"]["sums"]] == [
        *("all 5", "2 conv 3x3", "2 conv 1x1", "1 depthwise 3x3"),
    ]


def test_rendering(result: Benchmark) -> None:
    stream = io.StringIO()
    Console(file=stream, width=120).print(render_benchmark(result))
    for text in (stream.getvalue(), str(result)):
        for name in ("Net", "packed, el_convert", "torch", "depthwise", "all 5", "2x3x8x8"):
            assert name in text
        assert "medians of 2 rounds" in text
        assert "not timed by themselves: up" in text
    Console(file=io.StringIO(), width=40).print(result)  # narrow terminals fold


def test_names_are_no_markup() -> None:
    layer = LayerTime("[red]a", "conv 1x1", (1, 8, 4, 4), 6, {PACKED: 2.0, FLOAT: 6.0})
    machine = module._machine()
    times = LayerTimes((layer,), threads=1)
    assert "[red]a" in str(Benchmark("[b]", (1,), 1, machine, (), (), times))


def test_a_zoo_model() -> None:
    import torchvision

    model = torchvision.models.resnet18().eval()
    packed = pack_untrained(model)
    assert sum(isinstance(layer, PackedConv) for layer in packed.modules()) == 19
    result = benchmark(packed, model, input_size=(3, 32, 32), rounds=1, layers=True)
    assert result.layers is not None
    every, *kinds = result.layers.sums
    assert [kind.name for kind in kinds] == ["16 conv 3x3", "3 conv 1x1"]
    assert every.macs == sum(kind.macs for kind in kinds)


def test_example(tmp_path: Path) -> None:
    strict = ["-W", "error", *(f"-Wignore:{start}" for start in NO_ENGINE)]
    options = ["--rounds", "1", "--layers", "--json", "times.json"]
    done = subprocess.run(
        [sys.executable, *strict, str(EXAMPLE), "test_resnet", *options],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "timm/test_resnet, input 1x3x160x160, 1 thread" in done.stdout
    assert done.stderr.splitlines()[-1] == "test_resnet: timing 14 layers ..."
    (data,) = json.loads((tmp_path / "times.json").read_text())
    assert [one["name"] for one in data["contestants"]] == [PACKED, "torch"]
