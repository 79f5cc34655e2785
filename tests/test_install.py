"""Installed where there is no compiler, everything works, and says what it lacks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = """
import warnings
import torch, timm
import el_convert
from el_convert import binarize, load, pack, save
from el_convert.kernels import engine

assert engine() is None, engine()
torch.manual_seed(0)
model = binarize(timm.create_model("test_resnet")).eval()
image = torch.randn(1, 3, 64, 64)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    packed = pack(model)
assert any("C++ compiler" in str(w.message) for w in seen), [str(w.message) for w in seen]
with torch.no_grad():
    expected, given = model(image), packed(image)
    assert (given - expected).norm() <= 1e-4 * expected.norm()
    save(packed, "small.pt")
    assert torch.equal(load("small.pt")(image), given)
print(el_convert.__file__)
"""


@pytest.mark.slow
def test_without_a_compiler(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "*.dylib", ".git", "build", "*.egg-info", "shared")
    shutil.copytree(ROOT, source, ignore=ignored)
    bare = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "LDSHARED", "PYTHONPATH")}
    wheels = tmp_path / "wheels"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--quiet", "-w", str(wheels), str(source)],
        env={**bare, "PATH": str(tmp_path)},
        check=True,
    )
    (wheel,) = wheels.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    assert not list(installed.rglob("_engine*"))
    done = subprocess.run(
        [sys.executable, "-c", USE],
        env={**bare, "PYTHONPATH": str(installed), "PATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(installed))
