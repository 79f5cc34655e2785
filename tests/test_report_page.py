"""A report's page: its figures against the summary and torch; that it is safe and readable."""

from __future__ import annotations

import base64
import configparser
import copy
import hashlib
import html
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from page_reader import Page, Table
from pictures import float_network
from test_observation import SIZE, batches, inputs_of, network
from test_report_colours import palettes
from torch import nn

from el_convert.convert import binarize
from el_convert.errors import ExportError
from el_convert.findings import Findings, examine
from el_convert.nn import OneBitLayer
from el_convert.packing import pack
from el_convert.page import PageTexts, as_page
from el_convert.report import Summary, summarize
from el_convert.reporting import write_report

ROOT = Path(__file__).parents[1]
TEMPLATES = ROOT / "el_convert" / "templates"
TEXTS = PageTexts("a network", "made here", "a note", "some.tar")
ATTACK = '"><img src=x onerror=alert(1)><script>alert(2)</script>'


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network()


@pytest.fixture(scope="module")
def found(model: nn.Module) -> Findings:
    return examine(model, batches(), original=float_network(), input_size=SIZE)


@pytest.fixture(scope="module")
def text(found: Findings) -> str:
    return as_page(found, TEXTS)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def values(table: Table, column: str) -> dict[str, float | None]:
    """The numbers of a column by the layer's name."""
    numbers = {
        row[table.columns[table.columns.index("layer")]][0]: row[column][1] for row in table.rows
    }
    return {name: float(value) if value else None for name, value in numbers.items()}


