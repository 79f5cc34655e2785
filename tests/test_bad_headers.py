"""Whatever a file's header claims, it is believed only as far as it fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tampering import (
    CONVERTED,
    Change,
    add,
    content_of,
    drop,
    float_model,
    layer,
    put,
    refusal,
    rewrite,
    write_good,
)

from el_convert import CheckpointError, load

NAN, INFINITE = float("nan"), float("inf")
KEPT = {"path": "layer9.conv", "pattern": "reads-image", "reason": ""}
SWAP = {"action": "replace", "replacement": "identity", "channels": 1, "reason": ""}


def renamed(data: dict[str, Any]) -> None:
    layer("path", "layer2.0.conv7")(data)


def conv_twice(data: dict[str, Any]) -> None:
    data["layers"].append(data["layers"][0])


def conv_in_both_lists(data: dict[str, Any]) -> None:
    record = data["layers"][0]
    data["kept"].append({name: record[name] for name in ("path", "pattern", "reason")})


def stride(data: dict[str, Any]) -> None:
    (record,) = [record for record in data["layers"] if record["path"] == CONVERTED]
    record["geometry"][4] = [4, 4]


FORMAT: dict[str, tuple[Change, str]] = {
    "newer": (put(2, "format"), "newer el_convert.*upgrade"),
    "newer with fields of its own": (
        lambda data: data.update(format=7, layout="x"),
        "newer el_convert.*upgrade",
    ),
    "missing": (drop("format"), "format is None"),
    "true": (put(True, "format"), "format is True"),
    "text": (put("1", "format"), "format is '1'"),
    "fraction": (put(1.0, "format"), r"format is 1\.0"),
    "zero": (put(0, "format"), "format is 0"),
    "negative": (put(-1, "format"), "format is -1"),
    "null": (put(None, "format"), "format is None"),
    "packed": (put(True, "packed"), "59 missing, first .*norm_scale"),
    "packed as text": (put("false", "packed"), "packed is 'false'"),
    "unknown field": (put(1, "surprise"), "surprise"),
    "missing field": (drop("recipe"), "recipe"),
    "dtype": (put("int8", "dtype"), "int8"),
    "dtype of a class": (put("Tensor", "dtype"), "Tensor"),
    "dtype the tensors lack": (put("float16", "dtype"), "float16.*float32"),
    "created_with": (put({"torch": 2}, "created_with"), "created_with"),
}
LAYERS: dict[str, tuple[Change, str]] = {
    "renamed": (renamed, r"layer2\.0\.conv7.* is no convolution"),
    "a linear layer": (layer("path", "fc"), "'fc' is no convolution"),
    "the model itself": (layer("path", ""), "is no convolution"),
    "wrong geometry": (stride, rf"{CONVERTED}.*the file says.*\[4, 4\]"),
    "no geometry": (layer("geometry", None), "geometry"),
    "twice": (conv_twice, "twice"),
    "converted and kept": (conv_in_both_lists, "twice"),
    "path is no text": (layer("path", ["x"]), "layers"),
    "layers is no list": (put({}, "layers"), "layers"),
    "a layer is no object": (add("conv1", "layers"), "layers"),
    "kept is no list": (put(None, "kept"), "kept"),
    "unknown pattern": (layer("pattern", "nobody's"), "nobody's.*register_pattern"),
    "a pattern that keeps": (layer("pattern", "reads-image"), "reads-image.*does not binarize"),
    "named by keep=": (layer("pattern", "named"), "named"),
    "norm": (layer("norm", "fc"), "'fc' is no norm"),
    "norm that is not there": (layer("norm", "nowhere"), "'nowhere' is no norm"),
    "unknown field": (layer("surprise", 1), "surprise"),
    "kept and not there": (add(KEPT, "kept"), r"layer9\.conv"),
    "convolution not mentioned": (put([], "kept"), r"conv1\.0"),
}
SOURCE: dict[str, tuple[Change, str]] = {
    "hf-hub": (put("hf-hub:x/y", "source", "name"), "hf-hub:x/y.*not the name"),
    "local-dir": (put("local-dir:/x", "source", "name"), "local-dir:/x.*not the name"),
    "folder above": (put("../x", "source", "name"), r"\.\./x.*not the name"),
    "backslash": (put("..\\x", "source", "name"), "not the name"),
    "with its library": (put("timm/resnet18", "source", "name"), "timm/resnet18.*not the name"),
    "not registered": (put("test_resne", "source", "name"), "timm/test_resne is not registered"),
    "name is no text": (put(3, "source", "name"), "not the name"),
    "unknown library": (put("transformers", "source", "library"), "transformers"),
    "other library": (put("torchvision", "source", "library"), "not registered"),
    "checkpoint_path": (put("/x", "source", "kwargs", "checkpoint_path"), "checkpoint_path"),
    "pretrained": (put(True, "source", "kwargs", "pretrained"), "pretrained"),
    "pretrained_cfg": (put({}, "source", "kwargs", "pretrained_cfg"), "pretrained_cfg"),
    "classes as text": (put("4", "source", "kwargs", "num_classes"), "num_classes must be int"),
    "classes as bool": (put(True, "source", "kwargs", "num_classes"), "num_classes must be int"),
    "classes below 0": (put(-1, "source", "kwargs", "num_classes"), "between 0"),
    "absurd classes": (put(10**12, "source", "kwargs", "num_classes"), "between 0"),
    "classes it lacks": (put(999_999, "source", "kwargs", "num_classes"), "999999 classes"),
    "default classes": (drop("source", "kwargs", "num_classes"), r"fc\.weight.*\[1000, 96\]"),
    "pooling": (put("sideways", "source", "kwargs", "global_pool"), "sideways"),
    "NaN dropout": (put(NAN, "source", "kwargs", "drop_rate"), "drop_rate"),
    "dropout above 1": (put(5.0, "source", "kwargs", "drop_rate"), "drop_rate"),
    "unknown field": (put(1, "source", "surprise"), "surprise"),
    "kwargs is no object": (put([], "source", "kwargs"), "source"),
    "not an object": (put("timm/test_resnet", "source"), "source"),
    "null": (put(None, "source"), r"load\(path, model=\.\.\.\)"),
}
RECIPE: dict[str, tuple[Change, str]] = {
    "unknown field": (put(1, "recipe", "link", "gama"), r"link\.gama.*did you mean"),
    "unknown group": (put({"x": 1}, "recipe", "links"), "links"),
    "unknown empty group": (put({}, "recipe", "links"), "links"),
    "unknown value": (put("nowhere", "recipe", "link", "place"), r"link\.place.*nowhere"),
    "number as text": (put("0.5", "recipe", "link", "gamma_init"), "gamma_init"),
    "NaN": (put(NAN, "recipe", "link", "gamma_init"), "gamma_init.*finite"),
    "infinite": (put(INFINITE, "recipe", "activation", "slope"), "slope.*finite"),
    "huge number": (put(10**400, "recipe", "link", "gamma_init"), "gamma_init"),
    "list": (put(["mean"], "recipe", "weight", "scale"), r"weight\.scale"),
    "bool for a choice": (put(True, "recipe", "training", "steps"), "steps"),
    "name": (put(3, "recipe", "name"), "name"),
    "not an object": (put("elastic-link", "recipe"), "recipe"),
    "switched off": (put(False, "recipe", "link", "enabled"), "link.gamma"),
}
ACTIVATIONS: dict[str, tuple[Change, str]] = {
    "huge": (put(10**12, "activations", 0, "channels"), "no number of channels"),
    "large": (put(1 << 20, "activations", 0, "channels"), r"\[1048576\]"),
    "negative": (put(-1, "activations", 0, "channels"), "no number of channels"),
    "bool": (put(True, "activations", 0, "channels"), "no number of channels"),
    "action": (put("explode", "activations", 0, "action"), "explode"),
    "replacement": (put("Bomb", "activations", 0, "replacement"), "Bomb"),
    "kind": (put("GELU", "activations", 0, "kind"), "is no GELU"),
    "path": (put("layer9", "activations", 0, "path"), "'layer9' is no ReLU"),
    "unknown field": (put(1, "activations", 0, "surprise"), "surprise"),
    "no object": (put("x", "activations", 0), "activations"),
    "of what is none": (
        add({"path": "maxpool", "kind": "MaxPool2d", **SWAP}, "activations"),
        "maxpool",
    ),
}
INPUT: dict[str, tuple[Change, str]] = {
    "NaN size": (put([3, NAN, 160], "input", "size"), "size"),
    "NaN mean": (put([NAN, 0.5, 0.5], "input", "mean"), "mean"),
    "infinite std": (put([0.5, INFINITE, 0.5], "input", "std"), "std"),
    "no number": (put([3, "160", 160], "input", "size"), "size"),
    "bool": (put([3, True, 160], "input", "size"), "size"),
    "zero size": (put([3, 0, 160], "input", "size"), "size"),
    "huge size": (put([3, 10**9, 10**9], "input", "size"), "size"),
    "too many": (put([1] * 99, "input", "size"), "size"),
    "unknown field": (put(1, "input", "surprise"), "input"),
    "not an object": (put(224, "input"), "input"),
}
# Classes of convolution the layer is not: the builder of the pattern would not fit it.
MISFITS = ["conv1d", "conv3d", "conv-transpose2d", "std-conv2d", "scaled-std-conv2d"]
TEXTS = {
    "not JSON": ("elastic", "damaged"),
    "empty": ("", "damaged"),
    "half": ('{"format": 1, "source"', "damaged"),
    "nested": ("[" * 100_000, "nested|damaged"),
    "nested objects": ('{"a":' * 100_000, "nested|damaged"),
    "endless number": ('{"format": ' + "9" * 10_000 + "}", "damaged"),
    "list": ("[1]", "not an object"),
    "number": ("1", "not an object"),
    "null": ("null", "not an object"),
}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2, 600).map(lambda digits: 10**digits)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["conv1d", "named", "layer1", "fc", "", "float64", "after-norm"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_good(tmp_path_factory.mktemp("good"))


def test_the_good_file_loads(good: Path, tmp_path: Path) -> None:
    load(good)
    load(rewrite(good, tmp_path / "same.pt"))
    load(rewrite(good, tmp_path / "same.safetensors"))


@pytest.mark.parametrize(("change", "match"), FORMAT.values(), ids=FORMAT)
def test_format(good: Path, tmp_path: Path, change: Change, match: str) -> None:
    refusal(rewrite(good, tmp_path / "bad.pt", change), match=match)


@pytest.mark.parametrize(("change", "match"), LAYERS.values(), ids=LAYERS)
def test_layers(good: Path, tmp_path: Path, change: Change, match: str) -> None:
    refusal(rewrite(good, tmp_path / "bad.pt", change), match=match)


@pytest.mark.parametrize(("change", "match"), SOURCE.values(), ids=SOURCE)
def test_source(good: Path, tmp_path: Path, change: Change, match: str) -> None:
    refusal(rewrite(good, tmp_path / "bad.pt", change), match=match)


@pytest.mark.parametrize(("change", "match"), RECIPE.values(), ids=RECIPE)
def test_recipe(good: Path, tmp_path: Path, change: Change, match: str) -> None:
    refusal(rewrite(good, tmp_path / "bad.pt", change), match=match)


@pytest.mark.parametrize(("change", "match"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations(good: Path, tmp_path: Path, change: Change, match: str) -> None:
    refusal(rewrite(good, tmp_path / "bad.pt", change), match=match)


@pytest.mark.parametrize(("change", "match"), INPUT.values(), ids=INPUT)
def test_input(good: Path, tmp_path: Path, change: Change, match: str) -> None:
    refusal(rewrite(good, tmp_path / "bad.pt", change), match=match)


@pytest.mark.parametrize("pattern", MISFITS)
def test_a_pattern_of_another_kind_of_convolution(good: Path, tmp_path: Path, pattern: str) -> None:
    refusal(rewrite(good, tmp_path / "bad.pt", layer("pattern", pattern)), match=CONVERTED)


@pytest.mark.parametrize(("text", "match"), TEXTS.values(), ids=TEXTS)
def test_a_header_that_is_no_json_object(good: Path, tmp_path: Path, text: str, match: str) -> None:
    _, state = content_of(good)
    torch.save({"el_convert": text, "state_dict": state}, tmp_path / "bad.pt")
    refusal(tmp_path / "bad.pt", match=match)


@pytest.mark.parametrize("value", [None, 1, {"format": 1}, b"{}", torch.zeros(2)])
def test_a_header_that_is_no_text(good: Path, tmp_path: Path, value: object) -> None:
    _, state = content_of(good)
    torch.save({"el_convert": value, "state_dict": state}, tmp_path / "bad.pt")
    refusal(tmp_path / "bad.pt", match="not text")


def test_the_model_brought_along_is_checked_as_well(good: Path, tmp_path: Path) -> None:
    stranger = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
    refusal(good, model=stranger, match=r"conv1\.3.*is no convolution of Sequential")
    path = rewrite(good, tmp_path / "anonymous.pt", put(None, "source"))
    load(path, model=float_model())


def places(data: Any, *keys: Any) -> list[tuple[Any, ...]]:
    """Every way down into nested data."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data)
    found = []
    for key, value in pairs:
        found.append((*keys, key))
        if isinstance(value, (dict, list)):
            found.extend(places(value, *keys, key))
    return found


@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_any_value_anywhere_is_refused_or_harmless(good: Path, data: st.DataObject) -> None:
    header, state = content_of(good)
    put(data.draw(VALUES), *data.draw(st.sampled_from(places(header))))(header)
    path = good.with_name("fuzzed.pt")
    torch.save({"el_convert": json.dumps(header), "state_dict": state}, path)
    try:
        load(path)
    except CheckpointError as error:
        assert "fuzzed.pt" in str(error)
