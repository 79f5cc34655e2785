"""Fixtures and knobs every test shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Two test processes on two cores: more threads each only fight.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded(tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # whatever the test before has left: sums depend on it
    # Processes that tests start must find what is installed, engine included: sources beside
    # which a process starts would come first.
    os.chdir(Path(__file__).parent)
    # Model lists are cached per user; tests must not write to the real home.
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.getbasetemp() / "cache")
