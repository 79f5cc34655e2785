"""Noticing that tensors were changed in place."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

_place = Tensor.data_ptr
_version = attrgetter("_version")


class Marks:
    """What tensors were at one time; does not keep them alive.

    Tensors count their changes. Those made in inference mode do not: of these a copy is compared.

    Args:
        tensors: to be watched.
        copied: numbers of those whose values were copied and must stay as they are, by default
            all. Others are read where they lie, and only have to stay there.

    Example:
        >>> values = torch.zeros(2)
        >>> marks = Marks([values])
        >>> marks.hold([values]), marks.hold([values.add_(1)])
        (True, False)
        >>> Marks([values], copied=[]).hold([values.add_(1)])
        True
    """

    def __init__(self, tensors: Sequence[Tensor], copied: Sequence[int] | None = None) -> None:
        numbers = range(len(tensors)) if copied is None else copied
        self._places = list(map(_place, tensors))
        self._copies = {i: tensors[i].clone() for i in numbers if tensors[i].is_inference()}
        self._counted = [i for i in numbers if i not in self._copies]
        self._counts = self._count(tensors)

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the same tensors, in the same order, are where they were and unchanged."""
        if self._places != list(map(_place, tensors)) or self._counts != self._count(tensors):
            return False
        return not self._copies or all(
            torch.equal(tensors[i], copy) for i, copy in self._copies.items()
        )

    def _count(self, tensors: Sequence[Tensor]) -> list[int]:
        return [_version(tensors[i]) for i in self._counted]
