"""Damaged, foreign and hostile files are refused; nothing is run and nothing half-loaded."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tampering import (
    SHAPE_OF_HEAD,
    Bomb,
    Change,
    content_of,
    drop,
    float_model,
    layer,
    put,
    refusal,
    rewrite,
    unchanged,
    write_good,
)
from torch import Tensor, nn

from el_convert import CheckpointError, binarize, load

SUFFIXES = (".pt", ".safetensors")
BIAS, HEAD = "fc.bias", "fc.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_good(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def good_safe(good: Path) -> Path:
    return rewrite(good, good.with_suffix(".safetensors"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_such_file(tmp_path: Path, suffix: str) -> None:
    refusal(tmp_path / f"nowhere{suffix}", match="no such file")
    (tmp_path / f"folder{suffix}").mkdir()
    refusal(tmp_path / f"folder{suffix}")


@pytest.mark.parametrize("name", ["bnn.bin", "bnn", "bnn.pt.gz", "bnn.PT", ".pt"])
def test_another_suffix(good: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(good.read_bytes())
    refusal(tmp_path / name, match=r"must end in \.pt or \.safetensors")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "content", [b"", b"\0", b"PK\x03\x04", b"el_convert", b"\xff" * 4096, b"{" * 4096]
)
def test_no_file_of_any_format(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"bad{suffix}").write_bytes(content)
    refusal(tmp_path / f"bad{suffix}", match="damaged|no file of el_convert")


def test_each_format_under_the_others_name(good: Path, good_safe: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(good.read_bytes())
    refusal(tmp_path / "bad.safetensors", match="no file of el_convert")
    (tmp_path / "bad.pt").write_bytes(good_safe.read_bytes())
    refusal(tmp_path / "bad.pt", match="no file of el_convert")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("part", [0.0001, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.9999])
def test_truncated(good: Path, tmp_path: Path, good_safe: Path, suffix: str, part: float) -> None:
    raw = (good if suffix == ".pt" else good_safe).read_bytes()
    (tmp_path / f"bad{suffix}").write_bytes(raw[: int(len(raw) * part)])
    refusal(tmp_path / f"bad{suffix}", match="damaged")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_last_byte_is_missing(good: Path, tmp_path: Path, good_safe: Path, suffix: str) -> None:
    raw = (good if suffix == ".pt" else good_safe).read_bytes()
    (tmp_path / f"bad{suffix}").write_bytes(raw[:-1])
    refusal(tmp_path / f"bad{suffix}", match="damaged")


def test_a_safetensors_header_longer_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refusal(tmp_path / "bad.safetensors", match="damaged")


def load_or_refuse(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    try:
        load(path)
    except CheckpointError as error:
        assert path.name in str(error)


def header_area(raw: bytes) -> range:
    """Where the JSON header and the names, shapes and types of the tensors are."""
    start = raw.index(b'"format"') if b'"format"' in raw else raw.index(b'\\"format\\"')
    return range(start - 64, start + 16_000)


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(deadline=None, derandomize=True, max_examples=40)
@given(data=st.data())
def test_one_wrong_byte(good: Path, good_safe: Path, suffix: str, data: st.DataObject) -> None:
    raw = bytearray((good if suffix == ".pt" else good_safe).read_bytes())
    where = data.draw(st.sampled_from(header_area(bytes(raw))) | st.integers(0, len(raw) - 1))
    raw[where] ^= data.draw(st.integers(1, 255))
    load_or_refuse(good.with_name(f"flipped{suffix}"), bytes(raw))


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(deadline=None, derandomize=True, max_examples=25)
@given(data=st.data())
def test_a_wrong_piece(good: Path, good_safe: Path, suffix: str, data: st.DataObject) -> None:
    raw = (good if suffix == ".pt" else good_safe).read_bytes()
    start = data.draw(st.sampled_from(header_area(raw)) | st.integers(0, len(raw)))
    end = start + data.draw(st.integers(0, 2_000))
    piece = data.draw(st.binary(max_size=200))
    load_or_refuse(good.with_name(f"spliced{suffix}"), raw[:start] + piece + raw[end:])


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(deadline=None, derandomize=True, max_examples=40)
@given(raw=st.binary(max_size=300))
def test_random_bytes(good: Path, suffix: str, raw: bytes) -> None:
    load_or_refuse(good.with_name(f"random{suffix}"), raw)


def foreign(good: Path) -> dict[str, Any]:
    header, state = content_of(good)
    text = json.dumps(header)
    return {
        "state_dict": state,
        "training checkpoint": {"model": state, "optimizer": {"lr": 0.1}, "epoch": 3},
        "timm checkpoint": {"state_dict": state, "arch": "test_resnet"},
        "tensor": torch.zeros(3),
        "list": [text, state],
        "number": 3,
        "no tensors": {"el_convert": text},
        "more than both": {"el_convert": text, "state_dict": state, "epoch": 3},
    }


@pytest.mark.parametrize(
    "kind",
    [
        "state_dict",
        "training checkpoint",
        "timm checkpoint",
        "tensor",
        "list",
        "number",
        "no tensors",
        "more than both",
    ],
)
def test_another_programs_file(good: Path, tmp_path: Path, kind: str) -> None:
    torch.save(foreign(good)[kind], tmp_path / "bad.pt")
    refusal(tmp_path / "bad.pt", match="no file of el_convert")


def test_another_programs_safetensors(good: Path, tmp_path: Path) -> None:
    _, state = content_of(good)
    for number, metadata in enumerate((None, {}, {"format": "pt"})):
        path = tmp_path / f"bad{number}.safetensors"
        save_file(state, path, metadata=metadata)
        refusal(path, match="no file of el_convert.*metadata")


def test_a_pickled_model(tmp_path: Path) -> None:
    torch.save(binarize(float_model()), tmp_path / "bad.pt")
    refusal(tmp_path / "bad.pt", match="holds code")


def hostile(good: Path, bomb: Bomb) -> dict[str, Any]:
    header, state = content_of(good)
    text = json.dumps(header)
    return {
        "all of it": bomb,
        "header": {"el_convert": bomb, "state_dict": state},
        "state_dict": {"el_convert": text, "state_dict": bomb},
        "tensor": {"el_convert": text, "state_dict": {**state, BIAS: bomb}},
        "one more tensor": {"el_convert": text, "state_dict": {**state, "x": bomb}},
        "one more entry": {"el_convert": text, "state_dict": state, "x": bomb},
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "place",
    ["all of it", "header", "state_dict", "tensor", "one more tensor", "one more entry"],
)
def test_code_in_a_file_is_never_run(good: Path, tmp_path: Path, place: str, legacy: bool) -> None:
    content = hostile(good, Bomb(tmp_path / "ran"))[place]
    torch.save(content, tmp_path / "bad.pt", _use_new_zipfile_serialization=not legacy)
    refusal(tmp_path / "bad.pt", match="holds code")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_bare_pickle_is_never_run(tmp_path: Path, suffix: str) -> None:
    raw = pickle.dumps(Bomb(tmp_path / "ran"))
    (tmp_path / f"bad{suffix}").write_bytes(raw)
    refusal(tmp_path / f"bad{suffix}")
    assert not (tmp_path / "ran").exists()
    pickle.loads(raw)  # noqa: S301  # it would have
    assert (tmp_path / "ran").exists()


def misshapen(state: dict[str, Any]) -> None:
    state[HEAD] = torch.zeros(SHAPE_OF_HEAD[1], SHAPE_OF_HEAD[0])


def misspelt(state: dict[str, Any]) -> None:
    state["fc.biass"] = state.pop(BIAS)


TENSORS: dict[str, tuple[Change, str]] = {
    "missing": (drop(BIAS), r"1 missing, first 'fc\.bias'"),
    "extra": (put(torch.zeros(2), "fc.scale"), r"1 unexpected, first 'fc\.scale'"),
    "renamed": (misspelt, r"first 'fc\.bias' \(there is 'fc\.biass' instead\)"),
    "shape": (misshapen, r"fc\.weight should be \[4, 96\].* is \[96, 4\]"),
    "dimensions": (put(torch.zeros(4, 1), BIAS), r"fc\.bias should be \[4\].* is \[4, 1\]"),
    "dtype": (put(torch.zeros(4, dtype=torch.float64), BIAS), r"fc\.bias should be .*float32"),
    "integers": (put(torch.zeros(4, dtype=torch.int32), BIAS), r"fc\.bias should be .*float32"),
    "empty": (lambda state: state.clear(), "4 classes|missing"),
}
UNSAFE: dict[str, tuple[Change, str]] = {
    "huge by stride 0": (put(torch.zeros(1).expand(10**12), BIAS), r"fc\.bias claims shape"),
    "wide by stride 0": (put(torch.zeros(1).expand(4), BIAS), r"fc\.bias claims shape"),
    "overlapping": (put(torch.zeros(5).as_strided((4, 96), (1, 0)), HEAD), "claims shape"),
    "number": (put(3.5, BIAS), r"fc\.bias.*not a plain tensor"),
    "text": (put("zeros", BIAS), r"fc\.bias.*not a plain tensor"),
    "nested": (put({"bias": torch.zeros(4)}, BIAS), r"fc\.bias.*not a plain tensor"),
    "parameter": (put(nn.Parameter(torch.zeros(4)), BIAS), r"fc\.bias.*not a plain tensor"),
    "on no device": (put(torch.zeros(4, device="meta"), BIAS), r"fc\.bias"),
    "complex": (put(torch.zeros(4, dtype=torch.complex64), BIAS), r"fc\.bias"),
    "key is no text": (put(torch.zeros(4), 3), "3.*not a plain tensor"),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("change", "match"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit(
    good: Path, tmp_path: Path, suffix: str, change: Change, match: str
) -> None:
    refusal(rewrite(good, tmp_path / f"bad{suffix}", state=change), match=match)


@pytest.mark.parametrize(("change", "match"), UNSAFE.values(), ids=UNSAFE)
def test_what_is_no_plain_tensor(good: Path, tmp_path: Path, change: Change, match: str) -> None:
    refusal(rewrite(good, tmp_path / "bad.pt", state=change), match=match)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_a_sparse_tensor(good: Path, tmp_path: Path) -> None:
    sparse = torch.zeros(4).to_sparse()
    path = rewrite(good, tmp_path / "bad.pt", state=put(sparse, BIAS))
    refusal(path, match=r"fc\.bias.*not a plain tensor")


@pytest.mark.parametrize("value", [None, [], "fc", torch.zeros(3)])
def test_a_state_dict_that_is_none(good: Path, tmp_path: Path, value: object) -> None:
    header, _ = content_of(good)
    torch.save({"el_convert": json.dumps(header), "state_dict": value}, tmp_path / "bad.pt")
    refusal(tmp_path / "bad.pt", match="no mapping")


HEADERS: dict[str, tuple[Change, str]] = {
    "newer": (put(2, "format"), "newer el_convert.*upgrade"),
    "unknown pattern": (layer("pattern", "nobody's"), "nobody's"),
    "renamed layer": (layer("path", "layer9"), "'layer9' is no convolution"),
    "hf-hub": (put("hf-hub:x/y", "source", "name"), "hf-hub:x/y"),
    "recipe": (put(1, "recipe", "link", "gama"), r"link\.gama"),
}


@pytest.mark.parametrize(("change", "match"), HEADERS.values(), ids=HEADERS)
def test_headers_of_safetensors(good: Path, tmp_path: Path, change: Change, match: str) -> None:
    refusal(rewrite(good, tmp_path / "bad.safetensors", change), match=match)


MISFITS: dict[str, tuple[Change, Change]] = {
    "missing tensor": (unchanged, drop(BIAS)),
    "extra tensor": (unchanged, put(torch.zeros(2), "fc.scale")),
    "wrong shape": (unchanged, misshapen),
    "on no device": (unchanged, put(torch.zeros(4, device="meta"), BIAS)),
    "renamed layer": (layer("path", "layer9"), unchanged),
    "unknown pattern": (layer("pattern", "nobody's"), unchanged),
    "pattern of another class": (layer("pattern", "scaled-std-conv2d"), unchanged),
    "wrong geometry": (layer("geometry", ["Conv2d", 1, 1]), unchanged),
    "large activation": (put(1 << 20, "activations", 0, "channels"), unchanged),
    "not a header": (put(0, "format"), unchanged),
}


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], list[Any], Tensor]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modules = [(name, type(m), m.training) for name, m in model.named_modules()]
    return state, modules, torch.get_rng_state()


@pytest.mark.parametrize(("header", "state"), MISFITS.values(), ids=MISFITS)
def test_a_refusal_leaves_the_given_model_alone(
    good: Path, tmp_path: Path, header: Change, state: Change
) -> None:
    model = float_model().eval()
    tensors, modules, random = snapshot(model)
    refusal(rewrite(good, tmp_path / "bad.pt", header, state), model=model)
    after, modules_after, random_after = snapshot(model)
    assert list(after) == list(tensors)
    assert all(torch.equal(after[key], tensors[key]) for key in tensors)
    assert modules_after == modules
    assert torch.equal(random_after, random)
