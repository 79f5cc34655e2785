"""Where the maps between the steps of a chain lie, so that what nobody reads any more is reused."""

from __future__ import annotations

from collections.abc import Sequence

_ALIGNED = 16  # floats: a line of the cache


def place_maps(
    floats: Sequence[int],
    reads: Sequence[Sequence[int]],
    residuals: Sequence[int | None],
    groups: Sequence[int] | None = None,
) -> tuple[list[int], int]:
    """Offsets for the maps that steps give, in one piece of memory.

    Each map takes the first gap that it fits in while it is in use: from the step that gives it
    to the last one that reads it, or, where steps take turns in groups, from the first step of the
    one's group to the last of the other's. A step writes over its residual where nobody else reads
    that in its group or later: both are of one shape, and every number is read before it is
    written.

    Args:
        floats: the size of map n + 1, which step n gives; 0 for one that needs no place. Map 0 and
            those beyond the list have places elsewhere.
        reads: the maps that each step reads.
        residuals: of these the one that each step adds to its output, or None.
        groups: the group of each step, which do not fall; by default each is its own.

    Returns:
        The offsets of maps 1, 2, ..., and what is needed altogether, in floats.

    Example:
        >>> place_maps([32, 16, 32], [[0], [1], [2], [3, 1]], [None, None, None, 1])
        ([0, 32, 48], 80)
        >>> place_maps([32, 32], [[0], [1], [2]], [None, None, None])
        ([0, 32], 64)
        >>> place_maps([32, 32, 32], [[0], [1], [2], [3]], [None] * 4, groups=[0, 0, 1, 1])
        ([0, 32, 64], 96)
    """
    count = len(floats)
    group = list(range(len(reads))) if groups is None else groups
    last = [
        max((group[i] for i, maps in enumerate(reads) if n + 1 in maps), default=group[n])
        for n in range(count)
    ]
    offsets: list[int] = []
    for step, size in enumerate(floats):
        over = residuals[step]
        if size and over and floats[over - 1] and last[over - 1] == group[step]:
            readers = [maps for i, maps in enumerate(reads) if group[i] == group[step]]
            if sum(list(maps).count(over) for maps in readers) == 1:
                offsets.append(offsets[over - 1])
                continue
        live = [i for i in range(step) if last[i] >= group[step] and floats[i]]
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
