"""Runs: what they keep, that they go on exactly, and what is refused before they start."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import IMAGES, OPTIONS, draw_folder, float_network, small_network, with_recipe
from torch import Tensor, nn

from el_convert.convert import binarize
from el_convert.datasets import LabelledImages, open_images
from el_convert.errors import ConversionError, DataError, TrainingError
from el_convert.latent import binary_layers
from el_convert.packing import pack
from el_convert.run_state import EpochRow
from el_convert.train_options import TrainOptions
from el_convert.training import train
from el_convert.watcher import Watcher

STATES = {
    "plain": OPTIONS,
    "everything": replace(
        OPTIONS,
        ema=0.9, mixup=0.2, smoothing=0.1, accumulate=2, warmup_epochs=1, clip_grad=1.0,
        images=replace(IMAGES, auto_augment="rand-m5", re_prob=0.3, batch_size=4),
    ),
}  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> LabelledImages:
    return open_images(draw_folder(tmp_path / "train"), IMAGES, training=True)


@pytest.fixture
def held_out(tmp_path: Path) -> LabelledImages:
    return open_images(draw_folder(tmp_path / "val", seed=1), IMAGES, training=False)


def seeded_network(recipe: Any = "elastic-link") -> nn.Module:
    torch.manual_seed(3)
    return small_network(recipe)


def read_log(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "log.csv").read_text().splitlines()))


class StopAt(Watcher):
    """Asks the run to stop, as SIGTERM does, after so many batches."""

    def __init__(self, batch: int) -> None:
        self.left = batch

    def batch_done(self, loss: float, images: int, lr: float) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def reopened(images: LabelledImages, options: TrainOptions) -> LabelledImages:
    return open_images(images.root, options.images, training=True)


def test_a_run_learns_and_leaves_its_files(
    images: LabelledImages, held_out: LabelledImages, tmp_path: Path
) -> None:
    options = replace(OPTIONS, epochs=12)
    done = train(seeded_network(), images, held_out, options, run=tmp_path / "run")
    assert done.rows[-1].top1 > 80  # chance is 33
    assert not done.model.training
    lines = read_log(tmp_path / "run")
    assert [int(line["epoch"]) for line in lines] == list(range(12))
    assert float(lines[-1]["top1"]) == pytest.approx(done.rows[-1].top1, rel=1e-4)
    assert float(lines[-1]["lr"]) < float(lines[0]["lr"])
    if done.curve is not None:
        assert done.curve.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("stop", [1, 2, 4])
@pytest.mark.parametrize("name", STATES)
def test_a_stopped_run_goes_on_bit_for_bit(
    images: LabelledImages, tmp_path: Path, name: str, stop: int
) -> None:
    options = STATES[name]
    images = reopened(images, options)
    unbroken = train(seeded_network(), images, options=options, run=tmp_path / "one")
    with pytest.raises(TrainingError, match=r"stopped at epoch .* go on with --resume"):
        train(seeded_network(), images, options=options, run=tmp_path / "two", watcher=StopAt(stop))
    torch.manual_seed(77)
    resumed = train(
        small_network(), images, options=options, run=tmp_path / "two", resume=True
    )  # fresh weights: all comes from the state
    assert same(unbroken.model, resumed.model)
    assert [r.train_loss for r in unbroken.rows] == [r.train_loss for r in resumed.rows]


def test_two_steps_first_real_weights_then_signs(images: LabelledImages, tmp_path: Path) -> None:
    seen: list[tuple[int, bool]] = []
    model = seeded_network("reactnet")

    class Watch(Watcher):
        def epoch_starts(self, epoch: int, epochs: int, step: int, batches: int) -> None:
            binary = {layer.recipe.weight.binary for _, layer in binary_layers(model)}
            assert len(binary) == 1
            assert epochs == 4
            seen.append((step, binary.pop()))

    done = train(model, images, options=OPTIONS, run=tmp_path / "run", watcher=Watch())
    assert seen == [(1, False), (1, False), (2, True), (2, True)]
    assert [row.step for row in done.rows] == [1, 1, 2, 2]
    assert all(layer.recipe.weight.binary for _, layer in binary_layers(done.model))


def test_two_steps_go_on_bit_for_bit(images: LabelledImages, tmp_path: Path) -> None:
    recipe = with_recipe("reactnet", weight__scale="learned")
    one = train(seeded_network(recipe), images, options=OPTIONS, run=tmp_path / "one")
    # In the first step's last epoch, at the start of the second step, in it.
    for stop in (5, 2, 3):
        with pytest.raises(TrainingError):
            train(
                seeded_network(recipe), images, options=OPTIONS, run=tmp_path / "two",
                watcher=StopAt(stop), resume=stop < 5,
            )  # fmt: skip
    two = train(small_network(recipe), images, options=OPTIONS, run=tmp_path / "two", resume=True)
    assert same(one.model, two.model)


RUN = """
import sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from pictures import *
from el_convert.datasets import open_images
from el_convert.training import train
torch.set_num_threads(1)
images = open_images({root!r}, IMAGES, training=True)
torch.manual_seed({seed})
model = small_network()
options = TrainOptions(epochs=30, lr=5e-3, images=IMAGES)
train(model, images, options=options, run={run!r}, resume={resume!r})
torch.save(model.state_dict(), Path({run!r}, "end.pt"))
"""


def start(root: Path, run: Path, *, seed: int = 3, resume: bool = False) -> subprocess.Popen[bytes]:
    """A run in a process of its own, as a user's is."""
    tests = str(Path(__file__).parent)
    code = RUN.format(tests=tests, root=str(root), run=str(run), seed=seed, resume=resume)
    return subprocess.Popen([sys.executable, "-c", code])


