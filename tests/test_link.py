"""The gate against loops written out here: every squeeze, expand, stride and padding case."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from el_convert.link import ElasticLink, align_channels, bin_sizes, link_geometry
from el_convert.recipes import LinkOptions


def channels_by_loop(input: Tensor, want: int, squeeze: str, expand: str) -> Tensor:
    """(N, C, ...) to (N, want, ...), one output channel at a time."""
    have = input.shape[1]
    rows = []
    for c in range(want):
        first = math.floor(Fraction(c * have, want))
        last = math.ceil(Fraction((c + 1) * have, want))
        if have == want:
            rows.append(input[:, c])
        elif have > want:
            part = input[:, first:last]
            results = {"mean": part.mean(1), "sum": part.sum(1), "slice": part[:, 0]}
            rows.append(results[squeeze])
        elif expand == "zero":
            rows.append(input[:, c] if c < have else torch.zeros_like(input[:, 0]))
        else:
            rows.append(input[:, first if expand == "repeat" else c % have])
    return torch.stack(rows, 1)


@pytest.mark.parametrize("squeeze", ["mean", "sum", "slice"])
@pytest.mark.parametrize("expand", ["repeat", "tile", "zero"])
@pytest.mark.parametrize(
    ("have", "want"),
    [(4, 4), (8, 4), (6, 4), (7, 3), (5, 4), (4, 8), (4, 6), (3, 7), (1, 5), (5, 1)],
)
def test_channels_are_the_loop(have: int, want: int, squeeze: str, expand: str) -> None:
    input = torch.randn(2, have, 3, 2, dtype=torch.float64)
    output = align_channels(input, want, 1, squeeze, expand)
    assert torch.allclose(output, channels_by_loop(input, want, squeeze, expand))
    assert torch.equal(output, align_channels(input, want, -3, squeeze, expand))


@given(have=st.integers(1, 40), want=st.integers(1, 40))
def test_bins_cover_all_channels(have: int, want: int) -> None:
    assume(have >= want)
    sizes = bin_sizes(have, want)
    assert sizes.shape == (want,)
    assert int(sizes.min()) >= 1
    assert have <= int(sizes.sum()) < have + want
    constant = align_channels(torch.full((1, have, 1), 3.0), want)
    assert torch.allclose(constant, torch.full((1, want, 1), 3.0))


@pytest.mark.parametrize(("have", "want"), [(6, 4), (8, 4), (4, 8), (4, 6)])
def test_empty_batches_and_unbatched(have: int, want: int) -> None:
    assert align_channels(torch.zeros(0, have, 3, 3), want).shape == (0, want, 3, 3)
    assert align_channels(torch.zeros(have, 3, 3), want, -3).shape == (want, 3, 3)


def window_by_loop(line: Tensor, index: int, conv: nn.Conv1d, reduce: str) -> Tensor:
    """(C,) summary of the stride-wide window centred on output `index`'s receptive field."""
    stride, padding = conv.stride[0], int(conv.padding[0])
    span = conv.dilation[0] * (conv.kernel_size[0] - 1)
    start = index * stride - padding + math.ceil(Fraction(span - (stride - 1), 2))
    inside = [line[:, i] for i in range(start, start + stride) if 0 <= i < line.shape[1]]
    if not inside:
        return torch.zeros_like(line[:, 0])
    if reduce == "slice":
        return line[:, start] if start >= 0 else torch.zeros_like(line[:, 0])
    part = torch.stack(inside)
    if reduce == "max":
        return part.max(0).values
    # Positions left of the input count as zeros of the window, those right of it do not count.
    left = sum(1 for i in range(start, start + stride) if i < 0)
    return part.sum(0) / (len(inside) + left)


CASES = [
    # kernel, stride, padding, dilation
    (1, 1, 0, 1),
    (3, 1, 1, 1),
    (3, 1, 0, 1),
    (5, 1, 0, 1),
    (3, 1, 0, 2),
    (3, 1, 2, 2),
    (1, 2, 0, 1),
    (3, 2, 1, 1),
    (3, 2, 0, 1),
    (2, 2, 0, 1),
    (4, 4, 0, 1),
    (7, 4, 3, 1),
    (7, 2, 3, 1),
    (3, 3, 0, 1),
    (5, 2, 0, 1),
    (1, 1, 1, 1),
    (3, 2, 2, 2),
    (11, 4, 2, 1),
]


