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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
from el_convert.timings import (
    FLOAT,
    PACKED,
    Benchmark,
    Contestant,
    LayerTime,
    LayerTimes,
    Machine,
    Skipped,
    quantiles,
)
from el_convert.tracing import undisturbed
from el_convert.zoo import source_of

_WARM_UP = 3
Progress = Callable[[str], None]


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
            work = partial(Workload, folder=Path(folder), packed=packed_model)
            ready, skipped = _prepared(wanted, float_model, input, work, say)
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
        tuple(Contestant.timed(n, labels[n], times[n], times[PACKED]) for n in runs),
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
    wanted: Sequence[Peer],
    model: nn.Module | None,
    input: Tensor,
    workload: Callable[..., Workload],
    say: Progress,
) -> tuple[dict[str, Run], tuple[Skipped, ...]]:
    """What runs each peer, after it has run once; and those that cannot."""
    if model is None:
        return {}, tuple(Skipped(peer.name, "it needs the float model") for peer in wanted)
    model = copy_model(model).eval().to(memory_format=torch.channels_last)
    _refuse_unfit(model, input)
    work = workload(model, input, torch.get_num_threads())
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
        layers = []
        for call in calls:
            before = _peak()
            runs: dict[str, Run] = {PACKED: call.run, FLOAT: _float_run(call)}
            work = ConvWorkload(call.geometry, _size(call), torch.get_num_threads(), Path(folder))
            runs |= _single_convolutions(able, work, reasons)
            times = _race(runs, rounds)
            layers.append(_layer_time(call, times, max(before, _peak()) or None))
    skipped = tuple(Skipped(name, reason) for name, reason in reasons.items() if reason)
    return LayerTimes(tuple(layers), torch.get_num_threads(), omitted, skipped)


def _peak() -> float:
    """Of the engine; 0 without one."""
    library = engine()
    return 0.0 if library is None else library.peak()


def _size(call: _Call) -> tuple[int, int, int]:
    batch, _, height, width = call.input.shape
    return batch, height, width


def _calls(model: nn.Module, input: Tensor) -> tuple[list[_Call], tuple[str, ...]]:
    """Every call of a packed 2d convolution in one run, and the names of other packed layers."""
    calls: list[_Call] = []
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedConv)}
    names = {id(layer): name or "(the model)" for name, layer in packed.items()}

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given: Tensor = args[0] if args else kwargs["input"]
        if not isinstance(layer, PackedConv) or given.dim() != 4:
            return
        geometry = layer.geometry((given.shape[2], given.shape[3]))
        if geometry is not None:
            run = partial(layer, *args, **kwargs)
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


def _layer_time(call: _Call, times: Mapping[str, Sequence[float]], peak: float | None) -> LayerTime:
    batch, height, width = _size(call)
    macs = batch * call.geometry.multiply_adds((height, width))
    medians = {name: 1e6 * quantiles(values, 0.5)[0] for name, values in times.items()}
    kind = layer_kind(call.layer)
    return LayerTime(call.name, kind, tuple(call.input.shape), macs, medians, peak)


def pack_untrained(model: nn.Module, recipe: Recipe | str = "elastic-link") -> nn.Module:
    """A packed model to time where none was trained: of random norms and gates, as if it were.

    Args:
        model: float; left as it was.
        recipe: for `binarize`.

    Returns:
        The packed model. What it computes means nothing.

    Raises:
        ConversionError, UnknownNameError: as `binarize` does.
    """
    binary = binarize(model, recipe).eval()
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in binary.modules():
            if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
                _vary(norm, chance)
        for name, gamma in binary.named_parameters():
            if name.endswith("link.gamma"):
                gamma.mul_(torch.rand(gamma.shape, generator=chance) + 0.5)
    return pack(binary, inplace=True)


def _vary(norm: _BatchNorm, chance: torch.Generator) -> None:
    """Statistics as of some training."""
    assert norm.running_mean is not None and norm.running_var is not None  # noqa: S101
    norm.running_mean.normal_(0, 0.1, generator=chance)
    norm.running_var.uniform_(0.5, 1.5, generator=chance)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked += 1
