"""Timing packed models against other ways to run the float model, whole and layer by layer.

The contestants take turns, so that whatever else the machine does meets all of them alike.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from el_convert._version import __version__
from el_convert.convert import binarize, copy_model
from el_convert.errors import ConversionError, first_line
from el_convert.kernels import ConvGeometry, engine
from el_convert.packed import PackedConv
from el_convert.packing import pack
from el_convert.peers import ConvWorkload, Peer, Run, Workload, find_peers
from el_convert.recipes import Recipe
from el_convert.report import layer_kind
from el_convert.tracing import undisturbed
from el_convert.zoo import source_of

if TYPE_CHECKING:
    from rich.console import RenderableType

PACKED = "packed"
"""Name of the packed model among the contestants."""
FLOAT = "float"
"""Name of torch's float convolution among the times of a layer."""
_WARM_UP = 3
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Machine:
    """What the times were taken on.

    Attributes:
        cpu: its name.
        cores: that torch and the system count.
        isa: instruction set of the native engine; "" without an engine.
        threads: in use.
        torch: version.
    """

    cpu: str
    cores: int
    isa: str
    threads: int
    torch: str


@dataclass(frozen=True)
class Contestant:
    """The times of one contestant.

    Attributes:
        name: `PACKED`, or the peer's.
        label: what it is, in words.
        median, low, high: milliseconds: the median, the 10th and the 90th percentile.
        ratio, ratio_low, ratio_high: its time / the packed model's, round by round: the median
            and the quartiles. Above 1 the packed model is faster.
    """

    name: str
    label: str
    median: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True)
class Skipped:
    """A peer that was asked for and not timed, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class LayerTime:
    """One call of a packed convolution, or the sum of several.

    Attributes:
        name: qualified name of the layer, or what was summed.
        kind: such as "conv 3x3".
        input: (N, C, H, W); () for sums.
        macs: multiply-adds of the whole batch.
        times: median microseconds by contestant: `PACKED`, with all that is fused into the layer;
            `FLOAT` and peers, of the convolution alone.
    """

    name: str
    kind: str
    input: tuple[int, ...]
    macs: int
    times: Mapping[str, float]

    @property
    def rate(self) -> float:
        """1-bit multiply-adds per second."""
        return self.macs / self.times[PACKED] * 1e6

    def ratio(self, name: str) -> float:
        """Time of a contestant / time of the packed layer."""
        return self.times[name] / self.times[PACKED]


@dataclass(frozen=True)
class LayerTimes:
    """Every packed convolution of a model.

    Attributes:
        layers: in the order of their calls.
        threads: they ran on.
        peak: multiply-adds per second of the engine's innermost loop, on one thread; None without
            an engine.
        omitted: names of packed layers that are no plain 2d convolutions, or not called.
        skipped: peers asked for and not timed.
    """

    layers: tuple[LayerTime, ...]
    threads: int
    peak: float | None
    omitted: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    @property
    def sums(self) -> tuple[LayerTime, ...]:
        """Over all layers, then over those of each kind."""
        kinds = dict.fromkeys(layer.kind for layer in self.layers)
        groups = {kind: [layer for layer in self.layers if layer.kind == kind] for kind in kinds}
        each = [_sum(f"{len(group)} {kind}", kind, group) for kind, group in groups.items()]
        return (_sum(f"all {len(self.layers)}", "", self.layers), *each) if each else ()

    def share(self, layer: LayerTime) -> float | None:
        """Of the engine's peak; None without an engine."""
        return None if self.peak is None else layer.rate / (self.peak * self.threads)


def _sum(name: str, kind: str, layers: Sequence[LayerTime]) -> LayerTime:
    timed = [n for n in layers[0].times if all(n in layer.times for layer in layers)]
    times = {n: sum(layer.times[n] for layer in layers) for n in timed}
    return LayerTime(name, kind, (), sum(layer.macs for layer in layers), times)


