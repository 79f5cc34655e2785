"""Loading the native engine, where this installation has one, and calling it.

A plain C library beside this file, loaded with ctypes: it links neither to torch nor to Python,
so one build serves every version of both.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, byref, c_char_p, c_double, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from el_convert.kernels.buffers import MapPool, shared_pool
from el_convert.kernels.geometry import ConvGeometry
from el_convert.kernels.structures import ElEpilogue, ElGeometry, ElLinear, ElPool, pack_call

ABI = 11
LINK_KINDS = ("none", "identity", "expand", "mean", "sum")
LINK_POOLS = ("none", "average", "max")
ACTIVATION_KINDS = ("none", "clamp", "prelu", "silu", "hardswish")
INSTRUCTION_SET_VARIABLE = "EL_CONVERT_ISA"
"""Environment variable: "avx512vpopcntdq", "avx512", "avx2", "neon", "portable"; or "none", for
plain torch."""


@dataclass(frozen=True)
class MaxPool:
    """A max pooling; the default pools nothing.

    Attributes:
        kernel, stride: (vertical, horizontal).
        padding: at each end of (height, width), at most half of the kernel.
    """

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(OH, OW) for an input of (H, W)."""
        sides = zip((height, width), self.kernel, self.stride, self.padding, strict=True)
        out_height, out_width = ((n + 2 * p - k) // s + 1 for n, k, s, p in sides)
        return out_height, out_width


class Engine:
    """The loaded library.

    Attributes:
        isas: instruction sets that this machine and this build share, best first.
        isa: the one in use; None lets the library choose per convolution.

    Raises:
        OSError: the file is no such library, or of another version of this package.
    """

    def __init__(self, path: Path, isa: str | None = None) -> None:
        self.path = path
        self._library = library = ctypes.CDLL(str(path))
        if library.el_abi() != ABI:
            raise OSError(f"{path} belongs to another version of el_convert")
        library.el_isa_name.restype = c_char_p
        library.el_create.restype = c_void_p
        library.el_create.argtypes = [POINTER(ElGeometry), c_void_p, c_char_p]
        library.el_destroy.argtypes = [c_void_p]
        library.el_destroy.restype = None
        library.el_run.argtypes = [c_void_p, c_void_p, c_void_p]
        library.el_chain_run.argtypes = [c_void_p]
        library.el_pool_run.argtypes = [c_void_p, c_void_p, c_char_p]
        library.el_linear_run.argtypes = [c_void_p, c_char_p]
        library.el_pass_run.argtypes = [c_void_p, c_char_p]
        library.el_peak.restype = c_double
        library.el_peak.argtypes = [c_char_p, ctypes.c_int]
        library.el_set_parallel.argtypes = [c_void_p, c_void_p]
        library.el_set_parallel(*_torch_thread_pool())
        self.isas = self._instruction_sets()
        if isa is not None and isa not in self.isas:
            raise OSError(f"{isa!r} is none of this machine's instruction sets {self.isas}")
        self.isa = isa

    def _instruction_sets(self) -> tuple[str, ...]:
        names: list[str] = []
        while (name := self._library.el_isa_name(len(names))) is not None:
            names.append(name.decode())
        return tuple(names)

    def prepare(
        self, geometry: ConvGeometry, bits: Tensor, isa: str | None = None
    ) -> NativeConv | None:
        """A convolution ready to run; None where the engine has no fast path for its shape.

        Args:
            geometry: of the convolution.
            bits: (C_out, ...) uint8 on the CPU, see `pack_bits`.
            isa: one of `isas`, for comparing them.
        """
        shape = (geometry.out_channels, geometry.bytes_per_output)
        if tuple(bits.shape) != shape or bits.dtype != torch.uint8:
            raise ValueError(f"packed weights are {tuple(bits.shape)}, not {shape} uint8")
        native = ElGeometry(
            geometry.in_channels, geometry.out_channels, geometry.groups, *geometry.kernel,
            *geometry.stride, *geometry.dilation, *geometry.padding,
        )  # fmt: skip
        name = isa or self.isa
        rows = bits.contiguous()  # a name of its own: it must live until it was read
        handle = self._library.el_create(
            byref(native), rows.data_ptr(), name.encode() if name else None
        )
        return NativeConv(self._library, handle, geometry) if handle else None

    def pool(self, input: Tensor, epilogue: Epilogue, pool: MaxPool, maps: MapPool) -> Tensor:
        """Norm and activation of a float map, as in `Epilogue`, then max pooling, in one pass.

        Args:
            input: (N, C, H, W) float32 on the CPU, channels_last in memory.
            epilogue: only its norm and activation count.
            pool: the pooling.
            maps: what gives the output's memory.

        Returns:
            (N, C, OH, OW), channels_last.
        """
        batch, channels, height, width = input.shape
        size = pool.output_size(height, width)
        output = maps.take(batch, channels, *size)
        call = ElPool(
            input.data_ptr(), output.data_ptr(), batch, height, width, channels, *size,
            *pool.kernel, *pool.stride, *pool.padding, torch.get_num_threads(),
        )  # fmt: skip
        name = self.isa.encode() if self.isa else None
        if self._library.el_pool_run(byref(epilogue.native), byref(call), name):
            raise MemoryError("the pooling could not get its scratch memory")
        return output

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A linear layer for few inputs, as fast as its weights can be read.

        Args:
            input, weight, bias: (N, in), (out, in) and (out,), float32 on the CPU, contiguous.

        Returns:
            (N, out).
        """
        (batch, inputs), outputs = input.shape, weight.shape[0]
        output = input.new_empty(batch, outputs)
        call = ElLinear(
            input.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(),
            output.data_ptr(), batch, inputs, outputs, torch.get_num_threads(),
        )  # fmt: skip
        self._library.el_linear_run(byref(call), self.isa.encode() if self.isa else None)
        return output

    def run_chain(self, chain: Any) -> int:
        """Run an `el_chain`, given by reference, see `engine.h`; 0, or -1 without memory."""
        status: int = self._library.el_chain_run(chain)
        return status

    def run_pass(self, pass_address: int) -> None:
        """Run an `el_pass`, see `engine.h`."""
        self._library.el_pass_run(pass_address, self.isa.encode() if self.isa else None)

    def peak(self, isa: str | None = None, rounds: int = 1000) -> float:
        """Multiply-adds per second of the innermost loop alone, one thread, best of `rounds`."""
        name = isa or self.isa
        rate: float = self._library.el_peak(name.encode() if name else None, rounds)
        return rate


class Epilogue:
    """What follows a convolution's integer sums, in the engine's terms; see `engine.h`.

    Args:
        link: one of `LINK_KINDS`.
        link_after_norm: whether the link is added after the norm.
        link_pool: one of `LINK_POOLS`, over windows of 2x2 pixels. The link then has as
            many channels as the output, 2 or 4 times, or, without groups, 1/2 or 1/4.
        activation: one of `ACTIVATION_KINDS`.
        low, high: of "clamp".
        residual_last: whether the residual is added after the activation.
        **vectors: contiguous float32 tensors on the CPU, or None: threshold, scale, bias, gamma,
            norm_scale, norm_shift, slope, act_in, act_out.
    """

    def __init__(
        self,
        *,
        link: str = "none",
        link_after_norm: bool = False,
        link_pool: str = "none",
        activation: str = "none",
        low: float = 0.0,
        high: float = float("inf"),
        residual_last: bool = False,
        **vectors: Tensor | None,
    ) -> None:
        if activation == "prelu" and vectors.get("slope") is None:
            raise ValueError("the activation prelu needs a slope")
        if link != "none" and vectors.get("gamma") is None:
            raise ValueError("a link needs its gamma")
        if (vectors.get("norm_scale") is None) != (vectors.get("norm_shift") is None):
            raise ValueError("a norm needs both its scale and its shift")
        self.kept_alive = [v for v in vectors.values() if v is not None]
        self.link = link
        self.native = ElEpilogue(
            low=low,
            high=high,
            link=LINK_KINDS.index(link),
            link_after_norm=link_after_norm,
            link_pooled=LINK_POOLS.index(link_pool),
            activation=ACTIVATION_KINDS.index(activation),
            residual_last=residual_last,
            **{name: v.data_ptr() for name, v in vectors.items() if v is not None},
        )
        self.address = ctypes.addressof(self.native)


class NativeConv:
    """A convolution whose weights are laid out for one instruction set. Made by `Engine.prepare`.

    Raises:
        MemoryError: on call, where scratch memory is refused.
    """

    def __init__(self, library: Any, handle: int, geometry: ConvGeometry) -> None:
        self._library = library
        self._run = library.el_run
        self._handle = handle
        self.geometry = geometry
        self._output_size = cache(geometry.output_size)
        self._channels = geometry.out_channels
        self._take = shared_pool().take

    def __del__(self) -> None:
        self._library.el_destroy(self._handle)

    @property
    def handle(self) -> int:
        """The convolution's address; valid while this object lives."""
        return self._handle

    def __call__(
        self,
        input: Tensor,
        epilogue: Epilogue,
        link: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Run it.

        Args:
            input: (N, C_in, H, W) float32 on the CPU, channels_last in memory.
            epilogue: what follows the sums.
            link: (N, C_in, OH, OW), or C_out channels for the link "identity"; channels_last.
                Twice as high and wide where the epilogue pools it.
            residual: of the output's shape, channels_last.

        Returns:
            (N, C_out, OH, OW), channels_last.
        """
        if link is None and epilogue.link != "none":
            raise ValueError(f"the link {epilogue.link} needs a map to add")
        batch, _, height, width = input.shape
        out_height, out_width = self._output_size((height, width))
        output = self._take(batch, self._channels, out_height, out_width)
        call = pack_call(
            input.data_ptr(),
            0 if link is None else link.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            output.data_ptr(),
            batch,
            height,
            width,
            out_height,
            out_width,
            torch.get_num_threads(),
            0,
        )
        if self._run(self._handle, epilogue.address, call):
            raise MemoryError("the 1-bit convolution could not get its scratch memory")
        return output


def _torch_thread_pool() -> list[int | None]:
    """What `el_set_parallel` takes, of the OpenMP runtime that torch runs on; None without one."""
    names = ("GOMP_parallel", "omp_get_thread_num")
    try:
        loaded = ctypes.CDLL(None)
        functions = [getattr(loaded, name) for name in names]
    except (AttributeError, OSError, TypeError):  # another runtime, or a system without dlopen(0)
        return [None, None]
    return [ctypes.cast(function, c_void_p).value for function in functions]


def _library_path() -> Path | None:
    here = Path(__file__).parent
    found = sorted(here.glob("_engine*.so")) + sorted(here.glob("_engine*.dylib"))
    return found[0] if found else None


@cache
def _load() -> tuple[Engine | None, str]:
    """The engine, or why there is none."""
    wanted = os.environ.get(INSTRUCTION_SET_VARIABLE) or None
    if wanted == "none":
        return None, ""
    path = _library_path()
    if path is None:
        return None, (
            "el_convert was installed without its native engine: packed convolutions run in plain "
            "torch, which is slower than the float model. Install a C++ compiler (such as g++) "
            "and then el_convert again"
        )
    try:
        return Engine(path, wanted), ""
    except OSError as error:
        return None, f"the native engine of el_convert does not load ({error}): install it again"


def engine() -> Engine | None:
    """The native engine of this process; None where there is none, see `engine_notice`."""
    return _load()[0]


def engine_notice() -> str:
    """Why there is no engine although one is wanted, and what to do; "" where all is well."""
    return _load()[1]
