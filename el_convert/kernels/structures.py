"""What single calls of the engine are given, field for field as in `engine.h`."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from struct import Struct

pack_call = Struct("4P5q2i").pack
"""An `el_call` as bytes, which are sooner made than a `Structure`: layers are many."""


class ElGeometry(Structure):
    """`el_geometry`."""

    _fields_ = [
        (name, c_int32)
        for name in (
            "in_channels", "out_channels", "groups", "kernel_h", "kernel_w", "stride_h",
            "stride_w", "dilation_h", "dilation_w", "top", "bottom", "left", "right",
        )
    ]  # fmt: skip


class ElEpilogue(Structure):
    """`el_epilogue`."""

    _fields_ = [
        *[
            (name, c_void_p)
            for name in (
                "threshold", "scale", "bias", "gamma", "norm_scale", "norm_shift", "slope",
                "act_in", "act_out",
            )
        ],
        ("low", c_float),
        ("high", c_float),
        *[
            (name, c_int32)
            for name in (
                "link", "link_after_norm", "activation", "residual_last", "link_pooled",
            )
        ],
    ]  # fmt: skip


class ElPool(Structure):
    """`el_pool`."""

    _fields_ = [
        *[(name, c_void_p) for name in ("input", "output")],
        *[
            (name, c_int64)
            for name in ("batch", "height", "width", "channels", "out_height", "out_width")
        ],
        *[
            (name, c_int32)
            for name in (
                "kernel_h", "kernel_w", "stride_h", "stride_w", "top", "left", "threads",
                "reserved",
            )
        ],
    ]  # fmt: skip


class ElLinear(Structure):
    """`el_linear`."""

    _fields_ = [
        *[(name, c_void_p) for name in ("input", "weight", "bias", "output")],
        *[(name, c_int64) for name in ("batch", "in_features", "out_features")],
        ("threads", c_int32),
        ("reserved", c_int32),
    ]
