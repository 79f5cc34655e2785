"""What a model consists of, layer by layer: bits, operations, bytes, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from el_convert.activations import ActivationChange
from el_convert.calls import FunctionalConv
from el_convert.convert import conversion_of
from el_convert.errors import ConversionError
from el_convert.nn import BinaryLayer, OneBitLayer
from el_convert.planning import Conversion, Decision
from el_convert.tracing import is_convolution, undisturbed
from el_convert.zoo import input_spec, source_of

ONE_BIT_PER_OP = 64
"""1-bit multiply-adds counted as one operation (Bi-Real Net, ReActNet)."""


@dataclass(frozen=True)
class LayerSummary:
    """One convolution or linear layer.

    Attributes:
        path: qualified name.
        kind: such as "conv 3x3", "depthwise 3x3", "linear".
        action: "binarize", "keep", or "float" where no conversion touched it.
        pattern: the row of the pattern table that decided; "" without one.
        reason: in words.
        link: "", or how the gate matches: "identity", "squeeze", "expand", with ", pooled" etc.
        output: (C, ...) of its last call; None without an input size.
        float_macs: real-valued multiply-adds of one sample; None without an input size.
        binary_macs: 1-bit multiply-adds, likewise.
        link_macs: multiply-adds of the gate, likewise; by convention not in `ops`.
        stored_bytes: parameters and buffers as they are.
        packed_bytes: with binarized weights at 1 bit each and their scales beside them.
    """

    path: str
    kind: str
    action: str
    pattern: str
    reason: str
    link: str
    output: tuple[int, ...] | None
    float_macs: int | None
    binary_macs: int | None
    link_macs: int | None
    stored_bytes: int
    packed_bytes: int

    @property
    def ops(self) -> float | None:
        """float MACs + 1-bit MACs / 64."""
        if self.float_macs is None or self.binary_macs is None:
            return None
        return self.float_macs + self.binary_macs / ONE_BIT_PER_OP


@dataclass(frozen=True)
class Summary:
    """A model's layers and totals. Prints as a table; shows as HTML in a notebook.

    Operations are those of convolutions and linear layers, for one sample, multiply-adds
    counted once: OPs = float MACs + 1-bit MACs / 64, the convention of Bi-Real Net and ReActNet.
    Norms, activations, products between activations, and gates are not in it; the gates'
    multiply-adds are given beside it.

    Attributes:
        model: class name.
        recipe: its name; "" for a float model.
        input_size: (C, H, W), or None when unknown: then operations are None.
        layers: in the model's order.
        other_bytes: of everything that is neither convolution nor linear.
        activations: what became of the activations that feed binarized convolutions.
        functional: convolutions that are calls in a forward: in float, and not in the counts.
    """

    model: str
    recipe: str
    input_size: tuple[int, ...] | None
    layers: tuple[LayerSummary, ...]
    other_bytes: int
    activations: tuple[ActivationChange, ...] = ()
    functional: tuple[FunctionalConv, ...] = ()

    def _total(self, name: str) -> int | None:
        values = [getattr(layer, name) for layer in self.layers]
        return None if None in values else sum(values)

    @property
    def float_macs(self) -> int | None:
        """Real-valued multiply-adds of one sample."""
        return self._total("float_macs")

    @property
    def binary_macs(self) -> int | None:
        """1-bit multiply-adds of one sample."""
        return self._total("binary_macs")

    @property
    def link_macs(self) -> int | None:
        """Multiply-adds of all gates; not in `ops`."""
        return self._total("link_macs")

    @property
    def ops(self) -> float | None:
        """float MACs + 1-bit MACs / 64."""
        if self.float_macs is None or self.binary_macs is None:
            return None
        return self.float_macs + self.binary_macs / ONE_BIT_PER_OP

    @property
    def stored_bytes(self) -> int:
        """Parameters and buffers as they are."""
        return sum(layer.stored_bytes for layer in self.layers) + self.other_bytes

    @property
    def packed_bytes(self) -> int:
        """The same with binarized weights at 1 bit."""
        return sum(layer.packed_bytes for layer in self.layers) + self.other_bytes

    @property
    def convolutions(self) -> tuple[LayerSummary, ...]:
        """The layers that are convolutions."""
        return tuple(layer for layer in self.layers if layer.kind != "linear")

    @property
    def binarized(self) -> tuple[LayerSummary, ...]:
        """The layers that are binarized."""
        return tuple(layer for layer in self.layers if layer.action == "binarize")

    @property
    def kept(self) -> tuple[LayerSummary, ...]:
        """The convolutions a conversion kept in float."""
        return tuple(layer for layer in self.layers if layer.action == "keep")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for programs: everything above, totals included."""
        names = ("ops", "float_macs", "binary_macs", "link_macs", "stored_bytes", "packed_bytes")
        return {
            "model": self.model,
            "recipe": self.recipe,
            "input_size": self.input_size,
            "convolutions": len(self.convolutions),
            "binarized": len(self.binarized),
            "kept": len(self.kept),
            "total": {name: getattr(self, name) for name in names},
            "layers": [{**asdict(layer), "ops": layer.ops} for layer in self.layers],
            "other_bytes": self.other_bytes,
            "activations": [asdict(change) for change in self.activations],
            "functional": [asdict(call) for call in self.functional],
        }

    def __str__(self) -> str:
        from el_convert.render import as_text

        return as_text(self)

    def __rich__(self) -> Any:
        from el_convert.render import RichSummary

        return RichSummary(self)

    def _repr_html_(self) -> str:
        from el_convert.render import as_html

        return as_html(self)


