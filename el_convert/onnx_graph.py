"""A packed network as an ONNX graph of standard operators, its weights at one bit each."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from el_convert.errors import ExportError

OPSET = 18
"""The version of ONNX's operators that graphs use."""

_ESCAPES = re.compile("\x1b\\[[0-9;]*m")
_UINT8, _FLOAT = 2, 1  # ONNX's numbers of these types
_POSITIVE = 1e-30  # leaves room for a factor before a product is 0
_UNPACKING = {"Unsqueeze", "BitShift", "BitwiseAnd", "Reshape", "Slice", "Cast", "Mul", "Sub"}


def onnx_program(
    model: nn.Module,
    input: Tensor,
    output_names: Sequence[str],
    *,
    float_weights: bool = False,
    translate: Callable[..., Any] | None = None,
) -> Any:
    """Translate a packed network.

    A packed weight is an initializer of bytes under its own name, `layer1.0.conv1.bits`; shifts,
    a slice and a cast turn it into +1 and -1 on the way to `Conv`, which runtimes do once, when
    they load the file.

    Args:
        model: packed, in eval mode.
        input: (N, C, H, W) with N of 2 or more; the graph takes any N.
        output_names: of the graph's outputs.
        float_weights: store +1 and -1 as float32 instead, for runtimes without `BitShift`.
        translate: what takes the place of `binary_conv2d_in_onnx`.

    Returns:
        torch's `ONNXProgram`.

    Raises:
        ExportError: the model's forward cannot be exported.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's exporter warns about itself
            program = torch.onnx.export(
                model,
                (input,),
                dynamo=True,
                verbose=False,
                optimize=False,
                opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                custom_translation_table=_translations(translate),
                input_names=["input"],
                output_names=list(output_names),
            )
            if program is None:
                raise RuntimeError("torch.onnx.export returned nothing")
            _simplify(program.model, _folding(float_weights))
            _drop_notes(program.model)
    except Exception as error:  # torch.export and torch.onnx raise errors of a dozen kinds
        raise ExportError(
            f"{type(model).__name__} cannot be exported ({_reason(error)})"
        ) from error
    return program


def _reason(error: BaseException) -> str:
    """What stopped torch's exporter, from under the general advice that it wraps it in."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    plain = _ESCAPES.sub("", f"{type(error).__name__}: {lines[0] if lines else ''}")
    return plain.strip()


def _translations(
    convolution: Callable[..., Any] | None,
) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operators that torch's exporter does not know, or that runtimes compute too coarsely."""
    return {
        torch.ops.el_convert.binary_conv2d.default: convolution or binary_conv2d_in_onnx,
        torch.ops.aten.__rshift__.Tensor: _right_shift,
        torch.ops.aten.sigmoid.default: _sigmoid,
        torch.ops.aten.gelu.default: _gelu,
        torch.ops.aten.scaled_dot_product_attention.default: _attention,
    }


def _right_shift(bits: Any, places: Any) -> Any:
    """Of bytes: how convolutions other than 2d unpack their weights."""
    from onnxscript import opset18

    return opset18.BitShift(bits, places, direction="RIGHT")


def _sigmoid(input: Any) -> Any:
    """Never 0, which ONNX Runtime gives from -18 on: times a positive feature its sign is +1."""
    from onnxscript import opset18

    return opset18.Max(opset18.Sigmoid(input), opset18.Constant(value_float=_POSITIVE))


