"""Detection, segmentation, video, optical flow and quantizable models: all convert and train."""

from __future__ import annotations

import copy
import fnmatch
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet
from tasks import (
    BY_NAME,
    CLASSES,
    TASKS,
    Step,
    Task,
    all_finite,
    check_detections,
    infer,
    same,
    settle,
    small_images,
    train_step,
)
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torchvision.ops.misc import SqueezeExcitation

from el_convert.checkpoint import load, save
from el_convert.convert import binarize
from el_convert.errors import CheckpointError, ConversionError
from el_convert.nn import BinaryLayer
from el_convert.planning import Decision, plan
from el_convert.zoo import create, find_source


def as_parameter(task: Task) -> ParameterSet:
    """One model's tests on one worker, so that each model is built once."""
    marks = [pytest.mark.xdist_group(task.name), *([pytest.mark.slow] if task.slow else [])]
    return pytest.param(task, id=task.name, marks=marks)


@pytest.fixture(params=[as_parameter(task) for task in TASKS], scope="module")
def task(request: pytest.FixtureRequest) -> Task:
    chosen: Task = request.param
    return chosen


@pytest.fixture(scope="module")
def model(task: Task) -> nn.Module:
    return settle(task, task.build())


@pytest.fixture(scope="module")
def decisions(model: nn.Module) -> tuple[Decision, ...]:
    return plan(model)


@pytest.fixture(scope="module")
def binary(task: Task, model: nn.Module) -> nn.Module:
    return settle(task, binarize(model))


@pytest.fixture(scope="module")
def swapped(model: nn.Module) -> nn.Module:
    return binarize(model, "identity")


@pytest.fixture(scope="module")
def float_step(task: Task, model: nn.Module) -> Step:
    return train_step(task, model)


@pytest.fixture(scope="module")
def float_answer(task: Task, model: nn.Module) -> dict[str, Tensor]:
    return infer(task, model)


def binary_layers(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, BinaryLayer)]


def test_predictions_are_kept_and_nothing_else_for_that_reason(
    task: Task, model: nn.Module, decisions: tuple[Decision, ...]
) -> None:
    convs = [path for path, module in model.named_modules() if isinstance(module, _ConvNd)]
    expected = [p for p in convs if any(fnmatch.fnmatchcase(p, g) for g in task.predictions)]
    assert all(fnmatch.filter(expected, glob) for glob in task.predictions)
    kept = [d for d in decisions if d.pattern in ("feeds-output", "prediction-head")]
    assert [decision.path for decision in kept] == expected
    assert all(decision.action == "keep" for decision in kept)


def test_most_of_the_backbone_is_binarized(
    model: nn.Module, binary: nn.Module, decisions: tuple[Decision, ...]
) -> None:
    # Squeeze-excite works on single pixels and is kept on purpose.
    modules = model.named_modules()
    gates = tuple(f"{path}." for path, module in modules if isinstance(module, SqueezeExcitation))
    spatial = [d for d in decisions if not d.path.startswith(gates)]
    backbone = [d for d in spatial if d.path.startswith("backbone.")] or spatial
    assert sum(d.action == "binarize" for d in backbone) >= 0.8 * len(backbone)
    assert binary_layers(binary) == [d.path for d in decisions if d.action == "binarize"]


def test_identity_changes_nothing_in_eval(
    task: Task,
    swapped: nn.Module,
    decisions: tuple[Decision, ...],
    float_answer: dict[str, Tensor],
) -> None:
    assert binary_layers(swapped) == [d.path for d in decisions if d.action == "binarize"]
    assert all(part.numel() for part in float_answer.values())
    assert same(infer(task, swapped), float_answer)


def test_identity_changes_nothing_in_training(
    task: Task, swapped: nn.Module, float_step: Step
) -> None:
    step = train_step(task, swapped)
    assert same(step.outputs, float_step.outputs)
    assert same(step.gradients, float_step.gradients)
    assert same(step.buffers, float_step.buffers)


def test_whatever_had_a_gradient_has_one(
    task: Task, model: nn.Module, binary: nn.Module, float_step: Step
) -> None:
    had = set(float_step.gradients)
    assert had == {name for name, _ in model.named_parameters()}  # the float run reaches all
    step = train_step(task, binary)
    assert list(step.outputs) == list(float_step.outputs)
    assert all_finite(step.outputs)
    assert step.loss.isfinite()
    gates = {f"{path}.link.gamma" for path in binary_layers(binary) if f"{path}.weight" in had}
    assert gates
    assert had | gates <= set(step.gradients)
    assert all_finite(step.gradients)