def test_nothing_is_loaded_from_anywhere(text: str, page: Page) -> None:
    assert not re.search(r"https?://|url\(|@import|//[a-z]", text.split("<script>")[0])
    assert not re.search(r"https?:|fetch|XMLHttp|import\(", text.split("<script>")[1])
    kinds = {tag for tag, _ in page.tags}
    assert not kinds & {"link", "img", "iframe", "object", "base", "form", "video", "audio"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#"), tag


def test_only_its_own_script_may_run(text: str, page: Page) -> None:
    (policy,) = (a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    (script,) = page.texts["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert text.count("<script") == 1


def test_every_layer_with_the_summarys_numbers(page: Page, model: nn.Module) -> None:
    before, after = summarize(float_network(), SIZE), summarize(model, SIZE)
    table = page.tables["layers"]
    columns = {
        "MACs before": [row.float_macs for row in before.layers],
        "1-bit MACs": [row.binary_macs for row in after.layers],
        "OPs after": [row.ops for row in after.layers],
        "bytes before": [row.stored_bytes for row in before.layers],
        "bytes after": [row.packed_bytes for row in after.layers],
    }
    for column, numbers in columns.items():
        assert values(table, column) == dict(
            zip((r.path for r in after.layers), numbers, strict=True)
        )
    kinds = [row["kind"][0] for row in table.rows]
    assert kinds == [row.kind for row in after.layers]
    strip = [a for t, a in page.tags if t == "a" and a.get("class", "").startswith("column")]  # type: ignore[union-attr]
    assert [a["href"] for a in strip] == [f"#layer-{i}" for i in range(len(after.layers))]
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert {str(a["href"])[1:] for a in strip} <= ids
    for attributes, row in zip(strip, after.layers, strict=True):
        assert str(attributes["aria-label"]).startswith(f"{row.path}: {row.kind}")


def test_the_parts_add_up_to_the_totals(page: Page, found: Findings) -> None:
    rows = page.tables["where"].rows

    def total(column: str) -> float:
        return sum(float(row[column][1] or 0) for row in rows)

    assert total("MACs before") == found.before.float_macs
    assert total("OPs after") == found.after.ops
    assert total("bytes before") == found.before.stored_bytes
    assert total("bytes after") == found.after.packed_bytes


def test_the_headline(page: Page, found: Findings) -> None:
    words = page.texts["dd"]
    assert f"{found.before.stored_bytes / found.after.packed_bytes:.1f}\u00d7" in words
    assert f"{(found.before.float_macs or 0) / (found.after.ops or 1):.1f}\u00d7" in words
    assert "in float: conv1 (reads-image), 1 linear layer" in words
    assert str(len(found.after.binarized)) in words
    assert page.texts["h1"] == ["a network"]
    assert "a note" in page.text


def test_what_was_kept_and_why(page: Page, found: Findings) -> None:
    (row,) = page.tables["kept"].rows
    (kept,) = found.after.kept
    assert (row["layer"][0], row["rule"][0]) == (kept.path, kept.pattern)
    assert f"(1): {kept.reason}" in " ".join(page.texts["li"])


def test_many_kept_layers_share_their_reason() -> None:
    model = timm.create_model("mobilenetv3_small_050", num_classes=3)
    found = examine(binarize(model), input_size=(3, 64, 64))
    page = Page(as_page(found, TEXTS))
    kept = [layer for layer in found.layers if layer.after.action == "keep"]
    assert [row["layer"][0] for row in page.tables["kept"].rows] == [one.path for one in kept]
    assert len(kept) > 10
    for rule in {one.after.pattern for one in kept}:
        assert page.texts["b"].count(rule) == 1
    assert "blocks.3" in page.texts["span"]  # all but a few layers are in "blocks"


def test_signs_are_those_of_hooks(page: Page, model: nn.Module) -> None:
    shown = page.tables["signs"]
    for path, value in inputs_of(model, OneBitLayer).items():
        share = (value > 0).double().mean((0, 2, 3))
        for column, quantile in (("10 %", 0.1), ("median", 0.5), ("90 %", 0.9)):
            expected = float(torch.quantile(share, quantile))
            assert values(shown, column)[path] == pytest.approx(expected)


def test_gates_are_torchs_statistics(page: Page, model: nn.Module) -> None:
    shown = page.tables["gates"]
    gammas = {n.removesuffix(".link.gamma"): p for n, p in model.named_parameters() if "gamma" in n}
    assert len(gammas) == len(shown.rows)
    for path, gamma in gammas.items():
        value = gamma.detach().double()
        assert values(shown, "10 %")[path] == pytest.approx(float(value.quantile(0.1)))
        assert values(shown, "median")[path] == pytest.approx(float(value.quantile(0.5)))
        assert values(shown, "median / start")[path] == pytest.approx(
            float(value.quantile(0.5)) / 3
        )


def test_agreement_of_each_layer(page: Page, found: Findings) -> None:
    shown = page.tables["agreement"]
    assert found.observed is not None
    expected = {layer.path: layer.difference for layer in found.observed.layers}
    assert values(shown, "alone: difference") == expected
    assert set(values(shown, "in the network: other signs").values()) == {0.0}
    assert "both networks say the same class for 11" in page.text


def test_names_cannot_inject() -> None:
    model = nn.Sequential()
    names = [ATTACK.replace(".", ""), "<b>x", "{{ 7 * 7 }}"]
    for width, name in zip((3, 4, 4), names, strict=True):
        model.add_module(name, nn.Conv2d(width, 4, 1))
    found = examine(binarize(model), input_size=(3, 8, 8))
    page = Page(as_page(found, PageTexts(ATTACK, ATTACK, ATTACK, ATTACK)))
    kinds = [tag for tag, _ in page.tags]
    assert kinds.count("script") == 1
    assert "img" not in kinds
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert [row["layer"][0] for row in page.tables["layers"].rows] == names
    assert [row["layer"][1] for row in page.tables["layers"].rows] == names
    assert page.texts["h1"] == [ATTACK]


def test_without_images_the_page_says_so(model: nn.Module) -> None:
    page = Page(as_page(examine(model, input_size=SIZE), TEXTS))
    assert set(page.tables) == {"where", "kept", "gates", "layers"}
    left_out = [words for words in page.texts["p"] if "--data DIR" in words]
    assert len(left_out) == 2
    assert "link's power" not in page.tables["gates"].columns


def test_without_an_input_size_only_bytes() -> None:
    found = examine(binarize(float_network()), input_size=())
    page = Page(as_page(found, TEXTS))
    assert found.cheaper is None
    assert "bytes after" in page.tables["layers"].columns
    assert "OPs after" not in page.tables["layers"].columns
    assert "fewer operations" not in page.text


@pytest.mark.filterwarnings("ignore:the model looks untrained")
def test_packed_networks_and_those_without_links() -> None:
    packed = as_page(examine(pack(network()), batches(), input_size=SIZE), TEXTS)
    assert "packed already" in packed
    assert "signs" in Page(packed).tables
    plain = Page(as_page(examine(network("plain"), input_size=SIZE), TEXTS))
    assert "The recipe plain has no links." in plain.text
    assert "fixes it at 1" in as_page(examine(network("bi-real"), input_size=SIZE), TEXTS)
    identity = examine(network("identity"), batches(), input_size=SIZE)
    assert "No layer of it can be packed." in as_page(identity, TEXTS)


def test_what_is_not_finite_is_said(model: nn.Module) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.layer1[0].conv1.link.gamma.fill_(float("nan"))  # type: ignore[index, union-attr, operator]
    text = as_page(examine(broken, batches(), input_size=SIZE), TEXTS)
    assert "not finite" in text
    assert 'data-v="nan"' not in text
    Page(text)


def test_a_page_depends_on_the_network_alone(text: str, found: Findings) -> None:
    assert as_page(found, TEXTS) == text
    assert str(ROOT) not in text
    assert len(text) < 300_000


def test_tables_are_sorted_by_buttons(page: Page) -> None:
    heads = [a for t, a in page.tags if t == "th" and a.get("scope") == "col"]
    sortable = [a for a in heads if a.get("aria-sort") == "none"]
    assert len(sortable) == len([1 for t, _ in page.tags if t == "button"])
    assert len(heads) - len(sortable) == 2  # the columns of histograms


def test_the_function_writes_it(tmp_path: Path, model: nn.Module) -> None:
    found = write_report(model, tmp_path / "r.html", batches(), input_size=SIZE)
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.texts["h1"] == ["timm/resnet18, binarized"]
    assert isinstance(found.after, Summary)
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_figures(tmp_path: Path, model: nn.Module) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "figures"
    write_report(model, tmp_path / "r.html", batches(), input_size=SIZE, figures=folder)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["gates.png", "layers.png", "signs.png", "where.png"]
    for path in folder.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    few = tmp_path / "few"
    write_report(network("plain"), tmp_path / "r.html", input_size=(), figures=few)
    assert sorted(path.name for path in few.iterdir()) == ["layers.png", "where.png"]


def test_figures_without_matplotlib(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"matplotlib.*pip install 'el_convert\[report\]'"):
        write_report(model, tmp_path / "r.html", input_size=SIZE, figures=tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_nowhere_to_write(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(ExportError, match="its folder does not exist"):
        write_report(model, tmp_path / "a" / "r.html", input_size=SIZE)
    with pytest.raises(ExportError, match="can be no folder"):
        write_report(model, tmp_path / "r.html", input_size=SIZE, figures=tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_templates_are_installed() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    globs = [g.strip() for g in config["options.package_data"]["el_convert"].split(",")]
    installed = {path for glob in globs for path in (ROOT / "el_convert").glob(glob)}
    assert set(TEMPLATES.iterdir()) <= installed
    assert len(installed & set(TEMPLATES.iterdir())) == 3


# In a browser, if there is one: in a frame as wide as a phone, whose own policy is in force.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PROBE = """<!DOCTYPE html>
<iframe id="f" style="width:390px;height:844px;border:0" srcdoc="%s"></iframe>
<pre id="out"></pre><script>
document.getElementById("f").onload = () => {
  const page = document.getElementById("f").contentDocument, out = {};
  const table = page.querySelector("[aria-labelledby=layers] table");
  const head = [...table.tHead.rows[0].cells].find((cell) => cell.textContent === "bytes after");
  const place = head.cellIndex;
  const look = () => ({ sort: head.getAttribute("aria-sort"),
    values: [...table.tBodies[0].rows].map((row) => Number(row.cells[place].dataset.v)) });
  out.width = page.documentElement.scrollWidth;
  head.firstChild.click(); out.first = look();
  head.firstChild.click(); out.second = look();
  const columns = page.querySelectorAll(".strip a.column");
  columns[0].focus();
  const key = new page.defaultView.KeyboardEvent("keydown", { key: "End", bubbles: true });
  columns[0].dispatchEvent(key);
  out.focused = page.activeElement.getAttribute("aria-label");
  out.readout = page.getElementById("readout").textContent;
  out.stops = [...columns].filter((column) => column.tabIndex === 0).length;
  const bars = [...page.querySelectorAll(".strip .bar")].map((bar) => bar.getBoundingClientRect());
  out.narrowest = Math.min(...bars.map((bar) => bar.width));
  document.getElementById("out").textContent = JSON.stringify(out);
};
</script>"""


def browse(folder: Path, *words: str) -> str:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=10000", *words],
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["small", pytest.param("densenet121", marks=pytest.mark.slow)])
def test_in_a_browser(tmp_path: Path, text: str, found: Findings, name: str) -> None:
    if name == "densenet121":  # 120 convolutions, so that the strip has to scroll in its box
        large = timm.create_model("densenet121", num_classes=10)
        found = examine(binarize(large), input_size=SIZE)
        text = as_page(found, TEXTS)
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE % html.escape(text, quote=True), encoding="utf-8")
    dom = browse(tmp_path / "profile", "--dump-dom", f"file://{probe}")
    (result,) = re.findall(r'<pre id="out">(.+?)</pre>', dom)
    seen = json.loads(html.unescape(result))
    sizes = sorted(layer.after.packed_bytes for layer in found.layers)
    assert seen["width"] <= 390
    assert seen["first"] == {"sort": "descending", "values": sizes[::-1]}
    assert seen["second"] == {"sort": "ascending", "values": sizes}
    assert seen["focused"] == seen["readout"]
    assert seen["readout"].startswith(f"{found.layers[-1].path}: linear")
    assert seen["stops"] == 1
    assert seen["narrowest"] >= 3


def test_a_screenshot(tmp_path: Path, text: str) -> None:
    from PIL import Image

    page, picture = tmp_path / "r.html", tmp_path / "r.png"
    page.write_text(text, encoding="utf-8")
    size = ("--window-size=1200,900", "--hide-scrollbars")
    browse(tmp_path / "profile", *size, f"--screenshot={picture}", f"file://{page}")
    with Image.open(picture) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    hexes = {"#{:02x}{:02x}{:02x}".format(*colour) for colour in colours}
    light, dark = palettes()["light"], palettes()["dark"]
    expected = light if light["ground"] in hexes else dark
    assert {expected[name] for name in ("ground", "surface", "ink", "one-bit", "linear")} <= hexes