def _gelu(input: Any, approximate: str = "none") -> Any:
    """Never above 0 for a negative feature: ONNX Runtime's tanh may lie a rounding below -1."""
    from onnxscript import opset18
    from onnxscript.function_libs.torch_lib.ops.nn import aten_gelu

    if approximate != "tanh":
        return aten_gelu(input, approximate)
    op: Any = opset18

    def number(value: float) -> Any:
        return op.Constant(value_float=value)

    cube = op.Mul(op.Mul(op.Mul(input, input), input), number(0.044715))
    inner = op.Mul(op.Add(input, cube), number(math.sqrt(2 / math.pi)))
    gate = op.Max(op.Add(op.Tanh(inner), number(1.0)), number(0.0))
    return op.Mul(op.Mul(input, number(0.5)), gate)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention within blocks of an image too, (N, blocks, heads, tokens, channels)."""
    from onnxscript import opset18
    from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention

    op: Any = opset18
    rank = len(query.shape)
    added = attn_mask is None or attn_mask.dtype == _FLOAT
    if rank == 4 or not added or is_causal or enable_gqa:
        return aten_scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    factor = int(query.shape[-1]) ** -0.5 if scale is None else scale
    across = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = op.Mul(op.MatMul(query, across), op.Constant(value_float=factor))
    if attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _simplify(model: Any, should_fold: Callable[[Any], bool | None]) -> None:
    """What onnxscript's `optimize` does, but for its patterns: most of its time, for little here.

    Runtimes know those and more, and apply them when they load the file.
    """
    from onnx_ir.passes import common as passes
    from onnxscript.optimizer import fold_constants_ir

    common: Any = passes
    common.InlinePass()(model)
    for _ in range(2):
        fold_constants_ir(model, onnx_shape_inference=True, should_fold=should_fold)
        _drop_zero_biases(model)
        common.RemoveUnusedNodesPass()(model)
    for step in (
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        step(model)


def _drop_zero_biases(model: Any) -> None:
    """Of convolutions without one torch's exporter makes zeros, for 3d ones of a wrong shape."""
    for node in model.graph:
        if node.op_type in ("Conv", "ConvTranspose") and len(node.inputs) == 3:
            value = None if node.inputs[2] is None else node.inputs[2].const_value
            if value is not None and not value.numpy().any():
                node.replace_input_with(2, None)


def _drop_notes(model: Any) -> None:
    """Take out where in Python each node came from: with it the file would be a sixth larger."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def _folding(float_weights: bool) -> Callable[[Any], bool | None]:
    """Which nodes on constants are computed now; None leaves it to the optimizer."""

    def should_fold(node: Any) -> bool | None:
        if float_weights:
            return True if node.op_type in _UNPACKING else None
        packed = any(value is not None and value.dtype == _UINT8 for value in node.inputs)
        return False if packed else None

    return should_fold


def binary_conv2d_in_onnx(
    input: Any,
    bits: Any,
    threshold: Any,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Any:
    """`torch.ops.el_convert.binary_conv2d`, whose arguments these are, in ONNX's operators."""
    from onnxscript import opset18

    op: Any = opset18
    inside = int(input.shape[1]) // groups
    shape = [int(bits.shape[0]), inside, *kernel]
    limit = op.Constant(value_float=0.0)
    if threshold is not None:
        limit = op.Reshape(threshold, op.Constant(value_ints=[1, -1, 1, 1]))
    one = op.Constant(value_float=1.0)
    signs = op.Where(op.Greater(input, limit), one, op.Neg(one))
    top, bottom, left, right = padding
    sums = op.Conv(
        signs,
        _signs_of(op, bits, shape),
        kernel_shape=list(kernel),
        pads=[top, left, bottom, right],
        strides=list(stride),
        dilations=list(dilation),
        group=groups,
    )
    # Whole numbers, also where a runtime multiplies scales into the weights or uses Winograd's
    # algorithm: a sum of exactly 0 may go to the next sign.
    return op.Round(sums)


def _signs_of(op: Any, bits: Any, shape: Sequence[int]) -> Any:
    """+1 and -1 of packed weights, see `pack_bits`."""
    from onnx import helper

    def constant(values: list[int]) -> Any:
        return op.Constant(value=helper.make_tensor("", _UINT8, [len(values)], values))

    outputs, count = shape[0], torch.Size(shape[1:]).numel()
    # Left until the wanted bit is the highest, then right until it is the lowest.
    places = op.Unsqueeze(bits, op.Constant(value_ints=[2]))
    highest = op.BitShift(places, constant([7, 6, 5, 4, 3, 2, 1, 0]), direction="LEFT")
    single = op.BitShift(highest, constant([7]), direction="RIGHT")
    flat = op.Reshape(single, op.Constant(value_ints=[outputs, int(bits.shape[1]) * 8]))
    ends = (op.Constant(value_ints=[n]) for n in (0, count, 1))
    values = op.Cast(op.Slice(flat, *ends), to=_FLOAT)
    signs = op.Sub(op.Mul(values, op.Constant(value_float=2.0)), op.Constant(value_float=1.0))
    return op.Reshape(signs, op.Constant(value_ints=list(shape)))