@pytest.mark.parametrize("length", [16, 17, 18, 23])
@pytest.mark.parametrize("reduce", ["average", "max", "slice"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_space_is_the_loop(case: tuple[int, int, int, int], reduce: str, length: int) -> None:
    kernel, stride, padding, dilation = case
    conv = nn.Conv1d(3, 3, kernel, stride, padding, dilation)
    input = torch.rand(1, 3, length) + 0.1
    output = conv(input)
    link = ElasticLink(link_geometry(conv), LinkOptions(downsample=reduce))  # type: ignore[arg-type]
    aligned = link.align(input, output)
    assert aligned.shape == output.shape
    if reduce == "max" and link.geometry.offset[0] < 0:
        return  # a window half outside sees the padding's zeros; inputs here are positive
    for index in range(output.shape[-1]):
        expected = window_by_loop(input[0], index, conv, reduce)
        assert torch.allclose(aligned[0, :, index], expected), index


@settings(max_examples=150, deadline=None)
@given(data=st.data(), dims=st.integers(1, 3), transposed=st.booleans())
def test_any_geometry_fits_the_convolution(
    data: st.DataObject, dims: int, transposed: bool
) -> None:
    def draw(low: int, high: int) -> list[int]:
        return data.draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims))

    kernel, stride, padding, dilation = draw(1, 4), draw(1, 3), draw(0, 2), draw(1, 2)
    padding = [min(p, d * (k - 1)) for p, d, k in zip(padding, dilation, kernel, strict=True)]
    have, want = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    kind = (kinds if transposed else plain)[dims - 1]
    conv = kind(have, want, kernel, stride, padding, dilation=dilation)  # type: ignore[arg-type]
    size = [
        data.draw(st.integers(d * (k - 1) + 1, 9)) for d, k in zip(dilation, kernel, strict=True)
    ]
    input = torch.randn(2, have, *size)
    output = conv(input)
    link = ElasticLink(link_geometry(conv))
    assert torch.equal(link(input, output).isfinite(), torch.ones_like(output).bool())
    assert link(input[0], output[0]).shape == output[0].shape


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_string_padding(padding: str, kernel: int) -> None:
    conv = nn.Conv2d(2, 2, kernel, padding=padding)
    input = torch.randn(1, 2, 6, 7)
    link = ElasticLink(link_geometry(conv))
    aligned = link.align(input, conv(input))
    shift = 0 if padding == "same" else math.ceil((kernel - 1) / 2)
    height, width = aligned.shape[2:]
    assert torch.equal(aligned, input[:, :, shift : shift + height, shift : shift + width])


@pytest.mark.parametrize(("kernel", "stride", "padding", "extra"), [(2, 2, 0, 0), (3, 2, 1, 1)])
def test_transposed_repeats_pixels(kernel: int, stride: int, padding: int, extra: int) -> None:
    conv = nn.ConvTranspose2d(3, 3, kernel, stride, padding, output_padding=extra)
    input = torch.randn(1, 3, 4, 5)
    aligned = ElasticLink(link_geometry(conv)).align(input, conv(input))
    for row in range(aligned.shape[2]):
        for column in range(aligned.shape[3]):
            assert torch.equal(aligned[:, :, row, column], input[:, :, row // 2, column // 2])


def test_gate_is_output_plus_gamma_times_aligned() -> None:
    conv = nn.Conv2d(6, 4, 3, stride=2, padding=1)
    input = torch.randn(2, 6, 5, 5)
    output = conv(input)
    link = ElasticLink(link_geometry(conv), LinkOptions(gamma_init=0.5))
    with torch.no_grad():
        link.gamma.copy_(torch.tensor([0.0, 1.0, -2.0, 0.5]))  # type: ignore[union-attr]
    expected = output + torch.tensor([0.0, 1.0, -2.0, 0.5]).view(1, 4, 1, 1) * link.align(
        input, output
    )
    assert torch.allclose(link(input, output), expected)


@pytest.mark.parametrize(("gamma", "count"), [("channel", 5), ("scalar", 1), ("fixed", 0)])
def test_gamma_kinds(gamma: str, count: int) -> None:
    conv = nn.Conv2d(5, 5, 1)
    link = ElasticLink(link_geometry(conv), LinkOptions(gamma=gamma, gamma_init=0.25))  # type: ignore[arg-type]
    assert sum(p.numel() for p in link.parameters()) == count
    input, output = torch.randn(1, 5, 2, 2), torch.randn(1, 5, 2, 2)
    assert torch.allclose(link(input, output), output + 0.25 * input)


def test_kinds_are_named() -> None:
    def kinds(conv: nn.Conv2d | nn.ConvTranspose2d) -> tuple[str, str]:
        link = ElasticLink(link_geometry(conv))
        return link.kind, link.spatial_kind

    assert kinds(nn.Conv2d(4, 4, 3, padding=1)) == ("identity", "")
    assert kinds(nn.Conv2d(4, 6, 3)) == ("expand", "cropped")
    assert kinds(nn.Conv2d(6, 4, 1, stride=2)) == ("squeeze", "pooled")
    assert kinds(nn.ConvTranspose2d(6, 4, 2, stride=2)) == ("squeeze", "upsampled")
