"""The summary against hand arithmetic, torch's own counter, and its renderings."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
import timm
import torch
from models import BY_NAME
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from el_convert.convert import binarize
from el_convert.errors import ConversionError
from el_convert.render import big_number, byte_size
from el_convert.report import Summary, summarize


@pytest.fixture(scope="module")
def resnet18() -> Summary:
    return summarize(binarize(timm.create_model("resnet18")))


# ResNet-18 at 224 pixels, from its paper: (blocks' convolutions, side, inputs, outputs, kernel).
STEM = 112 * 112 * 64 * 3 * 7 * 7
BINARY = [
    *[(56, 64, 64, 3)] * 4,
    (28, 64, 128, 3),
    *[(28, 128, 128, 3)] * 3,
    (28, 64, 128, 1),
    (14, 128, 256, 3),
    *[(14, 256, 256, 3)] * 3,
    (14, 128, 256, 1),
    (7, 256, 512, 3),
    *[(7, 512, 512, 3)] * 3,
    (7, 256, 512, 1),
]
CLASSIFIER = 512 * 1000


def test_operations_by_hand(resnet18: Summary) -> None:
    binary = sum(side * side * inputs * outputs * k * k for side, inputs, outputs, k in BINARY)
    assert resnet18.float_macs == STEM + CLASSIFIER
    assert resnet18.binary_macs == binary
    assert resnet18.ops == STEM + CLASSIFIER + binary / 64
    assert resnet18.link_macs == sum(side * side * outputs for side, _, outputs, _ in BINARY)


def test_bytes_by_hand(resnet18: Summary) -> None:
    weights = [inputs * outputs * k * k for _, inputs, outputs, k in BINARY]
    gates = sum(outputs for _, _, outputs, _ in BINARY)
    norms = (64 + gates) * 4 * 4 + 20 * 8  # scale, shift, mean, variance; an 8-byte counter
    slopes = (64 + sum(outputs for _, _, outputs, k in BINARY if k == 3) - 512) * 4
    float_rest = 64 * 3 * 7 * 7 * 4 + (CLASSIFIER + 1000) * 4
    assert resnet18.other_bytes == norms + slopes
    assert resnet18.stored_bytes == 4 * sum(weights) + 4 * gates + float_rest + norms + slopes
    packed = sum(weight // 8 for weight in weights) + 2 * 4 * gates  # a scale beside each gate
    assert resnet18.packed_bytes == packed + float_rest + norms + slopes


def test_counts_and_rows(resnet18: Summary) -> None:
    assert (len(resnet18.convolutions), len(resnet18.binarized), len(resnet18.kept)) == (20, 19, 1)
    rows = {layer.path: layer for layer in resnet18.layers}
    assert rows["conv1"].pattern == "reads-image"
    assert rows["layer1.0.conv1"].link == "identity"
    assert rows["layer2.0.downsample.0"].link == "expand, pooled"
    assert rows["layer2.0.conv1"].output == (128, 28, 28)
    assert rows["fc"].kind == "linear"


def test_stored_bytes_are_the_state_dict() -> None:
    model = binarize(timm.create_model("mobilenetv1_100"))
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert summarize(model).stored_bytes == size


@pytest.mark.parametrize(
    "name", ["timm/mobilenetv3_large_100", "torchvision/googlenet", "torchvision/densenet121"]
)
def test_float_macs_are_torchs_count(name: str) -> None:
    model = BY_NAME[name].build().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 96, 96))
    summary = summarize(model, (3, 96, 96))
    assert summary.float_macs == counter.get_total_flops() / 2
    assert summary.binary_macs == 0
    assert summary.recipe == ""
    converted = summarize(binarize(model), (3, 96, 96))
    assert (converted.float_macs or 0) + (converted.binary_macs or 0) == summary.float_macs


def test_transposed_macs_are_torchs_count() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2), nn.Conv2d(6, 2, 1)
    )
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 5, 5))
    assert summarize(model, (3, 5, 5)).float_macs == counter.get_total_flops() / 2


def test_the_model_is_left_alone() -> None:
    model = timm.create_model("resnet18").train()
    mean = model.bn1.running_mean.clone()
    state = torch.get_rng_state()
    summarize(model)
    assert model.training
    assert model.bn1.running_mean.equal(mean)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())


def test_without_a_known_input_only_bytes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    summary = summarize(binarize(model))
    assert summary.ops is None
    assert summary.input_size is None
    assert "MACs" not in str(summary)
    assert "OPs" in str(summarize(binarize(model), (3, 9, 9)))


def test_a_wrong_input_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"does not run on an input of \(1, 5, 8, 8\).*pass"):
        summarize(nn.Sequential(nn.Conv2d(3, 8, 3)), (5, 8, 8))


def test_text_is_plain_and_unfolded(resnet18: Summary) -> None:
    text = str(resnet18)
    assert "\x1b" not in text
    assert text.isascii()
    assert "19 of 20 convolutions binarized, 1 kept" in text
    assert "kept, reads-image: conv1: it reads the image" in text
    (row,) = (line for line in text.splitlines() if line.startswith("|layer2.0.downsample.0"))
    assert [cell.strip() for cell in row.strip("|").split("|")][1:5] == [
        "conv 1x1",
        "binarize",
        "expand, pooled",
        "128x28x28",
    ]


def test_rich_has_colours_and_everything(resnet18: Summary) -> None:
    console = Console(force_terminal=True, width=160, color_system="truecolor")
    with console.capture() as capture:
        console.print(resnet18)
    text = capture.get()
    assert "\x1b[" in text
    assert all(layer.path in text for layer in resnet18.layers)


@pytest.mark.parametrize("width", [72, 80, 100, 120, 140, 200])
def test_columns_are_dropped_rather_than_cut(resnet18: Summary, width: int) -> None:
    console = Console(force_terminal=True, width=width, color_system=None)
    with console.capture() as capture:
        console.print(resnet18)
    text = capture.get()
    assert "\u2026" not in text
    assert max(map(len, text.splitlines())) <= width
    assert all(name in text for name in ("layer", "action", "OPs", "packed"))
    assert ("stored" in text.splitlines()[2]) == (width >= 140)


class Cells(HTMLParser):
    """Collects the text of a table and checks that tags nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.rows += tag == "tr"
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_well_formed(resnet18: Summary) -> None:
    page = resnet18._repr_html_()
    cells = Cells()
    cells.feed(page)
    assert cells.open == []
    assert cells.rows == len(resnet18.layers) + 1
    assert "its few channels" not in page


def test_html_escapes_names() -> None:
    model = nn.Sequential()
    model.add_module("<b>", nn.Conv2d(3, 4, 1))
    page = summarize(model)._repr_html_()
    assert "<b><" not in page
    assert "&lt;b&gt;" in page


def test_json_has_the_totals(resnet18: Summary) -> None:
    data = json.loads(json.dumps(resnet18.to_dict()))
    assert data["total"]["ops"] == resnet18.ops
    assert sum(layer["ops"] for layer in data["layers"]) == pytest.approx(resnet18.ops)
    assert data["layers"][0]["reason"].startswith("it reads the image")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0, "0"), (999, "999"), (1000, "1 k"), (1.5e6, "1.5 M"), (1.81e9, "1.81 G")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert big_number(value) == text


def test_byte_sizes() -> None:
    assert [byte_size(n) for n in (0, 999, 1000, 102_500_000)] == ["0 B", "999 B", "1 kB", "102 MB"]
