"""A file may claim no more than it holds: what exceeds that is refused before memory is spent."""

from __future__ import annotations

import copy
import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tampering import Change, float_model, put, refusal, rewrite, unchanged, write_good

from el_convert import CheckpointError, Source, binarize, load, save
from el_convert.limits import Allowance, room_for
from el_convert.zoo import create

HEAD = "fc.weight"
MANY = 1_000_000
BEYOND = r"its model would need \d+ MiB.*account for \d+ MiB at most.*save it anew"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_good(tmp_path_factory.mktemp("good"))


def source(name: str, library: str = "timm", **kwargs: int) -> Change:
    return put({"library": library, "name": name, "kwargs": kwargs}, "source")


def many_activations(data: dict[str, Any]) -> None:
    data["activations"] += [{**data["activations"][0], "channels": 1 << 20}] * 100


# An empty tensor may have any number of rows.
EMPTY: Change = put(torch.zeros(MANY, 0), HEAD)
HEADERS: dict[str, tuple[Change, Change, str]] = {
    "10^9 classes": (put(10**9, "source", "kwargs", "num_classes"), unchanged, "between 0 and"),
    "classes of an empty tensor": (put(MANY, "source", "kwargs", "num_classes"), EMPTY, BEYOND),
    "channels": (source("resnet50", in_chans=16_384), unchanged, BEYOND),
    "a larger model": (source("convnextv2_huge"), unchanged, BEYOND),
    "an enormous model": (source("vit_7b_patch16_dinov3"), unchanged, BEYOND),
    "of torchvision": (source("regnet_y_128gf", "torchvision"), unchanged, BEYOND),
    "positions": (source("levit_128", img_size=2048), unchanged, BEYOND),
    "many positions": (source("levit_128", img_size=16_384), unchanged, BEYOND),
    "pixels": (source("vit_base_patch16_224", img_size=16_384), unchanged, BEYOND),
    "activations": (many_activations, unchanged, r"activations claim \d+ channels.*at most"),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(("header", "state", "match"), HEADERS.values(), ids=HEADERS)
def test_headers_that_claim_more_than_the_tensors(
    good: Path, tmp_path: Path, suffix: str, header: Change, state: Change, match: str
) -> None:
    refusal(rewrite(good, tmp_path / f"bad{suffix}", header, state), match=match)


REFUSED = """
import resource, sys
from el_convert import CheckpointError, load


def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if name in line) >> 10


load(sys.argv[1])  # a good file: what libraries need is loaded
limit = (memory("VmSize") + 1024) << 20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
before = memory("VmRSS")
for path in sys.argv[2:]:
    try:
        load(path)
    except CheckpointError as error:
        assert "alloc" not in str(error), error  # there was too little memory
    else:
        raise SystemExit(f"{path} was read")
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_not_touched(good: Path, tmp_path: Path) -> None:
    paths = [
        str(rewrite(good, tmp_path / f"{number}.pt", header, state))
        for number, (header, state, _) in enumerate(HEADERS.values())
    ]
    paths.append(str(compressed(good, tmp_path / "compressed.pt")))
    run = subprocess.run(
        [sys.executable, "-c", REFUSED, good, *paths], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 400  # MiB; a model of 256 is built without asking


def records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def compressed(good: Path, target: Path) -> Path:
    large = rewrite(good, target.with_name("large.pt"), state=put(torch.zeros(10**8), "large"))
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in records(large).items():
            archive.writestr(name, content)
    return target


def overlapping(good: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in records(good).items():
            archive.writestr(name, content)
        largest = max(archive.filelist, key=lambda entry: entry.file_size)
        for number in range(20):
            archive.filelist.append(copy.copy(largest))
            archive.filelist[-1].filename = f"archive/data/more{number}"
    return target


def prefixed(good: Path, target: Path) -> Path:
    target.write_bytes(b"\0" * 64 + good.read_bytes())
    return target


def commented(good: Path, target: Path) -> Path:
    target.write_bytes(good.read_bytes())
    with zipfile.ZipFile(target, "a") as archive:
        archive.comment = b"PK"
    return target


def claiming(good: Path, target: Path, counts: range, claimed: int, times: int) -> Path:
    """Tensors of so many numbers are said to be of `claimed`; it is found `times` times in all."""
    state = {str(count): torch.zeros(count) for count in counts}
    full = rewrite(good, target.with_name("full.pt"), state=lambda own: own.update(state))
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in records(full).items():
            if name.endswith(".pkl"):
                for count in counts:
                    length, larger = struct.pack("<BH", 77, count), struct.pack("<Bi", 74, claimed)
                    content = content.replace(length, larger, times)
            archive.writestr(name, content)
    return target


def oversized(good: Path, target: Path) -> Path:
    """Its pickle names a tensor 100 times as large as the file."""
    return claiming(good, target, range(1000, 1001), 10**8, times=2)  # storage and shape


def shared(good: Path, target: Path) -> Path:
    """Its pickle names storages that are within the file, and together are more than that."""
    return claiming(good, target, range(1000, 1020), 100_000, times=1)  # storages alone


ARCHIVES: list[tuple[Callable[[Path, Path], Path], str]] = [
    (compressed, "record .* is compressed.*write it anew"),
    (overlapping, r"damaged, get it anew: its records claim \d+ bytes, it has \d+"),
    (prefixed, "before or after its records"),
    (commented, "before or after its records"),
    (oversized, "damaged, get it anew: a tensor claims more bytes than the file has"),
    (shared, r"its tensors claim \d+ bytes, it has \d+: get it anew"),
]


@pytest.mark.parametrize(("change", "match"), ARCHIVES)
def test_archives_that_become_more(
    good: Path, tmp_path: Path, change: Callable[[Path, Path], Path], match: str
) -> None:
    refusal(change(good, tmp_path / "bad.pt"), match=match)


SAFE: dict[str, dict[str, Any]] = {
    "beyond the file": {"shape": [10**9], "data_offsets": [0, 4 * 10**9]},
    "beyond its bytes": {"shape": [10**9], "data_offsets": [0, 64]},
    "beyond any number": {"shape": [1 << 62, 4], "data_offsets": [0, 64]},
}


@pytest.mark.parametrize("claim", SAFE.values(), ids=SAFE)
def test_safetensors_that_claim_more(tmp_path: Path, claim: dict[str, Any]) -> None:
    header = {"__metadata__": {"el_convert": "{}"}, HEAD: {"dtype": "F32", **claim}}
    text = json.dumps(header).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    refusal(path, match="damaged.*deserializing header")


def test_an_allowance_is_of_all_tensors() -> None:
    with Allowance(4000):
        torch.empty(400)
        torch.zeros((2, 200), dtype=torch.float32)
        torch.randn(100, generator=torch.Generator())
        with pytest.raises(CheckpointError, match="would need"):
            torch.ones(size=(200,))


def test_room_counts_what_is_shared_once_and_bits_as_floats() -> None:
    value, bits = torch.zeros(100, dtype=torch.float16), torch.zeros(10, dtype=torch.uint8)
    least = room_for({})
    assert room_for({"a": value, "b": value[:50], "epoch": 3}) - least == 4 * 400
    assert room_for({"bits": bits}) - least == 4 * 4 * 80


def test_models_for_images_of_ones_own_size_come_back(tmp_path: Path) -> None:
    model = binarize(create(Source("timm", "levit_128", {"img_size": 256})))
    save(model, tmp_path / "levit.pt")
    again, state = load(tmp_path / "levit.pt").state_dict(), model.state_dict()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_what_load_would_refuse_is_told_by_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = binarize(float_model())
    monkeypatch.setattr("el_convert.checkpoint.room_for", lambda state: 0)
    with pytest.warns(UserWarning, match="will not say how to build.*would need"):
        save(model, tmp_path / "bnn.pt")
    monkeypatch.undo()
    refusal(tmp_path / "bnn.pt", match="does not say what its model is built from")
    load(tmp_path / "bnn.pt", model=float_model())
