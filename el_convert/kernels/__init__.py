"""The 1-bit convolution: a custom op, its pure-torch truth, and the optional native engine."""

from el_convert.kernels.geometry import ConvGeometry
from el_convert.kernels.native import Engine, engine, engine_notice
from el_convert.kernels.operator import binary_conv2d
from el_convert.kernels.reference import reference_conv2d

__all__ = [
    "ConvGeometry",
    "Engine",
    "binary_conv2d",
    "engine",
    "engine_notice",
    "reference_conv2d",
]