@dataclass(frozen=True)
class Benchmark:
    """What `benchmark` measured. Prints as tables.

    Attributes:
        model: where it comes from, or its class.
        input: (N, C, H, W).
        rounds: timed.
        machine: it ran on.
        contestants: the packed model first.
        skipped: peers asked for and not timed.
        layers: layer by layer, if asked for.
    """

    model: str
    input: tuple[int, ...]
    rounds: int
    machine: Machine
    contestants: tuple[Contestant, ...]
    skipped: tuple[Skipped, ...]
    layers: LayerTimes | None = None

    def __rich__(self) -> RenderableType:
        return render_benchmark(self)

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console

        console = Console(width=200, color_system=None, highlight=False)
        with console.capture() as capture:
            console.print(render_benchmark(self, box.ASCII2))
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def benchmark(
    packed_model: nn.Module,
    float_model: nn.Module | None,
    *,
    input_size: Sequence[int] = (3, 224, 224),
    batch: int = 1,
    threads: int = 1,
    peers: Sequence[str] = ("torch",),
    rounds: int = 30,
    layers: bool = False,
    progress: Progress | None = None,
) -> Benchmark:
    """Time a packed model and its peers in turns, on random input.

    Args:
        packed_model: made by `pack` or loaded; left as it was.
        float_model: what peers run, left as it was; without it there are none.
        input_size: (C, H, W) of one sample.
        batch: samples per run.
        threads: for every contestant; torch's own number comes back afterwards.
        peers: names from `PEERS`. Those that cannot run are skipped, with the reason.
        rounds: in each, every contestant runs in turn: once untimed, then once timed.
        layers: whether to time each packed convolution too.
        progress: called with what begins.

    Returns:
        The times; `print` them.

    Raises:
        ConversionError: the model is not packed, a number is below 1, or a model does not run on
            that input.
        UnknownNameError: an unknown peer.

    Example:
        >>> import torchvision
        >>> model = torchvision.models.resnet18()
        >>> result = benchmark(pack_untrained(model), model, input_size=(3, 32, 32), rounds=1)
        >>> [contestant.name for contestant in result.contestants]
        ['packed', 'torch']
    """
    say = progress or _nothing
    wanted = find_peers(peers)
    _refuse_unpacked(packed_model)
    _refuse_small(batch=batch, threads=threads, rounds=rounds)
    input = _random_input((batch, *input_size))
    with _threads(threads), undisturbed(packed_model):
        _refuse_unfit(packed_model, input)
        runs: dict[str, Run] = {PACKED: lambda: packed_model(input)}
        with tempfile.TemporaryDirectory() as folder:
            ready, skipped = _prepared(wanted, float_model, input, Path(folder), say)
            runs |= ready
            say(f"timing {', '.join(runs)}")
            times = _race(runs, rounds)
        by_layer = None
        if layers:
            by_layer = layer_times(packed_model, input, rounds, peers=peers, progress=progress)
        machine = _machine()
    labels = {PACKED: f"packed, el_convert {__version__}"}
    labels |= {peer.name: peer.described() for peer in wanted if peer.name in runs}
    return Benchmark(
        str(source_of(packed_model) or type(packed_model).__name__),
        tuple(input.shape),
        rounds,
        machine,
        tuple(_contestant(n, labels[n], times[n], times[PACKED]) for n in runs),
        skipped,
        by_layer,
    )


def _nothing(_: str) -> None:
    """Where nobody listens."""


def _refuse_unpacked(model: nn.Module) -> None:
    if not any(isinstance(module, PackedConv) for module in model.modules()):
        raise ConversionError(
            f"{type(model).__name__} is not packed: call pack(binarize(model)) first"
        )


