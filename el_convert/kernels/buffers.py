"""Memory of feature maps that nobody reads any more, for the next ones.

Fresh memory is handed out page by page, each cleared by the operating system at its first touch:
for large maps that takes longer than computing them.
"""

from __future__ import annotations

import threading
import weakref
from sys import getrefcount

import torch
from torch import Tensor

_SMALL = 1 << 14  # floats; less is quickly had
_SPARE = 2  # times what a map needs, its block may have
_MOST = 16  # blocks, and sizes in each; a caller that keeps every output gets fresh memory then
_IDLE = 512  # maps handed out since a block was last wanted
_use_count = getattr(torch._C, "_storage_Use_Count", None)


class _Block:
    """Some memory, which maps of several sizes use one after the other."""

    __slots__ = ("floats", "handle", "idle", "maps", "place", "storage", "wanted")

    def __init__(self, floats: int) -> None:
        self.floats = floats
        self.wanted = 0
        self.storage = torch.UntypedStorage(4 * floats, device="cpu")  # type: ignore[no-untyped-call]
        self.handle = self.storage._cdata
        self.place = self.storage.data_ptr()
        self.maps: dict[tuple[int, ...], Tensor] = {}
        self.idle = (0, 0)  # references while nothing else uses it

    def references(self) -> tuple[int, int]:
        """Of tensors, and to their storage, a Python object that may outlive them."""
        return _use_count(self.handle), getrefcount(self.storage)  # type: ignore[misc]

    def moved(self) -> bool:
        """Whether a user of a map resized it or moved it to memory shared between processes."""
        return self.storage.data_ptr() != self.place

    def map(self, size: tuple[int, ...]) -> Tensor:
        """A tensor of its own, with no relation to those that used the memory before.

        Called only while the block is idle.
        """
        known = self.maps.get(size)
        if known is None:
            if len(self.maps) == _MOST:
                self.maps.clear()
            with torch.inference_mode(False):  # for both modes
                empty = torch.empty(0, dtype=torch.float32, device="cpu")
                known = empty.set_(self.storage, 0, size, _strides(size))
            self.maps[size] = known
            self.idle = self.references()
        return known.data  # neither a view nor, as detach() makes them, of a fixed shape


class MapPool(threading.local):
    """Gives out float32 maps, of memory that it gave out before where no tensor uses that any more.

    What was used last comes first: it is still in the caches. Each thread has its own memory, and
    it is gone with the pool.

    Example:
        >>> pool = MapPool()
        >>> first = pool.take(1, 8, 64, 64)
        >>> place = first.data_ptr()
        >>> del first
        >>> pool.take(1, 8, 64, 64).data_ptr() == place
        True
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._taken = 0

    def take(self, *size: int) -> Tensor:
        """Memory for (N, C, H, W), channels_last, its values undefined."""
        floats = size[0] * size[1] * size[2] * size[3]
        if floats < _SMALL or _use_count is None:
            return _fresh(size)
        self._taken += 1
        block = self._best(floats)
        if block is None:
            self._blocks = [b for b in self._blocks if b.wanted > self._taken - _IDLE]
            if len(self._blocks) >= _MOST:
                return _fresh(size)
            block = _Block(floats)
        block.wanted = self._taken
        self._blocks.insert(0, block)
        return block.map(size)

    def _best(self, floats: int) -> _Block | None:
        """The smallest idle block, of these the last wanted, out of the list."""
        best, smallest, count = None, floats * _SPARE + 1, _use_count
        for block in self._blocks:
            # `references`, without a call of it: this is run for every layer.
            if (
                floats <= block.floats < smallest
                and count(block.handle) == block.idle[0]  # type: ignore[misc]
                and getrefcount(block.storage) == block.idle[1]
            ):
                best, smallest = block, block.floats
        if best is None:
            return None
        self._blocks.remove(best)
        return None if best.moved() else best


def _strides(size: tuple[int, ...]) -> tuple[int, int, int, int]:
    _, channels, height, width = size
    return height * width * channels, 1, width * channels, channels


def _fresh(size: tuple[int, ...]) -> Tensor:
    """As the engine writes it, whatever torch's defaults are."""
    return torch.empty(size, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)


_shared: weakref.ReferenceType[MapPool] | None = None
_lock = threading.Lock()


def shared_pool() -> MapPool:
    """The pool of all packed layers; its memory is given back with the last of them."""
    global _shared
    with _lock:
        pool = None if _shared is None else _shared()
        if pool is None:
            pool = MapPool()
            _shared = weakref.ref(pool)
        return pool
