"""One small saved model, and ways to write it again with something changed."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from el_convert import CheckpointError, binarize, load, save

Change = Callable[[dict[str, Any]], object]
CONVERTED = "layer2.0.conv1"
SHAPE_OF_HEAD = (4, 96)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.target),)


def float_model() -> nn.Module:
    model: nn.Module = timm.create_model("test_resnet", num_classes=4)
    return model


def write_good(folder: Path) -> Path:
    save(binarize(float_model()), folder / "good.pt")
    return folder / "good.pt"


def content_of(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    content = torch.load(path, weights_only=True)
    return json.loads(content["el_convert"]), dict(content["state_dict"])


def unchanged(_: dict[str, Any]) -> None:
    """The change that changes nothing."""


def rewrite(
    good: Path, target: Path, header: Change = unchanged, state: Change = unchanged
) -> Path:
    """Write `good` again to `target` in the format of its suffix, with changes."""
    fields, tensors = copy.deepcopy(content_of(good))
    header(fields)
    state(tensors)
    if target.suffix == ".pt":
        torch.save({"el_convert": json.dumps(fields), "state_dict": tensors}, target)
    else:
        save_file(tensors, target, metadata={"el_convert": json.dumps(fields)})
    return target


def put(value: Any, *keys: Any) -> Change:
    """Set `data[key][key]... = value`."""

    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


def drop(*keys: Any) -> Change:
    """Delete `data[key][key]...`."""

    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return change


def add(value: Any, *keys: Any) -> Change:
    """Append to the list `data[key][key]...`."""

    def change(data: Any) -> None:
        for key in keys:
            data = data[key]
        data.append(value)

    return change


def layer(name: str, value: Any) -> Change:
    """Set one field of the record of `CONVERTED`."""

    def change(data: dict[str, Any]) -> None:
        (record,) = [record for record in data["layers"] if record["path"] == CONVERTED]
        record[name] = value

    return change


def refusal(path: Path, model: nn.Module | None = None, match: str = "") -> None:
    """Assert that the file is refused, by name and for a reason that matches."""
    with pytest.raises(CheckpointError) as caught:
        load(path, model=model)
    message = str(caught.value)
    assert path.name in message
    assert re.search(match, message), message
