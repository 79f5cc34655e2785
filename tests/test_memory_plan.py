"""Maps of a chain never share memory while both are needed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from el_convert.kernels.memory_plan import place_maps

Step = tuple[int, int | None, int]


@st.composite
def chains(draw: st.DrawFn) -> list[Step]:
    """(input, residual or None, floats) of steps; residuals are of their output's size."""
    steps: list[Step] = []
    for number in range(draw(st.integers(1, 12))):
        read = draw(st.integers(max(0, number - 3), number))
        residual = draw(st.none() | st.integers(0, number))
        size = draw(st.integers(1, 100)) if not residual else steps[residual - 1][2]
        steps.append((read, residual, size))
    return steps


@given(chains())
def test_what_is_read_is_what_was_written(steps: list[Step]) -> None:
    floats = [size for _, _, size in steps]
    reads = [[read, *([] if residual is None else [residual])] for read, residual, _ in steps]
    offsets, total = place_maps(floats[:-1], reads, [residual for _, residual, _ in steps])
    memory: list[object] = [None] * total
    contents: list[list[object]] = [["input"]]
    for number, (inputs, size) in enumerate(zip(reads, floats, strict=True)):
        for map in inputs:
            if map:
                at = offsets[map - 1]
                assert memory[at : at + floats[map - 1]] == contents[map]
        contents.append([object() for _ in range(size)])
        if number < len(offsets):
            assert offsets[number] % 16 == 0
            memory[offsets[number] : offsets[number] + size] = contents[-1]
    assert len(memory) == total


@given(chains(), st.data())
def test_groups_take_turns_strip_by_strip(steps: list[Step], data: st.DataObject) -> None:
    """Steps of a group give half a map each before any gives the second half."""
    floats = [2 * size for _, _, size in steps]
    reads = [[read, *([] if residual is None else [residual])] for read, residual, _ in steps]
    groups: list[int] = []
    for number, (read, _, _) in enumerate(steps):
        follows = number > 0 and read == number and data.draw(st.booleans())
        groups.append((groups[-1] if groups else -1) + (not follows))
    residuals = [residual for _, residual, _ in steps]
    offsets, total = place_maps(floats[:-1], reads, residuals, groups)
    memory: list[object] = [None] * total
    contents = [["input"], *([(number, i) for i in range(n)] for number, n in enumerate(floats))]

    def check(map: int, strips: tuple[int, ...]) -> None:
        size = floats[map - 1] // 2
        for begin in (strip * size for strip in strips):
            at = offsets[map - 1] + begin
            assert memory[at : at + size] == contents[map][begin : begin + size]

    for group in range(groups[-1] + 1):
        members = [number for number, own in enumerate(groups) if own == group]
        for strip in (0, 1):
            for number in members:
                head = number == members[0]
                for map in filter(None, reads[number]):
                    whole = head and map == reads[number][0]
                    check(map, (0, 1) if whole else (strip,))
                if number < len(offsets):
                    size = floats[number] // 2
                    at = offsets[number] + strip * size
                    begin = strip * size
                    memory[at : at + size] = contents[number + 1][begin : begin + size]


@given(chains())
def test_no_more_than_all_maps_is_needed(steps: list[Step]) -> None:
    floats = [size for _, _, size in steps][:-1]
    reads = [[read, *([] if residual is None else [residual])] for read, residual, _ in steps]
    _, total = place_maps(floats, reads, [residual for _, residual, _ in steps])
    assert total <= sum(-(-size // 16) * 16 for size in floats)


def test_a_network_of_residual_blocks_needs_two_maps() -> None:
    reads, residuals = [[0]], [None]
    for block in range(5):
        reads += [[2 * block + 1], [2 * block + 2, 2 * block + 1]]
        residuals += [None, 2 * block + 1]  # type: ignore[list-item]
    assert place_maps([64] * 10, reads, residuals)[1] == 128


def test_a_map_that_nobody_reads_is_kept_while_it_is_written() -> None:
    assert place_maps([16, 16], [[0], [0], [2]], [None, None, None])[0] == [0, 0]
