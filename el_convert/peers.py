"""What packed models are timed against: other ways to run the float model on this CPU.

Packages other than torch are optional: each peer says what it needs, and imports it late.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from el_convert.errors import UnknownNameError, first_line
from el_convert.kernels import ConvGeometry
from el_convert.openvino_check import compiled
from el_convert.openvino_export import write_openvino

Run = Callable[[], object]
_OPSET, _IR_VERSION = 17, 8  # what every ONNX Runtime since 1.12 reads
_BLOCKED = "com.microsoft.nchwc"
_MICROSOFT = "com.microsoft"
_WHOLE_BLOCKS = 16  # the widest block of channels in ONNX Runtime's own layout
_CALIBRATION_BATCHES = 4


@dataclass(frozen=True)
class Workload:
    """What a peer runs.

    Attributes:
        model: float, in eval mode, channels_last; the peer's to keep.
        input: (N, C, H, W) float32, channels_last.
        threads: to use.
        folder: for files that live as long as the peer; peers share it.
        packed: the network it is compared with, in eval mode; only to be read.
    """

    model: nn.Module
    input: Tensor
    threads: int
    folder: Path
    packed: nn.Module


@dataclass(frozen=True)
class ConvWorkload:
    """A single convolution for a peer to run.

    Attributes:
        geometry: of the convolution.
        size: (N, H, W) of its input.
        threads: to use.
        folder: for files.
    """

    geometry: ConvGeometry
    size: tuple[int, int, int]
    threads: int
    folder: Path


@dataclass(frozen=True)
class Peer:
    """One way to run a float model.

    Attributes:
        name: to ask for it by.
        label: what it is, in words.
        modules: that must be importable.
        prepare: makes the function that runs the model once. May raise anything.
        convolve: the same for a single convolution, or None.
    """

    name: str
    label: str
    modules: tuple[str, ...]
    prepare: Callable[[Workload], Run]
    convolve: Callable[[ConvWorkload], Run] | None = None

    def missing(self) -> str:
        """Why it cannot be used in this installation; "" where it can."""
        for module in self.modules:
            try:
                importlib.import_module(module)
            except (ImportError, OSError) as error:
                return f"pip install {' '.join(self.modules)} ({first_line(error)})"
        return ""

    def described(self) -> str:
        """The label with the version of what is installed."""
        version = getattr(importlib.import_module(self.modules[0]), "__version__", "")
        return self.label.replace("VERSION", version.partition("+")[0].partition("-")[0])


def find_peers(names: Iterable[str]) -> tuple[Peer, ...]:
    """Peers by name, each once.

    Raises:
        UnknownNameError: no such peer.

    Example:
        >>> [peer.name for peer in find_peers(["torch", "onnxruntime", "torch"])]
        ['torch', 'onnxruntime']
    """
    wanted = tuple(dict.fromkeys(names))
    for name in wanted:
        if name not in PEERS:
            raise UnknownNameError("peer", name, PEERS, f"known are {', '.join(PEERS)}")
    return tuple(PEERS[name] for name in wanted)


def _torch(work: Workload) -> Run:
    return lambda: work.model(work.input)


def _torch_compile(work: Workload) -> Run:
    # fullgraph: parts that fall back to eager unseen would be timed under the compiler's name.
    # freezing: folds norms and lays out weights beforehand, as the other peers do.
    compiled: Any = torch.compile(
        work.model, fullgraph=True, dynamic=False, options={"freezing": True}
    )
    return lambda: compiled(work.input)


def _onnx_file(work: Workload) -> Path:
    """The exported model, made by whichever peer asks first."""
    path = work.folder / "model.onnx"
    if not path.exists():
        with warnings.catch_warnings():
            # The exporter without a further package; torch announces its end.
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            torch.onnx.export(work.model, (work.input.contiguous(),), path, dynamo=False)
    return path


def _onnxruntime(work: Workload) -> Run:
    return _session_run(_onnx_file(work), work.input.contiguous(), work.threads)


def _onnxruntime_int8(work: Workload) -> Run:
    quantized = work.folder / "int8.onnx"
    _quantize(_onnx_file(work), quantized, work.input.contiguous())
    return _session_run(quantized, work.input.contiguous(), work.threads)


class _RandomBatches:
    """Calibration data as ONNX Runtime reads it."""

    def __init__(self, name: str, like: Tensor) -> None:
        self._name, self._like = name, like
        self._left = _CALIBRATION_BATCHES

    def get_next(self) -> dict[str, Any] | None:
        if not self._left:
            return None
        self._left -= 1
        generator = torch.Generator().manual_seed(self._left)
        return {self._name: torch.randn(self._like.shape, generator=generator).numpy()}


def _quantize(source: Path, target: Path, like: Tensor) -> None:
    quantization: Any = importlib.import_module("onnxruntime.quantization")
    before: Any = importlib.import_module("onnxruntime.quantization.shape_inference")
    prepared = target.with_suffix(".prepared.onnx")
    name = _session(source, 1).get_inputs()[0].name
    with _root_logger_alone():
        # Without this the convolutions stay in float wherever the exporter shares a bias.
        before.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(target),
            _RandomBatches(name, like),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )


@contextmanager
def _root_logger_alone() -> Iterator[None]:
    """Keep libraries that log without asking from giving the root logger a handler for good."""
    handler, root = logging.NullHandler(), logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


def _session(model: Path | bytes, threads: int, options: Any = None) -> Any:
    runtime: Any = importlib.import_module("onnxruntime")
    options = options or runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    # Its threads would go on spinning while the next contestant is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    source = str(model) if isinstance(model, Path) else model
    return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _session_run(model: Path | bytes, input: Tensor, threads: int, options: Any = None) -> Run:
    session = _session(model, threads, options)
    feed = {session.get_inputs()[0].name: input.numpy()}
    return lambda: session.run(None, feed)


def _openvino(work: Workload) -> Run:
    return _openvino_run(_onnx_file(work), work)


def _openvino_binary(work: Workload) -> Run:
    file, input = work.folder / "binary.xml", work.input.contiguous()
    write_openvino(work.packed, file, input, batch=len(input))
    return _openvino_run(file, work)


def _openvino_run(file: Path, work: Workload) -> Run:
    request = compiled(file, work.threads).create_infer_request()
    feed = {0: work.input.contiguous().numpy()}
    return lambda: request.infer(feed)


def _conv_attributes(geometry: ConvGeometry) -> dict[str, Any]:
    top, bottom, left, right = geometry.padding
    return {
        "kernel_shape": geometry.kernel,
        "strides": geometry.stride,
        "dilations": geometry.dilation,
        "group": geometry.groups,
        "pads": [top, left, bottom, right],
    }


def _weight_shape(geometry: ConvGeometry) -> tuple[int, ...]:
    return (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel)


def _single_node(node: Any, constants: dict[str, Any], kind: int, shape: list[int]) -> bytes:
    """A serialized model of one node from "x" to "y", both of one kind."""
    onnx: Any = importlib.import_module("onnx")
    helper = onnx.helper
    graph = helper.make_graph(
        [node],
        "convolution",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [
        helper.make_opsetid(domain, version)
        for domain, version in (("", _OPSET), (_MICROSOFT, 1), (_BLOCKED, 1))
    ]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
    serialized: bytes = model.SerializeToString()
    return serialized


def _onnx_conv(work: ConvWorkload) -> Run:
    """A float convolution, without the changes of layout at its ends: a network has few of them."""
    onnx: Any = importlib.import_module("onnx")
    batch, height, width = work.size
    shape = [batch, work.geometry.in_channels, height, width]
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], **_conv_attributes(work.geometry))
    constants = {"w": torch.randn(_weight_shape(work.geometry)).numpy()}
    plain = _single_node(node, constants, onnx.TensorProto.FLOAT, shape)
    input = torch.randn(shape)
    blocked = _blocked_only(plain, work)
    if blocked is None:
        return _session_run(plain, input, work.threads)
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return _session_run(blocked, input, work.threads, options)


def _blocked_only(plain: bytes, work: ConvWorkload) -> bytes | None:
    """The convolution alone in the layout ONNX Runtime chooses; None where that is the usual one.

    Only for whole blocks of channels: the shapes are then the same in both layouts.
    """
    geometry = work.geometry
    if geometry.in_channels % _WHOLE_BLOCKS or geometry.out_channels % _WHOLE_BLOCKS:
        return None
    onnx: Any = importlib.import_module("onnx")
    options = importlib.import_module("onnxruntime").SessionOptions()
    path = work.folder / "optimized.onnx"
    options.optimized_model_filepath = str(path)
    _session(plain, 1, options)
    model = onnx.load(str(path))
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    if node.domain != _BLOCKED:
        return None
    node.input[0], node.output[0] = "x", "y"
    del model.graph.node[:]
    model.graph.node.append(node)
    serialized: bytes = model.SerializeToString()
    return serialized


def _onnx_conv_int8(work: ConvWorkload) -> Run:
    """From uint8 to uint8, channels last: what a network that is 8-bit throughout does."""
    onnx: Any = importlib.import_module("onnx")
    batch, height, width = work.size
    channels = work.geometry.out_channels
    names = ["x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero"]
    weight = torch.randint(-127, 128, _weight_shape(work.geometry), dtype=torch.int8)
    zero = torch.tensor(128, dtype=torch.uint8)
    values = [
        *(torch.tensor(0.02), zero),
        *(weight, torch.full((channels,), 0.01), torch.zeros(channels, dtype=torch.int8)),
        *(torch.tensor(0.05), zero),
    ]
    node = onnx.helper.make_node(
        "QLinearConv",
        ["x", *names],
        ["y"],
        domain=_MICROSOFT,
        channels_last=1,
        **_conv_attributes(work.geometry),
    )
    shape = [batch, height, width, work.geometry.in_channels]
    constants = {name: value.numpy() for name, value in zip(names, values, strict=True)}
    model = _single_node(node, constants, onnx.TensorProto.UINT8, shape)
    input = torch.randint(0, 256, shape, dtype=torch.uint8)
    return _session_run(model, input, work.threads)


_ONNX, _OPENVINO = ("onnxruntime", "onnx"), ("openvino", "onnx")
_OPENVINO_BINARY = (*_OPENVINO, "onnxscript")
PEERS = {
    peer.name: peer
    for peer in (
        Peer("torch", "torch VERSION, eager, channels_last", ("torch",), _torch),
        Peer("torch-compile", "torch VERSION, compiled, frozen", ("torch",), _torch_compile),
        Peer("onnxruntime", "ONNX Runtime VERSION, float32", _ONNX, _onnxruntime, _onnx_conv),
        Peer(
            "onnxruntime-int8",
            "ONNX Runtime VERSION, int8",
            _ONNX,
            _onnxruntime_int8,
            _onnx_conv_int8,
        ),
        Peer("openvino", "OpenVINO VERSION, float32", _OPENVINO, _openvino),
        Peer(
            "openvino-binary",
            "OpenVINO VERSION, the packed model",
            _OPENVINO_BINARY,
            _openvino_binary,
        ),
    )
}
"""Every peer, by name."""
