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

    Example:
        >>> values = torch.zeros(2)
        >>> marks = Marks([values])
        >>> marks.hold([values]), marks.hold([values.add_(1)])
        (True, False)
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._places = list(map(_place, tensors))
        self._copies = {i: t.clone() for i, t in enumerate(tensors) if t.is_inference()}
        self._counts = self._count(tensors)

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the same tensors, in the same order, are where they were and unchanged."""
        if self._places != list(map(_place, tensors)) or self._counts != self._count(tensors):
            return False
        return not self._copies or all(
            torch.equal(tensors[i], copy) for i, copy in self._copies.items()
        )

    def _count(self, tensors: Sequence[Tensor]) -> list[int]:
        if not self._copies:
            return list(map(_version, tensors))
        return [t._version for i, t in enumerate(tensors) if i not in self._copies]