def _refuse_small(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ConversionError(f"{name} must be at least 1, not {number}")


def _refuse_unfit(model: nn.Module, input: Tensor) -> None:
    try:
        model(input)
    except Exception as error:  # whatever a forward raises: said again with the size asked for
        raise ConversionError(
            f"{type(model).__name__} does not run on an input of {tuple(input.shape)}: "
            f"{first_line(error)}; pass input_size=(C, H, W)"
        ) from error


def _random_input(size: tuple[int, ...]) -> Tensor:
    if len(size) != 4 or min(size) < 1:
        raise ConversionError(f"input_size must be (C, H, W), each at least 1, not {size[1:]}")
    input = torch.randn(size, generator=torch.Generator().manual_seed(0))
    return input.contiguous(memory_format=torch.channels_last)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prepared(
    wanted: Sequence[Peer], model: nn.Module | None, input: Tensor, folder: Path, say: Progress
) -> tuple[dict[str, Run], tuple[Skipped, ...]]:
    """What runs each peer, after it has run once; and those that cannot."""
    if model is None:
        return {}, tuple(Skipped(peer.name, "it needs the float model") for peer in wanted)
    model = copy_model(model).eval().to(memory_format=torch.channels_last)
    _refuse_unfit(model, input)
    work = Workload(model, input, torch.get_num_threads(), folder)
    runs: dict[str, Run] = {}
    skipped: list[Skipped] = []
    for peer in wanted:
        reason = peer.missing()
        if not reason:
            say(f"preparing {peer.name}")
            try:
                run = peer.prepare(work)
                run()
                runs[peer.name] = run
            except Exception as error:  # a peer may refuse a model for any reason: it is named
                reason = first_line(error)
        if reason:
            skipped.append(Skipped(peer.name, reason))
    return runs, tuple(skipped)


def _race(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, by contestant; who begins a round changes."""
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode():
        for turn in range(-_WARM_UP, rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                runs[name]()  # untimed: caches and threads are then its own
                start = time.perf_counter()
                runs[name]()
                elapsed = time.perf_counter() - start
                if turn >= 0:
                    times[name].append(elapsed)
    return times


def _quantiles(values: Sequence[float], *points: float) -> list[float]:
    wanted = torch.tensor(points, dtype=torch.float64)
    quantiles: list[float] = torch.tensor(values, dtype=torch.float64).quantile(wanted).tolist()
    return quantiles


def _contestant(
    name: str, label: str, times: Sequence[float], packed: Sequence[float]
) -> Contestant:
    median, low, high = (1e3 * t for t in _quantiles(times, 0.5, 0.1, 0.9))
    ratios = [own / other for own, other in zip(times, packed, strict=True)]
    return Contestant(name, label, median, low, high, *_quantiles(ratios, 0.5, 0.25, 0.75))


def _machine() -> Machine:
    library = engine()
    isa = "" if library is None else library.isa or library.isas[0]
    return Machine(
        _cpu_name(), os.cpu_count() or 1, isa, torch.get_num_threads(), str(torch.__version__)
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@dataclass(frozen=True)
class _Call:
    """One call of a packed layer, as the model made it."""

    name: str
    layer: PackedConv
    geometry: ConvGeometry
    input: Tensor
    run: Run


def layer_times(
    packed_model: nn.Module,
    input: Tensor,
    rounds: int = 30,
    *,
    peers: Sequence[str] = (),
    progress: Progress | None = None,
) -> LayerTimes:
    """Time every packed 2d convolution, on what it gets in a real run, and its float counterpart.

    The packed layer is timed with all that is fused into it: norm, link, activation, residual sum.
    The others do the convolution alone, from weights laid out beforehand; 8-bit ones read and
    write 8-bit maps.

    Args:
        packed_model: made by `pack` or loaded; left as it was.
        input: (N, C, H, W), for the model.
        rounds: as for `benchmark`.
        peers: names from `PEERS`; of those, what can run single convolutions takes part.
        progress: called with what begins.

    Returns:
        The times, on as many threads as torch is set to.

    Raises:
        ConversionError: the model is not packed, or does not run on that input.
        UnknownNameError: an unknown peer.
    """
    say, able = progress or _nothing, [peer for peer in find_peers(peers) if peer.convolve]
    reasons = {peer.name: peer.missing() for peer in able}
    _refuse_unpacked(packed_model)
    _refuse_small(rounds=rounds)
    with undisturbed(packed_model), tempfile.TemporaryDirectory() as folder:
        calls, omitted = _calls(packed_model, input)
        say(f"timing {len(calls)} layers")
        peaks, layers = [_peak()], []
        for call in calls:
            runs: dict[str, Run] = {PACKED: call.run, FLOAT: _float_run(call)}
            work = ConvWorkload(call.geometry, _size(call), torch.get_num_threads(), Path(folder))
            runs |= _single_convolutions(able, work, reasons)
            layers.append(_layer_time(call, _race(runs, rounds)))
        peaks.append(_peak())
    peak = max((peak for peak in peaks if peak is not None), default=None)
    skipped = tuple(Skipped(name, reason) for name, reason in reasons.items() if reason)
    return LayerTimes(tuple(layers), torch.get_num_threads(), peak, omitted, skipped)


def _peak() -> float | None:
    library = engine()
    return None if library is None else library.peak()


def _size(call: _Call) -> tuple[int, int, int]:
    batch, _, height, width = call.input.shape
    return batch, height, width


def _calls(model: nn.Module, input: Tensor) -> tuple[list[_Call], tuple[str, ...]]:
    """Every call of a packed 2d convolution in one run, and the names of other packed layers."""
    calls: list[_Call] = []
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedConv)}
    names = {id(layer): name or "(the model)" for name, layer in packed.items()}

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs["input"]
        two = isinstance(layer, PackedConv) and given.dim() == 4
        geometry = layer.geometry(tuple(given.shape[2:])) if two else None  # type: ignore[operator]
        if isinstance(layer, PackedConv) and geometry is not None:
            run = lambda: layer(*args, **kwargs)  # noqa: E731
            calls.append(_Call(names[id(layer)], layer, geometry, given, run))

    handles = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in packed.values()]
    try:
        _refuse_unfit(model, input)
    finally:
        for handle in handles:
            handle.remove()
    called = {call.name for call in calls}
    return calls, tuple(name for name in names.values() if name not in called)


def _float_run(call: _Call) -> Run:
    """torch's convolution of the same geometry, in the layout that suits it best."""
    geometry = call.geometry
    top, bottom, left, right = geometry.padding
    input, padding = call.input, (top, left)
    if (top, left) != (bottom, right):
        input, padding = F.pad(input, [left, right, top, bottom]), (0, 0)
    input = input.contiguous(memory_format=torch.channels_last)
    channels = (geometry.out_channels, geometry.in_channels // geometry.groups)
    weight = torch.randn(*channels, *geometry.kernel)
    weight = weight.contiguous(memory_format=torch.channels_last)
    options = (geometry.stride, padding, geometry.dilation, geometry.groups)
    return lambda: F.conv2d(input, weight, None, *options)


def _single_convolutions(
    able: Sequence[Peer], work: ConvWorkload, reasons: dict[str, str]
) -> dict[str, Run]:
    """What runs the convolution on each peer; one that cannot is given its reason, for good."""
    runs: dict[str, Run] = {}
    for peer in able:
        if peer.convolve is None or reasons[peer.name]:
            continue
        try:
            runs[peer.name] = peer.convolve(work)
            runs[peer.name]()
        except Exception as error:  # a peer may refuse a shape for any reason: it is named
            reasons[peer.name] = first_line(error)
            runs.pop(peer.name, None)
    return runs


def _layer_time(call: _Call, times: Mapping[str, Sequence[float]]) -> LayerTime:
    batch, height, width = _size(call)
    macs = batch * call.geometry.multiply_adds((height, width))
    medians = {name: 1e6 * _quantiles(values, 0.5)[0] for name, values in times.items()}
    return LayerTime(call.name, layer_kind(call.layer), tuple(call.input.shape), macs, medians)


