"""The float tail of a stem: norm, activation and max pooling in one pass over memory."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from el_convert.fast_path import activation_options, plain_map, vector
from el_convert.kernels import engine
from el_convert.kernels.buffers import shared_pool
from el_convert.kernels.native import Epilogue, MaxPool
from el_convert.kernels.version import Marks
from el_convert.tail import Tail, fold_norm, normalized, tail_of


class _Prepared:
    """The engine's parameters and the tensors they were made of. Never copied or saved."""

    def __init__(self) -> None:
        self.maps = shared_pool()
        self.of: tuple[list[Any], Marks, Epilogue] | None = None

    def __deepcopy__(self, memo: object) -> _Prepared:
        return _Prepared()

    def __reduce__(self) -> tuple[type[_Prepared], tuple[()]]:
        return _Prepared, ()


class StemTail(nn.Module):
    """Batch norm, activation and max pooling of a float map, as they were in eval mode.

    Args:
        norm: a batch norm with running statistics; folded to two vectors.
        activation: one that `tail_of` knows.
        pool: a max pooling without dilation, or None.

    Shape:
        (N, C, H, W) to (N, C, OH, OW)

    Example:
        >>> tail = StemTail(nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        >>> tail(torch.randn(1, 8, 10, 10)).shape
        torch.Size([1, 8, 5, 5])
    """

    norm_scale: Tensor
    norm_shift: Tensor

    def __init__(self, norm: Any, activation: nn.Module, pool: nn.MaxPool2d | None) -> None:
        super().__init__()
        scale, shift = fold_norm(norm)
        self.register_buffer("norm_scale", scale)
        self.register_buffer("norm_shift", shift)
        self.activation = activation
        self.pool = MaxPool() if pool is None else _max_pool(pool)
        self._prepared = _Prepared()

    def forward(self, input: Tensor) -> Tensor:
        wants_gradient = torch.is_grad_enabled() and input.requires_grad
        if wants_gradient or not plain_map(input):
            return self._by_torch(input)
        library, epilogue = engine(), self._epilogue()
        if library is None or epilogue is None:
            return self._by_torch(input)
        output = library.pool(
            input.contiguous(memory_format=torch.channels_last),
            epilogue,
            self.pool,
            self._prepared.maps,
        )
        return (
            output
            if input.is_contiguous(memory_format=torch.channels_last)
            else output.contiguous()
        )

    def _by_torch(self, input: Tensor) -> Tensor:
        output = normalized(input, self.norm_scale, self.norm_shift)
        output = cast(Tensor, self.activation(output))
        if self.pool == MaxPool():
            return output
        return F.max_pool2d(output, self.pool.kernel, self.pool.stride, self.pool.padding)

    def _epilogue(self) -> Epilogue | None:
        tensors = [self.norm_scale, self.norm_shift, *self.activation.parameters()]
        if not all(t.is_cpu and t.dtype == torch.float32 for t in tensors):
            return None
        known = self._prepared.of
        sources = [*tensors, self.activation]
        same = known is not None and all(map(operator.is_, known[0], sources))
        if known is not None and same and known[1].hold(tensors):
            return known[2]
        tail = tail_of(self.activation)
        assert tail is not None  # noqa: S101  # whoever made this asked first
        epilogue = _epilogue(self.norm_scale, self.norm_shift, tail)
        self._prepared.of = sources, Marks(tensors), epilogue
        return epilogue

    def extra_repr(self) -> str:
        pooled = "" if self.pool == MaxPool() else f", {self.pool}"
        return f"{self.norm_scale.numel()}{pooled}"


def poolable(pool: nn.Module | None) -> bool:
    """Whether `StemTail` can take over a pooling."""
    if type(pool) is not nn.MaxPool2d or pool.return_indices or pool.ceil_mode:
        return False
    return pool.dilation in (1, (1, 1))


def _max_pool(pool: nn.MaxPool2d) -> MaxPool:
    sides = [value if isinstance(value, tuple) else (value, value) for value in (
        pool.kernel_size, pool.stride, pool.padding)]  # fmt: skip
    return MaxPool(*sides)


def _epilogue(scale: Tensor, shift: Tensor, tail: Tail) -> Epilogue:
    channels = scale.numel()
    return Epilogue(
        norm_scale=vector(scale, channels),
        norm_shift=vector(shift, channels),
        **activation_options(tail, channels),
    )
