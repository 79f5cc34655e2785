"""Packed networks see what the unpacked ones see, on photographs, and need less memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from el_convert.convert import binarize
from el_convert.link import ElasticLink
from el_convert.packing import pack

# A tar with one folder per class, for instance a part of ImageNet.
IMAGES = Path(os.environ.get("EL_CONVERT_IMAGES", ""))
MODELS = ["resnet18", "resnet50", "mobilenetv1_100"]


def photographs() -> Iterator[Tensor]:
    transform = create_transform((3, 224, 224))
    with tarfile.open(IMAGES) as tar:
        for member in tar:
            if member.isfile() and (file := tar.extractfile(member)) is not None:
                yield transform(Image.open(file).convert("RGB"))[None]


@pytest.mark.slow
@pytest.mark.skipif(not IMAGES.is_file(), reason="EL_CONVERT_IMAGES names no tar of images")
@pytest.mark.parametrize("name", MODELS)
def test_top_1_is_the_same_on_every_image(name: str) -> None:
    torch.manual_seed(0)
    model: Any = binarize(timm.create_model(name))
    for gate in (module for module in model.modules() if isinstance(module, ElasticLink)):
        torch.nn.init.uniform_(gate.gamma, 0.2, 1.0)  # type: ignore[arg-type]  # as if trained
    images = torch.cat(list(photographs()))
    with torch.no_grad():
        for batch in images[:32].split(8):
            model.train()(batch)  # statistics for the norms, as training would give
        model.eval()
        packed = pack(model)
        for batch in images.split(8):
            expected, given = model(batch), packed(batch)
            assert torch.equal(given.argmax(1), expected.argmax(1))
            error = (given - expected).norm(dim=1)
            assert bool((error <= 1e-4 * expected.norm(dim=1)).all())


MEASURE = """
import copy, ctypes, gc, sys, warnings
import torch, timm
from el_convert import binarize, pack


def resident(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if name in line)


def held():
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) // 1024


warnings.simplefilter("ignore")
torch.set_num_threads(1)
model = timm.create_model("resnet18").eval().to(memory_format=torch.channels_last)
if sys.argv[1] == "packed":
    model = pack(binarize(model), inplace=True)
image = torch.randn(8, 3, 224, 224).to(memory_format=torch.channels_last)
with torch.no_grad():
    copy.deepcopy(model)(image)  # loads what the libraries load at a first call
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    weights, before = held(), resident("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    model(image)
    model(image)
print(weights + resident("VmHWM") - before)
"""
# Each map then has pages of its own, which are given back at once: no peak by fragmentation.
STEADY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_forward_needs_less_memory_than_the_float_model_s(tmp_path: Path) -> None:
    """Every tensor in the process, weights included, and what forwards add to them at most."""
    needs = {}
    for kind in ("float", "packed"):
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, kind],
            capture_output=True,
            text=True,
            env={**os.environ, **STEADY},
            cwd=tmp_path,  # what is installed, engine included, not the sources beside the tests
        )
        if "clear_refs" in run.stderr:
            pytest.skip("the peak cannot be reset here")
        assert run.returncode == 0, run.stderr
        needs[kind] = int(run.stdout)
    assert needs["packed"] < needs["float"]


def test_what_is_packed_wants_no_gradient() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = pack(binarize(timm.create_model("test_resnet")))
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    assert not packed(torch.randn(1, 3, 64, 64)).requires_grad
