"""Losses, parameter groups, evaluation and calibration, each against hand arithmetic or torch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pictures import IMAGES, draw_folder, float_network, small_network, with_recipe
from torch import nn

from el_convert.calibration import calibrate
from el_convert.convert import binarize
from el_convert.datasets import evaluation_loader, open_images
from el_convert.errors import ConversionError, DataError, TrainingError
from el_convert.evaluation import class_count, evaluate
from el_convert.float_weights import load_float_weights
from el_convert.latent import (
    binary_layers,
    clip_latent,
    latent_weights,
    parameter_groups,
    set_binary_weights,
)
from el_convert.objective import Objective, distribution_loss, logits_of
from el_convert.packing import pack


def test_distribution_loss_is_cross_entropy_with_soft_targets() -> None:
    logits, teacher = torch.randn(5, 7), torch.randn(5, 7)
    expected = F.cross_entropy(logits, teacher.softmax(-1))
    torch.testing.assert_close(distribution_loss(logits, teacher), expected)
    # By hand: p = (3/4, 1/4) against (1/2, 1/2).
    loss = distribution_loss(torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]]))
    assert float(loss) == pytest.approx(math.log(2))
    hot = distribution_loss(logits, teacher, 2.0)
    torch.testing.assert_close(hot, 4 * F.cross_entropy(logits / 2, (teacher / 2).softmax(-1)))


def test_both_is_the_weighted_sum() -> None:
    teacher = nn.Linear(4, 3)
    images, labels, logits = torch.randn(6, 4), torch.arange(6) % 3, torch.randn(6, 3)
    hard = F.cross_entropy(logits, labels)
    soft = distribution_loss(logits, teacher(images))
    objective = Objective("both", teacher, label_weight=0.25)
    torch.testing.assert_close(objective(logits, images, labels), 0.25 * hard + 0.75 * soft)
    alone = Objective("distribution", teacher)
    torch.testing.assert_close(alone(logits, images, labels), soft)
    assert not any(p.requires_grad for p in objective.parameters())
    smooth = Objective(smoothing=0.1)(logits, images, labels)
    torch.testing.assert_close(smooth, F.cross_entropy(logits, labels, label_smoothing=0.1))
    mixed = F.one_hot(labels, 3).float()
    torch.testing.assert_close(Objective()(logits, images, mixed), hard)


def test_a_teacher_belongs_to_its_losses_and_never_trains() -> None:
    with pytest.raises(ValueError, match="needs a teacher"):
        Objective("distribution")
    with pytest.raises(ValueError, match="takes no teacher"):
        Objective("cross-entropy", nn.Linear(1, 1))
    objective = Objective("both", nn.Sequential(nn.Dropout())).train()
    assert objective.teacher is not None
    assert not objective.teacher.training


def test_logits_of_what_classifiers_give() -> None:
    logits = torch.zeros(1, 2)
    assert logits_of(logits) is logits
    assert logits_of((logits, None)) is logits
    with pytest.raises(TypeError, match="gives logits, not dict"):
        logits_of({"boxes": logits})


def test_only_real_weights_of_float_layers_decay() -> None:
    model = small_network("elastic-reactnet")
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, rest = parameter_groups(model, 0.1)
    assert [names[id(p)] for p in decayed["params"]] == [
        "conv1.weight",
        *(f"layer{number}.0.downsample.0.weight" for number in (1, 2, 3, 4)),
        "fc.weight",
    ]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))
    set_binary_weights(model, False)  # the first of two steps: all weights are real
    assert len(parameter_groups(model, 0.1)[0]["params"]) > len(decayed["params"])


def test_two_steps_switch_only_what_was_converted_to_signs() -> None:
    model = small_network(with_recipe("reactnet", weight__binary=False))
    set_binary_weights(model, True)
    assert latent_weights(model) == []
    model = small_network(with_recipe("reactnet", weight__scale="learned"))
    before = [layer.recipe for _, layer in binary_layers(model)]
    set_binary_weights(model, False)
    scales = [layer.learned_scale for _, layer in binary_layers(model)]
    assert not any(scale.requires_grad for scale in scales if scale is not None)
    set_binary_weights(model, True)
    assert [layer.recipe for _, layer in binary_layers(model)] == before
    assert all(scale.requires_grad for scale in scales if scale is not None)


def test_latent_weights_are_clipped() -> None:
    weight = nn.Parameter(torch.tensor([-3.0, -0.5, 1.5]))
    clip_latent([weight])
    assert weight.tolist() == [-1.0, -0.5, 1.0]
    clip_latent([])


class Fixed(nn.Module):
    """Gives the images' first pixels as logits."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, 0]