def test_eval_answers_like_the_float_model_and_repeats(
    task: Task, model: nn.Module, binary: nn.Module, float_answer: dict[str, Tensor]
) -> None:
    assert type(binary) is type(model)
    first, second = (infer(task, binary, seed) for seed in (0, 1))
    assert list(first) == list(float_answer)
    if task.kind == "detection":
        check_detections(first)
    else:
        assert [v.shape for v in first.values()] == [v.shape for v in float_answer.values()]
    assert all_finite(first)
    assert same(first, second)


FOUR = {"num_classes": CLASSES}
REBUILT = (
    Task("fasterrcnn_mobilenet_v3_large_320_fpn", "detection", (), FOUR),
    Task("retinanet_resnet50_fpn", "detection", (), FOUR, slow=True),
    Task("ssdlite320_mobilenet_v3_large", "detection", (), FOUR),
    Task("lraspp_mobilenet_v3_large", "segmentation", (2, 3, 64, 64), FOUR),
    Task("mc3_18", "video", (2, 3, 4, 32, 32), FOUR),
    Task("raft_small", "flow", (1, 3, 128, 128)),
    Task("quantized_shufflenet_v2_x0_5", "quantizable", (2, 3, 64, 64), FOUR),
    Task("quantized_googlenet", "quantizable", (2, 3, 64, 64), FOUR),
)


@pytest.mark.parametrize("task", [as_parameter(task) for task in REBUILT])
def test_a_file_rebuilds_its_model(task: Task, tmp_path: Path) -> None:
    binary = binarize(create(find_source(f"torchvision/{task.name}", **task.options)))
    with small_images(binary):
        settle(task, binary)
    save(binary, tmp_path / "bnn.pt")
    again = load(tmp_path / "bnn.pt")
    assert type(again) is type(binary)
    with small_images(binary), small_images(again):
        answer = infer(task, binary)
        assert all(part.numel() for part in answer.values())
        assert same(infer(task, again), answer)


OTHERS = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "deeplabv3_mobilenet_v3_large",
    "mc3_18",
    "raft_large",
    "quantized_mobilenet_v3_large",
)


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_a_model_that_was_built_elsewhere_needs_it(name: str, tmp_path: Path) -> None:
    task = BY_NAME[name]
    model = task.build()
    binary = settle(task, binarize(model))
    save(binary, tmp_path / "bnn.safetensors")
    with pytest.raises(CheckpointError, match="does not say what its model is built from"):
        load(tmp_path / "bnn.safetensors")
    again = load(tmp_path / "bnn.safetensors", model=model)
    assert same(infer(task, again), infer(task, binary))


# What users set on a detector, of each kind that an attribute can be.
SETTINGS: dict[str, Any] = {
    "roi_heads.score_thresh": 0.0,
    "transform.min_size": (64,),
    "transform.image_mean": [0.0, 0.0, 0.0],
    "rpn.anchor_generator.sizes": ((8, 16, 32, 64, 128),) * 3,
}


@pytest.fixture(scope="module")
def detectors() -> tuple[nn.Module, nn.Module]:
    name = "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn"
    model = create(find_source(name, num_classes=CLASSES))
    return model, binarize(model)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_file_of_a_detector_with_another_setting_needs_it(
    setting: str, detectors: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    task = BY_NAME["fasterrcnn_mobilenet_v3_large_320_fpn"]
    model, binary = copy.deepcopy(detectors)
    path, _, name = setting.rpartition(".")
    for network in (model, binary):
        assert type(getattr(network.get_submodule(path), name)) is type(SETTINGS[setting])
        setattr(network.get_submodule(path), name, SETTINGS[setting])
    with pytest.warns(UserWarning, match="will not say how to build its model"):
        save(binary, tmp_path / "bnn.pt")
    again = load(tmp_path / "bnn.pt", model=model)
    assert same(infer(task, again), infer(task, binary))


def test_a_video_transformer_has_only_its_patch_embedding() -> None:
    model = create(find_source("torchvision/swin3d_t", num_classes=CLASSES))
    (decision,) = plan(model)
    assert (decision.path, decision.action) == ("patch_embed.proj", "keep")
    assert decision.pattern == "reads-image"
    message = "SwinTransformer3d has no convolution to binarize: all 1 are kept .*reads the image"
    with pytest.raises(ConversionError, match=message):
        binarize(model)
