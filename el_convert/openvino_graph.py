"""A packed network as an OpenVINO model that runs on OpenVINO's own 1-bit convolutions.

`BinaryConvolution` reads what `FakeQuantize` with two levels has made bits of, and packed weights
byte for byte as packed layers store them. With a padding value of 0 it leaves padded positions
out of its sums, which is what padding after the sign means: results are exact.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from el_convert.errors import ExportError, first_line
from el_convert.onnx_graph import binary_conv2d_in_onnx, onnx_program

_MULTIPLE = 8  # of input channels: the kernel reads whole bytes of them
_DOMAIN, _MARK = "el_convert", "BinaryConv2d"
_BITS = re.compile(r"(^|\.)bits(_\d+)?$")
_GEOMETRY = ("kernel", "strides", "pads", "dilations")


def openvino_model(
    model: nn.Module, input: Tensor, output_names: Sequence[str], *, batch: int = 1
) -> tuple[Any, dict[str, str]]:
    """Translate a packed network.

    Args:
        model: packed, in eval mode.
        input: (N, C, H, W) with N of 2 or more.
        output_names: of the model's outputs.
        batch: samples in a run; OpenVINO's 1-bit convolutions need to know how many.

    Returns:
        An `openvino.Model`, and the layer of each of its `BinaryConvolution` by the node's name.

    Raises:
        ExportError: the model's forward cannot be exported, or OpenVINO does not read it.
    """
    import openvino
    from openvino.frontend.onnx import ConversionExtension

    # Where bits remain OpenVINO would shift them in every run, and with overflows.
    program = onnx_program(model, input, output_names, float_weights=True, translate=_marked)
    core = openvino.Core()
    core.add_extension(ConversionExtension(_MARK, _DOMAIN, _binary_convolution))
    try:
        translated = core.read_model(io.BytesIO(program.model_proto.SerializeToString()))
        translated.reshape({0: [batch, *input.shape[1:]]})
    except Exception as error:  # of OpenVINO's own kinds
        raise ExportError(f"OpenVINO does not read the model ({first_line(error)})") from error
    return translated, _named(translated)


def _named(translated: Any) -> dict[str, str]:
    """Name every `BinaryConvolution` after its layer, from the second call on with a number."""
    calls: dict[str, str] = {}
    for node in translated.get_ordered_ops():
        if node.get_type_name() == "BinaryConvolution":
            weight = node.input_value(1).get_node().get_friendly_name()
            layer = _BITS.sub("", weight)  # readers number what is read twice
            count = list(calls.values()).count(layer)
            name = f"{layer or 'model'}:{count + 1}" if count else layer or "model"
            node.set_friendly_name(name)
            calls[name] = layer
    return calls


def misfit(channels: int, groups: int) -> str:
    """Why a convolution does not fit OpenVINO's 1-bit ones; "" where it does.

    Args:
        channels: of its input.
        groups: it has.

    Example:
        >>> misfit(64, 1), misfit(12, 1)
        ('', 'its 12 input channels are not a multiple of 8')
    """
    if groups > 1:
        return "depthwise" if groups == channels else f"it has {groups} groups"
    if channels % _MULTIPLE:
        return f"its {channels} input channels are not a multiple of {_MULTIPLE}"
    return ""


def _marked(
    input: Any,
    bits: Any,
    threshold: Any,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Any:
    """A binary convolution that fits as one node, which `_binary_convolution` takes over."""
    from onnxscript import opset18
    from onnxscript.values import Op, Opset

    geometry = (list(kernel), list(stride), list(padding), list(dilation))
    if misfit(int(input.shape[1]), groups):
        return binary_conv2d_in_onnx(input, bits, threshold, *geometry, groups)
    limit = opset18.Constant(value_floats=[0.0]) if threshold is None else threshold
    mark = Op(Opset(_DOMAIN, 1), _MARK, _schema())
    return mark(input, bits, limit, **dict(zip(_GEOMETRY, geometry, strict=True)))


def _schema() -> Any:
    from onnx.defs import OpSchema

    kinds = {"input": "float", "bits": "uint8", "threshold": "float"}
    return OpSchema(
        _MARK,
        _DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(n, f"tensor({kind})") for n, kind in kinds.items()],
        outputs=[OpSchema.FormalParameter("sums", "tensor(float)")],
        attributes=[OpSchema.Attribute(name, OpSchema.AttrType.INTS) for name in _GEOMETRY],
    )


def _binary_convolution(context: Any) -> list[Any]:
    """What OpenVINO's reader puts in the place of a mark."""
    from openvino import Shape, Tensor, Type, opset1
    from openvino.op import Constant

    bits, threshold = (context.get_input(index).get_node() for index in (1, 2))
    kernel, strides, pads, dilations = (
        [int(number) for number in context.get_attribute(name)] for name in _GEOMETRY
    )
    limit = opset1.constant(threshold.data.reshape(1, -1, 1, 1))
    zero, one = (opset1.constant(np.full((1, 1, 1, 1), value, np.float32)) for value in (0, 1))
    signs = opset1.fake_quantize(context.get_input(0), limit, limit, zero, one, 2)
    packed = np.ascontiguousarray(bits.data)
    channels = packed.shape[1] * 8 // (kernel[0] * kernel[1])
    shape = Shape([packed.shape[0], channels, *kernel])
    weight = Constant(Tensor(packed, shape, Type.u1), shared_memory=False)
    weight.set_friendly_name(bits.get_friendly_name())
    top, bottom, left, right = pads
    sums = opset1.binary_convolution(
        signs,
        weight,
        strides,
        [top, left],
        [bottom, right],
        dilations,
        "xnor-popcount",
        0.0,  # padded positions count as 0
    )
    return [sums.output(0)]
