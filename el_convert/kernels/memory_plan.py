"""Where the maps between the steps of a chain lie, so that what nobody reads any more is reused."""

from __future__ import annotations

from collections.abc import Sequence

_ALIGNED = 16  # floats: a line of the cache


def place_maps(
    floats: Sequence[int], reads: Sequence[Sequence[int]], residuals: Sequence[int | None]
) -> tuple[list[int], int]:
    """Offsets for the maps that steps give, in one piece of memory.

    Each map takes the first gap that it fits in while it is in use: from the step that gives it
    to the last one that reads it. A step writes over its residual where that is read for the last
    time: both are of one shape, and every number is read before it is written.

    Args:
        floats: the size of map n + 1, which step n gives; map 0 and those beyond the list have
            places elsewhere.
        reads: the maps that each step reads.
        residuals: of these the one that each step adds to its output, or None.

    Returns:
        The offsets of maps 1, 2, ..., and what is needed altogether, in floats.

    Example:
        >>> place_maps([32, 16, 32], [[0], [1], [2], [3, 1]], [None, None, None, 1])
        ([0, 32, 48], 80)
        >>> place_maps([32, 32], [[0], [1], [2]], [None, None, None])
        ([0, 32], 64)
    """
    count = len(floats)
    last = [
        max((i for i, maps in enumerate(reads) if n + 1 in maps), default=n) for n in range(count)
    ]
    offsets: list[int] = []
    for step, size in enumerate(floats):
        over = residuals[step]
        # Not where the step reads the same map as its input too.
        if over and last[over - 1] == step and list(reads[step]).count(over) == 1:
            offsets.append(offsets[over - 1])
            continue
        live = [i for i in range(step) if last[i] >= step]
        taken = sorted((offsets[i], offsets[i] + _whole(floats[i])) for i in live)
        offsets.append(_first_gap(taken, _whole(size)))
    ends = [offset + _whole(size) for offset, size in zip(offsets, floats, strict=True)]
    return offsets, max(ends, default=0)


def _first_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    at = 0
    for begin, end in taken:
        if begin - at >= size:
            break
        at = max(at, end)
    return at


def _whole(floats: int) -> int:
    return -(-floats // _ALIGNED) * _ALIGNED
