"""The passes over memory of a training step, as ops that the native engine fuses on the CPU.

A float32 step of a binarized network waits for memory: written with torch's ops, signs, scales and
their gradients go over each weight a dozen times. Here each formula is one op. What no engine
runs (other devices and dtypes, no compiler at install, graphs that torch compiles and fuses by
itself) is done by the caller in plain torch; `runs_native` tells.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from el_convert.kernels.native import engine

_BLOCK = 16384  # numbers that a thread works on at once: their memory stays in its cache
_FEW = 8192  # up to so many, calling the op costs more than it saves
_KINDS = (
    "sign", "sign_grad", "scaled_sign", "scaled_sign_grad", "prelu_grad", "expand", "expand_grad",
    "squeeze", "squeeze_grad",
)  # fmt: skip
_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)

_library = torch.library.Library("el_convert", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema in (
    "sign(Tensor x) -> Tensor",
    "sign_grad(Tensor x, Tensor grad, bool clip, Tensor? other) -> Tensor",
    "scaled_sign(Tensor x, Tensor? scale) -> (Tensor, Tensor)",
    "scaled_sign_grad(Tensor x, Tensor scale, Tensor grad, bool clip, bool through_mean) -> "
    "(Tensor, Tensor)",
    "prelu_grad(Tensor x, Tensor slope, Tensor grad) -> (Tensor, Tensor)",
    "expand(Tensor y, Tensor gamma, Tensor x) -> Tensor",
    "expand_grad(Tensor x, Tensor gamma, Tensor grad) -> (Tensor, Tensor)",
    "squeeze(Tensor y, Tensor gamma, Tensor x, float factor) -> (Tensor, Tensor)",
    "squeeze_grad(Tensor added, Tensor gamma, Tensor grad, int count, float factor) -> "
    "(Tensor, Tensor)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]


def runs_native(*tensors: Tensor) -> bool:
    """Whether the ops of this module take these tensors, and are the faster way.

    Not where a gradient is to flow through them, as in gradients of gradients.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or engine() is None:
        return False
    large = max(t.numel() for t in tensors) > _FEW
    return large and all(t.is_cpu and t.dtype == torch.float32 for t in tensors)


def sign(x: Tensor) -> Tensor:
    """+1 where x > 0, else -1; any shape."""
    out: Tensor = torch.ops.el_convert.sign(x)
    return out


def sign_grad(x: Tensor, grad: Tensor, clip: bool, other: Tensor | None = None) -> Tensor:
    """`grad` times the surrogate of the sign's derivative at x, plus `other`; all of one shape."""
    out: Tensor = torch.ops.el_convert.sign_grad(x, grad, clip, other)
    return out


