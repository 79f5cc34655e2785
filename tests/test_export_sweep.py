"""The record of exports: what is in it, and that a crash or a hang becomes a row."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import export_sweep
import pytest
import torch
from export_sweep import Row, attempt, guarded, read, table
from torch import Tensor, nn
from zoo_trials import TRIALS, Trial

from el_convert.recipes import RECIPES, Recipe

pytestmark = pytest.mark.filterwarnings("ignore:the model looks untrained")


class Net(nn.Module):
    def __init__(self, trouble: str) -> None:
        super().__init__()
        self.trouble = trouble
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x))
        return self.head(x if self.trouble != "branch" or float(x.mean()) > 0 else -x)


@dataclass(frozen=True)
class Bad(Trial):
    trouble: str = ""

    def build(self) -> nn.Module:
        if self.trouble == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "hang":
            time.sleep(600)
        if self.trouble == "spin":
            while True:
                pass
        return Net(self.trouble)

    def recipe(self, name: str = "elastic-link") -> Recipe:
        return RECIPES[name]


@pytest.mark.parametrize(
    ("trouble", "outcome", "reason"),
    [
        ("crash", "crash", "SIGKILL"),
        ("hang", "timeout", "more than 1 s of one core"),
        ("spin", "timeout", "more than 1 s of one core"),
    ],
)
def test_what_does_not_end_well_is_a_row(
    trouble: str, outcome: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_sweep, "SECONDS", 1)
    row = guarded(Bad("timm/net", trouble=trouble), "Net")
    assert (row.name, row.cls, row.outcome, row.reason) == ("timm/net", "Net", outcome, reason)


def test_a_refusal_has_its_reason() -> None:
    row = attempt(Bad("timm/net", 9, trouble="branch"))
    assert (row.outcome, row.packed) == ("refused", 0)
    assert row.reason.startswith("Net cannot be exported (")


def test_a_file_that_agrees() -> None:
    torch.manual_seed(0)
    row = attempt(Bad("timm/net", 9))
    assert (row.outcome, row.packed, row.reason) == ("agrees", 1, "")
    assert row.error <= 1e-4
    again = Row.parse(row.line())
    assert (again.name, again.packed, again.outcome) == (row.name, row.packed, row.outcome)


def test_the_record() -> None:
    rows = read()
    assert set(rows) == {trial.name for trial in TRIALS}
    for row in rows.values():
        assert row.outcome in ("agrees", "refused", "timeout")  # no crash, nothing unforeseen
        agrees = row.outcome == "agrees"
        assert (row.packed > 0) == agrees
        assert agrees or row.reason
        # Most images agree: single signs may be others where float layers are rounded otherwise.
        assert row.error <= 1e-4 or "of 5 images differ" in row.reason
    assert table(rows).count("\n") == len(rows) + 1
