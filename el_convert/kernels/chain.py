"""Packed convolutions that follow each other, run in one call of the native engine."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, addressof, byref, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from el_convert.kernels.buffers import shared_pool
from el_convert.kernels.memory_plan import place_maps
from el_convert.kernels.native import Engine, Epilogue, NativeConv

_NONE, _INPUT, _SCRATCH, _OUTPUT, _STRIP = range(5)
_CACHE_FLOATS = 1 << 17  # of maps between layers: about half of a second-level cache


class _Place(Structure):
    _fields_ = [("base", c_int32), ("reserved", c_int32), ("offset", c_int64)]


class _Step(Structure):
    _fields_ = [
        ("convolution", c_void_p),
        ("epilogue", c_void_p),
        *[(name, _Place) for name in ("input", "link", "residual", "output")],
        *[(name, c_int64) for name in ("height", "width", "out_height", "out_width")],
        *[(name, c_int32) for name in ("follows", "reserved")],
    ]


class _Chain(Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("steps", "input", "scratch", "output")],
        *[(name, c_int64) for name in ("count", "batch", "images", "input_floats")],
        *[(name, c_int64) for name in ("output_floats", "slot_floats")],
        *[(name, c_int32) for name in ("threads", "slots")],
    ]


@dataclass(frozen=True)
class ChainStep:
    """One convolution of a chain. Maps are numbered: 0 is the input, n + 1 what step n gives.

    Attributes:
        convolution: prepared by the engine.
        epilogue: what follows its sums.
        input: the map it reads.
        residual: the map it adds, or None.
        size: (H, W) of its input.
    """

    convolution: NativeConv
    epilogue: Epilogue
    input: int
    residual: int | None
    size: tuple[int, int]

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """(C_out, OH, OW)"""
        geometry = self.convolution.geometry
        return geometry.out_channels, *geometry.output_size(self.size)

    @property
    def reads(self) -> list[int]:
        return [self.input, *([] if self.residual is None else [self.residual])]

    def follows(self, number: int) -> bool:
        """Whether it needs no more of map `number`, its input, than the pixel that it gives."""
        g = self.convolution.geometry
        return (
            number > 0
            and self.input == number
            and not g.depthwise
            and (g.kernel, g.stride, g.padding) == ((1, 1), (1, 1), (0, 0, 0, 0))
        )


class NativeChain:
    """Steps with their places in memory laid out. The last one gives the output.

    Args:
        library: the engine that prepared the convolutions.
        steps: at least one; see `ChainStep`. A link is of the step's own input.

    Raises:
        MemoryError: on call, where scratch memory is refused.

    Example:
        >>> chain = NativeChain(engine(), steps)  # doctest: +SKIP
        >>> chain(torch.randn(1, 8, 14, 14).to(memory_format=torch.channels_last))  # doctest: +SKIP
    """

    def __init__(self, library: Engine, steps: Sequence[ChainStep]) -> None:
        self._run = library.run_chain
        self._kept_alive = tuple(steps)
        shapes = [step.output_shape for step in steps]
        floats = [channels * height * width for channels, height, width in shapes]
        groups = group_steps(steps)
        reads = [step.reads for step in steps]
        inner = [size * _is_whole(n, reads, groups) for n, size in enumerate(floats[:-1])]
        offsets, self._scratch = place_maps(inner, reads, [s.residual for s in steps], groups)
        self._output, self._output_floats = shapes[-1], floats[-1]
        places = [_Place(_INPUT)]
        for number, (size, offset) in enumerate(zip(inner, offsets, strict=True)):
            places.append(_Place(_SCRATCH, 0, offset) if size else _Place(_STRIP, 0, number))
        places.append(_Place(_OUTPUT))
        self._steps = (_Step * len(steps))()
        for number, step in enumerate(steps):
            follows = number > 0 and groups[number] == groups[number - 1]
            self._steps[number] = _step(step, number, places, follows)
        self._address = addressof(self._steps)
        self._maps = shared_pool()

    def __call__(self, input: Tensor) -> Tensor:
        """Run it.

        Args:
            input: (N, C, H, W) float32 on the CPU, channels_last in memory.

        Returns:
            (N, C_out, OH, OW), channels_last.
        """
        batch, channels, height, width = input.shape
        threads = torch.get_num_threads()
        slots = threads if batch >= threads else 1
        images = min(batch // slots, max(1, _CACHE_FLOATS // max(self._scratch, 1)))
        slot_floats = self._scratch * images
        scratch = self._maps.take(1, max(slot_floats * slots, 1), 1, 1)
        output = self._maps.take(batch, *self._output)
        call = _Chain(
            self._address, input.data_ptr(), scratch.data_ptr(), output.data_ptr(),
            len(self._steps), batch, images, channels * height * width, self._output_floats,
            slot_floats, threads, slots,
        )  # fmt: skip
        if self._run(byref(call)):
            raise MemoryError("the 1-bit convolutions could not get their scratch memory")
        return output


def group_steps(steps: Sequence[ChainStep]) -> list[int]:
    """A number for each step: of one group are those that can be done strip by strip."""
    groups: list[int] = []
    for number, step in enumerate(steps):
        new = not step.follows(number)
        groups.append((groups[-1] if groups else -1) + new)
    return groups


def _is_whole(step: int, reads: Sequence[Sequence[int]], groups: Sequence[int]) -> bool:
    """Whether what a step gives is read beyond its group, or by nobody."""
    readers = {groups[i] for i, maps in enumerate(reads) if step + 1 in maps}
    return readers != {groups[step]}


def _step(step: ChainStep, number: int, places: Sequence[_Place], follows: bool) -> _Step:
    links = step.epilogue.link != "none"
    _, out_height, out_width = step.output_shape
    nowhere = _Place(_NONE)
    return _Step(
        step.convolution.handle,
        step.epilogue.address,
        places[step.input],
        places[step.input] if links else nowhere,
        nowhere if step.residual is None else places[step.residual],
        places[number + 1],
        *step.size,
        out_height,
        out_width,
        follows,
    )