def scaled_sign(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Signs of weights (C_out, ...) times scale (C_out,), and that scale: mean |x| where None."""
    out: tuple[Tensor, Tensor] = torch.ops.el_convert.scaled_sign(x, scale)
    return out


def scaled_sign_grad(
    x: Tensor, scale: Tensor, grad: Tensor, clip: bool, through_mean: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of weights and scale.

    Args:
        x: latent weights, (C_out, ...).
        scale: (C_out,)
        grad: of the scaled signs.
        clip: the surrogate is "clip", else "approx".
        through_mean: the scale is mean |x|: what its gradient gives to x is added.
    """
    out: tuple[Tensor, Tensor]
    out = torch.ops.el_convert.scaled_sign_grad(x, scale, grad, clip, through_mean)
    return out


def prelu_grad(x: Tensor, slope: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of input (N, C, ...) and slope, (C,) or (1,)."""
    out: tuple[Tensor, Tensor] = torch.ops.el_convert.prelu_grad(x, slope, grad)
    return out


def expand(y: Tensor, gamma: Tensor, x: Tensor) -> Tensor:
    """y + gamma * repeat(x).

    Args:
        y: (N, C * count, ...)
        gamma: one value, or C * count.
        x: (N, C, ...)
    """
    out: Tensor = torch.ops.el_convert.expand(y, gamma, x)
    return out


def expand_grad(x: Tensor, gamma: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and gamma in `expand`."""
    out: tuple[Tensor, Tensor] = torch.ops.el_convert.expand_grad(x, gamma, grad)
    return out


def squeeze(y: Tensor, gamma: Tensor, x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """y + gamma * s, and s: sums of neighbouring channels of x, times factor.

    Args:
        y: (N, C, ...)
        gamma: one value, or C.
        x: (N, C * count, ...)
        factor: of the sums.
    """
    out: tuple[Tensor, Tensor] = torch.ops.el_convert.squeeze(y, gamma, x, factor)
    return out


def squeeze_grad(
    added: Tensor, gamma: Tensor, grad: Tensor, count: int, factor: float
) -> tuple[Tensor, Tensor]:
    """The gradients of x, with `count` times the channels, and gamma; `added` is s."""
    out: tuple[Tensor, Tensor]
    out = torch.ops.el_convert.squeeze_grad(added, gamma, grad, count, factor)
    return out


class _Pass(Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("x", "g", "vector", "out", "sums")],
        *[(name, c_int64) for name in ("outer", "channels", "inner", "block")],
        *[(name, c_int32) for name in ("kind", "clip", "through_mean", "threads", "count")],
        ("factor", c_float),
    ]


def _run(kind: str, sizes: Mapping[str, float], **tensors: Tensor | None) -> None:
    """Have the engine make one pass; see `el_pass` in engine.h."""
    library = engine()
    if library is None:
        raise RuntimeError("el_convert was installed without its native engine")
    given = {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}
    call = _Pass(kind=_KINDS.index(kind), threads=torch.get_num_threads(), **sizes, **given)
    library.run_pass(ctypes.addressof(call))


def _dense(x: Tensor) -> tuple[Tensor, torch.memory_format]:
    """x without gaps in memory, and its layout."""
    for layout in _FORMATS:
        fits = layout == torch.contiguous_format or x.dim() == 4 + (layout == _FORMATS[2])
        if fits and x.is_contiguous(memory_format=layout):
            return x, layout
    return x.contiguous(), torch.contiguous_format


def _alike(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, torch.memory_format]:
    x, layout = _dense(x)
    return x, grad.contiguous(memory_format=layout), layout


@torch.library.impl(_library, "sign", "CPU")
def _sign(x: Tensor) -> Tensor:
    x, layout = _dense(x)
    out = torch.empty_like(x, memory_format=layout)
    _run("sign", _numbers(x), x=x, out=out)
    return out


@torch.library.impl(_library, "sign_grad", "CPU")
def _sign_grad(x: Tensor, grad: Tensor, clip: bool, other: Tensor | None) -> Tensor:
    x, grad, layout = _alike(x, grad)
    other = None if other is None else other.contiguous(memory_format=layout)
    out = torch.empty_like(x, memory_format=layout)
    _run("sign_grad", {**_numbers(x), "clip": clip}, x=x, g=grad, vector=other, out=out)
    return out


def _numbers(x: Tensor) -> dict[str, int]:
    return {"outer": x.numel(), "channels": 1, "inner": 1, "block": _BLOCK}


def _rows(x: Tensor) -> dict[str, int]:
    inner = math.prod(x.shape[1:])
    block = max(1, _BLOCK // max(inner, 1))
    return {"outer": x.shape[0], "channels": 1, "inner": inner, "block": block}


@torch.library.impl(_library, "scaled_sign", "CPU")
def _scaled_sign(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    x, layout = _dense(x)
    out = torch.empty_like(x, memory_format=layout)
    vector = None if scale is None else scale.contiguous()
    used = x.new_empty(x.shape[0]) if scale is None else scale.clone()
    sums = used if scale is None else None
    _run("scaled_sign", _rows(x), x=x, vector=vector, out=out, sums=sums)
    return out, used


@torch.library.impl(_library, "scaled_sign_grad", "CPU")
def _scaled_sign_grad(
    x: Tensor, scale: Tensor, grad: Tensor, clip: bool, through_mean: bool
) -> tuple[Tensor, Tensor]:
    x, grad, layout = _alike(x, grad)
    out, sums = torch.empty_like(x, memory_format=layout), x.new_empty(x.shape[0])
    sizes = {**_rows(x), "clip": clip, "through_mean": through_mean}
    _run("scaled_sign_grad", sizes, x=x, g=grad, vector=scale.contiguous(), out=out, sums=sums)
    return out, sums


def _maps(wide: Tensor, layout: torch.memory_format) -> dict[str, int]:
    """How a map lies in memory: (outer, channels, inner)."""
    channels = wide.shape[1]
    inner = math.prod(wide.shape[2:]) if layout == torch.contiguous_format else 1
    size = max(channels * inner, 1)
    block = max(1, _BLOCK // size)
    return {"outer": wide.numel() // size, "channels": channels, "inner": inner, "block": block}


def _partial_sums(x: Tensor, sizes: Mapping[str, int]) -> Tensor:
    return x.new_empty(-(-sizes["outer"] // sizes["block"]), sizes["channels"])


def _summed(sums: Tensor, like: Tensor) -> Tensor:
    return (sums.sum() if like.numel() == 1 else sums.sum(0)).view_as(like)


def _each(vector: Tensor, channels: int) -> Tensor:
    return vector.flatten().expand(channels).contiguous()


@torch.library.impl(_library, "prelu_grad", "CPU")
def _prelu_grad(x: Tensor, slope: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, grad, layout = _alike(x, grad)
    sizes = _maps(x, layout)
    out, sums = torch.empty_like(x, memory_format=layout), _partial_sums(x, sizes)
    slopes = _each(slope, sizes["channels"])
    _run("prelu_grad", sizes, x=x, g=grad, vector=slopes, out=out, sums=sums)
    return out, _summed(sums, slope)


@torch.library.impl(_library, "expand", "CPU")
def _expand(y: Tensor, gamma: Tensor, x: Tensor) -> Tensor:
    y, layout = _dense(y)
    x = x.contiguous(memory_format=layout)
    sizes = {**_maps(y, layout), "count": y.shape[1] // x.shape[1]}
    out, gammas = torch.empty_like(y, memory_format=layout), _each(gamma, y.shape[1])
    _run("expand", sizes, x=x, g=y, vector=gammas, out=out)
    return out


@torch.library.impl(_library, "expand_grad", "CPU")
def _expand_grad(x: Tensor, gamma: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    grad, layout = _dense(grad)
    x = x.contiguous(memory_format=layout)
    sizes = {**_maps(grad, layout), "count": grad.shape[1] // x.shape[1]}
    out, sums = torch.empty_like(x, memory_format=layout), _partial_sums(x, sizes)
    gammas = _each(gamma, grad.shape[1])
    _run("expand_grad", sizes, x=x, g=grad, vector=gammas, out=out, sums=sums)
    return out, _summed(sums, gamma)


@torch.library.impl(_library, "squeeze", "CPU")
def _squeeze(y: Tensor, gamma: Tensor, x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    y, layout = _dense(y)
    x = x.contiguous(memory_format=layout)
    sizes = {**_maps(y, layout), "count": x.shape[1] // y.shape[1], "factor": factor}
    out, added = (torch.empty_like(y, memory_format=layout) for _ in range(2))
    _run("squeeze", sizes, x=x, g=y, vector=_each(gamma, y.shape[1]), out=out, sums=added)
    return out, added


@torch.library.impl(_library, "squeeze_grad", "CPU")
def _squeeze_grad(
    added: Tensor, gamma: Tensor, grad: Tensor, count: int, factor: float
) -> tuple[Tensor, Tensor]:
    grad, layout = _dense(grad)
    added = added.contiguous(memory_format=layout)
    sizes = _maps(grad, layout)
    out = torch.empty(_widened(grad, count), dtype=grad.dtype, memory_format=layout)
    sums, gammas = _partial_sums(grad, sizes), _each(gamma, grad.shape[1])
    sums_of = {**sizes, "count": count, "factor": factor}
    _run("squeeze_grad", sums_of, x=added, g=grad, vector=gammas, out=out, sums=sums)
    return out, _summed(sums, gamma)


def _widened(x: Tensor, count: int) -> list[int]:
    return [x.shape[0], x.shape[1] * count, *x.shape[2:]]


def _fake_pair(x: Tensor, scale: Tensor | None, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:1])


def _fake_one(x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x)


def _fake_squeeze(y: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), torch.empty_like(y)


def _fake_squeeze_grad(
    added: Tensor, gamma: Tensor, grad: Tensor, count: int, factor: float
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(_widened(grad, count)), torch.empty_like(gamma)


def _fake_both(x: Tensor, vector: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(vector)


def one_by_one(
    operator: Any, batch: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> list[Any]:
    """An op's results for each sample of a vmap; of lists among the arguments none is batched."""
    return [
        operator(
            *(
                arg.select(dim, i) if isinstance(dim, int) else arg
                for arg, dim in zip(args, in_dims, strict=True)
            )
        )
        for i in range(batch)
    ]


def _register(name: str, fake: Any) -> None:
    operator = getattr(torch.ops.el_convert, name)

    def each(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        parts = one_by_one(operator, info.batch_size, in_dims, args)
        if isinstance(parts[0], Tensor):
            return torch.stack(parts), 0
        return tuple(map(torch.stack, zip(*parts, strict=True))), (0,) * len(parts[0])

    torch.library.register_fake(f"el_convert::{name}", fake, lib=_library)
    torch.library.register_vmap(f"el_convert::{name}", each, lib=_library)


for _name, _fake in {
    "sign": _fake_one,
    "sign_grad": _fake_one,
    "scaled_sign": _fake_pair,
    "scaled_sign_grad": _fake_pair,
    "prelu_grad": _fake_both,
    "expand": _fake_one,
    "expand_grad": _fake_both,
    "squeeze": _fake_squeeze,
    "squeeze_grad": _fake_squeeze_grad,
}.items():
    _register(_name, _fake)