def test_accuracy_by_hand() -> None:
    logits = torch.tensor([[9.0, 1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4, 3], [0, 0, 0, 0, 0, 0, 1]])
    labels = torch.tensor([0, 4, 0])
    model = Fixed().train()
    names = tuple("abcdefg")
    seen: list[int] = []
    result = evaluate(
        model,
        [(logits[:2].view(2, 1, 1, 7), labels[:2]), (logits[2:].view(1, 1, 1, 7), labels[2:])],
        classes=names,
        progress=seen.append,
    )
    assert result.top1 == pytest.approx(100 / 3)
    assert result.top5 == pytest.approx(100)  # ties count for the first
    assert result.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    assert result.per_class[0] == ("a", 50.0, 2)
    assert result.per_class[4] == ("e", 0.0, 1)
    assert (seen, result.images, model.training) == ([2, 1], 3, True)


def test_packed_and_unpacked_networks_agree(tmp_path: Path) -> None:
    images = open_images(draw_folder(tmp_path / "images"), IMAGES, training=False)
    model = small_network()
    for _, layer in binary_layers(model):
        nn.init.uniform_(layer.link.gamma, 0.5, 1)  # type: ignore[union-attr, arg-type]
    calibrate(model, evaluation_loader(images, IMAGES))
    plain = evaluate(model, evaluation_loader(images, IMAGES))
    packed = evaluate(pack(model.eval()), evaluation_loader(images, IMAGES))
    assert packed.top1 == plain.top1
    assert packed.loss == pytest.approx(plain.loss, rel=1e-4)


def test_classes_are_counted_by_the_logits() -> None:
    model = float_network(5)
    assert class_count(model, IMAGES) == 5
    assert model.training
    with pytest.raises(TrainingError, match="not one row of logits"):
        class_count(nn.Identity(), IMAGES)


def test_calibration_measures_plain_means_and_medians(tmp_path: Path) -> None:
    model = binarize(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
            nn.Conv2d(8, 4, 3), nn.Flatten(),
        ),
        with_recipe("reactnet", activation__replacement="keep"),
    ).eval()  # fmt: skip
    batches = [(torch.randn(4, 3, 9, 9), None) for _ in range(3)]
    model[1].momentum = 0.3
    found = calibrate(model, batches)
    assert (found.thresholds, found.norms, found.batches) == (1, 2, 3)
    assert (model[1].momentum, model[1].training) == (0.3, False)
    outputs = torch.stack([model[0](images).mean((0, 2, 3)) for images, _ in batches])
    torch.testing.assert_close(model[1].running_mean, outputs.mean(0))
    first = model[0](batches[0][0])
    with torch.no_grad():  # as on the first batch: normalized by its own statistics
        normed = F.batch_norm(first, None, None, model[1].weight, model[1].bias, True)
    expected = normed.movedim(1, 0).flatten(1).median(1).values
    torch.testing.assert_close(model[2].threshold, nn.Parameter(expected))
    with pytest.raises(DataError, match="no batch"):
        calibrate(model, [])
    with pytest.raises(ConversionError, match="not a binarized model"):
        calibrate(float_network(), batches)


def test_float_checkpoints_load_into_converted_networks(tmp_path: Path) -> None:
    path = tmp_path / "float.pth"
    trained = float_network()
    torch.save({"state_dict": {f"module.{k}": v for k, v in trained.state_dict().items()}}, path)
    model = small_network("elastic-reactnet")
    assert load_float_weights(model, path) == ""
    assert torch.equal(model.layer1[0].conv1.weight, trained.layer1[0].conv1.weight)
    assert load_float_weights(small_network(classes=5), path) == "fc.weight; fc.bias"
    with pytest.raises(TrainingError, match="of another network: it lacks"):
        load_float_weights(nn.Conv2d(3, 4, 1), path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(TrainingError, match="no checkpoint of weights"):
        load_float_weights(model, path)