def losses(run: Path) -> list[str]:
    return [line["train_loss"] for line in read_log(run)]


def test_a_killed_run_loses_at_most_an_epoch(images: LabelledImages, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert start(images.root, one).wait() == 0
    process = start(images.root, two)
    deadline = time.monotonic() + 120
    while not (two / "log.csv").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    kept = len(read_log(two))
    assert 0 < kept < 30
    assert losses(two) == losses(one)[:kept]
    # Other first weights: all comes from what was kept.
    assert start(images.root, two, seed=4, resume=True).wait() == 0
    assert losses(two) == losses(one)
    end, expected = (torch.load(run / "end.pt", weights_only=True) for run in (two, one))
    assert [name for name, value in expected.items() if not torch.equal(end[name], value)] == []


class Counting(Watcher):
    def __init__(self) -> None:
        self.rows: list[EpochRow] = []
        self.corrupt: list[str] = []

    def epoch_ends(self, row: EpochRow) -> None:
        self.rows.append(row)

    def corrupt_image(self, name: str) -> None:
        self.corrupt.append(Path(name).name)


def test_corrupt_images_are_told_and_counted(images: LabelledImages, tmp_path: Path) -> None:
    (images.root / "class0" / "5.png").write_bytes(b"no image")
    watcher = Counting()
    train(seeded_network(), images, options=OPTIONS, run=tmp_path / "run", watcher=watcher)
    assert [row.corrupt for row in watcher.rows] == [1, 1]
    assert watcher.corrupt == ["5.png"]


def test_divergence_stops_and_keeps_the_last_good_epoch(
    images: LabelledImages, tmp_path: Path
) -> None:
    model = seeded_network()

    class Poison(Watcher):
        def epoch_ends(self, row: EpochRow) -> None:
            nn.init.constant_(model.fc.bias, float("nan"))

    with pytest.raises(TrainingError, match=r"not finite at epoch 2, batch 1: .*last good state"):
        train(model, images, options=OPTIONS, run=tmp_path / "run", watcher=Poison())
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    assert all(value.isfinite().all() for value in state.values())


def pack_quietly(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is untrained
        return pack(model.eval())


def refused(words: str, kind: type[Exception] = TrainingError) -> Any:
    return pytest.raises(kind, match=words)


def test_what_cannot_be_trained(images: LabelledImages, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with refused("not a binarized model", ConversionError):
        train(float_network(), images, options=OPTIONS, run=run)
    with refused("the model is packed"):
        packed = pack_quietly(small_network())
        train(packed, images, options=OPTIONS, run=run)
    with refused("3 classes.*the model has 4", DataError):
        train(small_network(classes=4), images, options=OPTIONS, run=run)
    with refused("teacher has 4 classes, the model 3"):
        train(small_network(), images, options=OPTIONS, run=run, teacher=float_network(4))
    with refused("needs a teacher"):
        train(small_network(), images, options=replace(OPTIONS, loss="distribution"), run=run)
    with refused("fewer than one batch", DataError):
        options = replace(OPTIONS, images=replace(IMAGES, batch_size=100))
        train(small_network(), images, options=options, run=run)
    with refused("unknown optimizer 'adamv'; did you mean 'adam", LookupError):
        train(small_network(), images, options=replace(OPTIONS, opt="adamv"), run=run)
    assert not (run / "last.pt").exists()


def test_a_run_is_never_overwritten_or_mixed_up(images: LabelledImages, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with refused("nothing to resume"):
        train(small_network(), images, options=OPTIONS, run=run, resume=True)
    train(small_network(), images, options=OPTIONS, run=run)
    with refused("holds a run: go on with --resume"):
        train(small_network(), images, options=OPTIONS, run=run)
    with refused("other settings: lr was 0.005, is 0.1"):
        train(small_network(), images, options=replace(OPTIONS, lr=0.1), run=run, resume=True)
    with refused("other settings: recipe"):
        train(small_network("plain"), images, options=OPTIONS, run=run, resume=True)
    before = (run / "last.pt").read_bytes()
    (run / "last.pt").write_bytes(before[:1000])
    with refused("cannot be resumed from"):
        train(small_network(), images, options=OPTIONS, run=run, resume=True)


def test_a_finished_run_resumes_to_itself(images: LabelledImages, tmp_path: Path) -> None:
    one = train(seeded_network(), images, options=OPTIONS, run=tmp_path / "run")
    two = train(small_network(), images, options=OPTIONS, run=tmp_path / "run", resume=True)
    assert same(one.model, two.model)
    assert [row.seconds for row in one.rows] == [row.seconds for row in two.rows]


@pytest.mark.parametrize("loss", ["distribution", "both", None])
def test_a_teacher_is_followed_and_left_alone(
    images: LabelledImages, tmp_path: Path, loss: Any
) -> None:
    teacher = float_network()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    options = replace(OPTIONS, loss=loss)
    train(seeded_network(), images, options=options, run=tmp_path / "run", teacher=teacher)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_amp_and_averaged_weights(images: LabelledImages, tmp_path: Path) -> None:
    # Not smaller: oneDNN's bfloat16 gradients of strided kernels on maps of one pixel may be NaN.
    larger = replace(IMAGES, size=(3, 64, 64))
    options = replace(OPTIONS, amp="bfloat16", ema=0.5, images=larger)
    images = open_images(images.root, larger, training=True)
    done = train(seeded_network(), images, options=options, run=tmp_path / "run")
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    average: dict[str, Tensor] = state["average"]
    assert all(torch.equal(value, average[name]) for name, value in done.model.state_dict().items())
    assert not torch.equal(average["fc.weight"], state["model"]["fc.weight"])


def test_poly_decays_linearly(images: LabelledImages, tmp_path: Path) -> None:
    rates: list[float] = []

    class Watch(Watcher):
        def batch_done(self, loss: float, images: int, lr: float) -> None:
            rates.append(lr)

    options = replace(OPTIONS, sched="poly", lr=0.6)
    train(seeded_network(), images, options=options, run=tmp_path / "run", watcher=Watch())
    assert rates == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.0])


def test_torchvisions_auxiliary_heads_are_left_to_it(tmp_path: Path) -> None:
    import torchvision

    folder = draw_folder(tmp_path / "images", each=2)
    options = replace(OPTIONS, epochs=1, images=replace(IMAGES, size=(3, 64, 64), batch_size=2))
    network = torchvision.models.googlenet(num_classes=3, init_weights=False, aux_logits=True)
    images = open_images(folder, options.images, training=True)
    done = train(binarize(network), images, options=options, run=tmp_path / "run")
    assert len(done.rows) == 1


@pytest.fixture(autouse=True)
def _handlers_are_put_back() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) == before