def summarize(model: nn.Module, input_size: Sequence[int] | None = None) -> Summary:
    """Count a model's operations and bytes, layer by layer.

    Args:
        model: float or binarized; run once in eval mode on zeros, left as it was.
        input_size: (C, H, W) of one sample. By default what timm's configuration or the saved
            source says; where neither does, operations are left out.

    Returns:
        The summary; `print` it, or make it a notebook cell's last line.

    Raises:
        ConversionError: the model does not run on that input.

    Example:
        >>> import timm
        >>> print(summarize(timm.create_model("resnet18")).float_macs)
        1814073344
    """
    size = _known_size(model) if input_size is None else tuple(input_size) or None
    calls = _count(model, size) if size else None
    conversion = _conversion(model)
    decisions = {d.path: d for d in conversion.decisions} if conversion else {}
    layers = [_layer(path, module, decisions.get(path), calls) for path, module in _weighted(model)]
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    every_byte = sum(map(_bytes, tensors.values()))
    return Summary(
        type(model).__name__,
        conversion.recipe.name if conversion else "",
        size,
        tuple(layers),
        every_byte - sum(layer.stored_bytes for layer in layers),
        conversion.activations if conversion else (),
        conversion.functional if conversion else (),
    )


def _known_size(model: nn.Module) -> tuple[int, ...] | None:
    source = source_of(model)
    return input_spec(model, source).size if source is not None else None


def _conversion(model: nn.Module) -> Conversion | None:
    try:
        return conversion_of(model)
    except ConversionError:  # a float model is summarized as well
        return None


def _weighted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if is_convolution(module) or isinstance(module, nn.Linear):
            yield path, module


@dataclass
class _Calls:
    macs: int = 0
    link_macs: int = 0
    output: tuple[int, ...] = ()


def _count(model: nn.Module, size: tuple[int, ...]) -> dict[int, _Calls]:
    """Run the model once and count, per layer, over all its calls."""
    calls: dict[int, _Calls] = {}
    like = next(model.parameters(), torch.empty(()))
    handles = [
        module.register_forward_hook(lambda m, i, o: _record(calls, m, i, o))
        for _, module in _weighted(model)
    ]
    try:
        with undisturbed(model):
            model(torch.zeros(1, *size, device=like.device, dtype=like.dtype))
    except Exception as error:  # whatever a forward raises: said again with the size asked for
        raise ConversionError(
            f"{type(model).__name__} does not run on an input of {(1, *size)}: {error}; "
            "pass input_size=(C, H, W)"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _record(
    calls: dict[int, _Calls], module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    call = calls.setdefault(id(module), _Calls())
    call.output = tuple(output.shape[1:])
    if isinstance(module, nn.Linear):
        call.macs += output.numel() * module.in_features
    elif is_convolution(module):
        # Each input pixel of a transposed convolution meets every output channel of its group.
        transposed = getattr(module, "transposed", False)
        moved = inputs[0].numel() if transposed else output.numel()
        partners = module.out_channels if transposed else module.in_channels
        call.macs += moved * partners // module.groups * math.prod(module.kernel_size)
        if isinstance(module, OneBitLayer) and module.link is not None:
            call.link_macs += output.numel()


def _layer(
    path: str, module: nn.Module, decision: Decision | None, calls: dict[int, _Calls] | None
) -> LayerSummary:
    call = _Calls() if calls is None else calls.get(id(module), _Calls())
    counted = calls is not None
    binary = isinstance(module, OneBitLayer) and _is_one_bit(module)
    link = module.link if isinstance(module, OneBitLayer) else None
    stored = sum(map(_bytes, (*module.parameters(), *module.buffers())))
    kinds = (link.kind, link.spatial_kind) if link is not None else ()
    return LayerSummary(
        path=path,
        kind=layer_kind(module),
        action=decision.action if decision else "float",
        pattern=decision.pattern if decision else "",
        reason=decision.reason if decision else "",
        link=", ".join(filter(None, kinds)),
        output=call.output if counted else None,
        float_macs=(0 if binary else call.macs) if counted else None,
        binary_macs=(call.macs if binary else 0) if counted else None,
        link_macs=call.link_macs if counted else None,
        stored_bytes=stored,
        packed_bytes=_packed_bytes(module, stored) if isinstance(module, BinaryLayer) else stored,
    )


def _is_one_bit(layer: OneBitLayer) -> bool:
    return layer.recipe.input.binary and layer.recipe.weight.binary


def _packed_bytes(module: BinaryLayer, stored: int) -> int:
    if not module.recipe.weight.binary or not module.packs:
        return stored
    weight = module.weight
    scale = module.out_channels * weight.element_size()
    derived = module.recipe.weight.scale in ("mean", "mean-detached")
    return stored - _bytes(weight) + math.ceil(weight.numel() / 8) + (scale if derived else 0)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def layer_kind(module: nn.Module) -> str:
    """In the field's words: "conv 3x3", "depthwise 3x3", "grouped 3x3", "transposed 2x2", ..."""
    if not is_convolution(module):
        return "linear"
    size = "x".join(map(str, module.kernel_size))
    if getattr(module, "transposed", False):
        return f"transposed {size}"
    if module.groups == 1:
        return f"conv {size}"
    return f"depthwise {size}" if module.groups == module.in_channels else f"grouped {size}"
