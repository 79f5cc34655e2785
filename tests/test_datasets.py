"""Reading labelled images: the same whoever reads them, and refused before work is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pictures import IMAGES, draw_folder, pack_tar
from torch import Tensor

from el_convert.datasets import (
    EpochSampler,
    check_classes,
    evaluation_loader,
    find_splits,
    image_transform,
    open_images,
    split_of,
    training_loader,
)
from el_convert.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "images")


def test_a_tar_is_its_folder(folder: Path) -> None:
    before = set(folder.parent.rglob("*"))
    one = open_images(folder, IMAGES, training=False)
    path = pack_tar(folder)
    other = open_images(path, IMAGES, training=False)
    assert one.classes == other.classes == ("class0", "class1", "class2")
    for (image, label), (same, same_label) in zip(list(one), list(other), strict=True):
        assert torch.equal(image, same)
        assert label == same_label
    assert set(folder.parent.rglob("*")) == before | {path}  # no cache was left


def test_pixels_are_normalized(folder: Path) -> None:
    options = replace(IMAGES, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    image, label = open_images(folder, options, training=False)[0]
    assert isinstance(image, Tensor)
    assert image.shape == (3, 16, 16)
    assert -2 <= float(image.min()) < float(image.max()) <= 2
    assert image[label].mean() > image[(label + 1) % 3].mean()  # its colour is the brightest


def test_grey_models_read_grey_images(folder: Path) -> None:
    options = replace(IMAGES, size=(1, 16, 16), mean=(0.5,), std=(0.5,))
    assert open_images(folder, options, training=True)[0][0].shape == (1, 16, 16)
    with pytest.raises(DataError, match="1 or 3 channels, the model takes 4"):
        image_transform(replace(IMAGES, size=(4, 16, 16)), training=False)


def batches(folder: Path, epoch: int, batch: int = 0, **options: object) -> list[Tensor]:
    chosen = replace(IMAGES, **options)  # type: ignore[arg-type]
    images = open_images(folder, chosen, training=True)
    order = EpochSampler(len(images), chosen.batch_size, 7)
    order.go_to(epoch, batch)
    return [images for images, _ in training_loader(images, chosen, order)]


def test_an_epoch_is_the_same_by_any_worker_and_from_any_batch(folder: Path) -> None:
    whole = batches(folder, 1)
    torch.manual_seed(99)
    assert all(map(torch.equal, whole, batches(folder, 1, workers=1)))
    assert all(map(torch.equal, whole[2:], batches(folder, 1, 2)))
    assert len(batches(folder, 1, 2)) == 1
    assert not torch.equal(whole[0], batches(folder, 2)[0])


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_a_batch_out(world: int) -> None:
    alone = list(EpochSampler(40, 4 * world, 3))
    shares = [list(EpochSampler(40, 4, 3, rank, world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    for step in range(len(alone) // (4 * world)):
        together = {item for share in shares for item in share[4 * step : 4 * step + 4]}
        assert together == set(alone[4 * world * step : 4 * world * (step + 1)])


def test_evaluation_sees_every_image_once(folder: Path) -> None:
    images = open_images(folder, IMAGES, training=False)
    labels = [
        torch.cat([labels for _, labels in evaluation_loader(images, IMAGES, rank=r, world=5)])
        for r in range(5)
    ]
    assert torch.cat(labels).bincount().tolist() == [8, 8, 8]


def test_splits(tmp_path: Path) -> None:
    assert find_splits(tmp_path, None) == (tmp_path, None)
    (tmp_path / "train").mkdir()
    assert find_splits(tmp_path, None) == (tmp_path / "train", None)
    (tmp_path / "validation").mkdir()
    assert find_splits(tmp_path, None) == (tmp_path / "train", tmp_path / "validation")
    assert find_splits(tmp_path, "other.tar") == (tmp_path / "train", Path("other.tar"))
    assert split_of(tmp_path) == tmp_path / "validation"


def test_first_keeps_classes_even(folder: Path) -> None:
    images = open_images(folder, IMAGES, training=False).first(6)
    assert [label for _, label in list(images)] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(DataError, match="has 6 images, not 7"):
        images.first(7)


def test_what_is_not_there_is_refused(tmp_path: Path, folder: Path) -> None:
    def refused(root: Path, words: str) -> None:
        with pytest.raises(DataError, match=words):
            open_images(root, IMAGES, training=True)

    refused(tmp_path / "nowhere", "nowhere does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no images")
    (tmp_path / "text.tar").write_text("no tar")
    refused(tmp_path / "text.tar", "neither a folder nor a .tar file")
    (folder / "class9").mkdir()
    refused(folder, "no image in class9")


def test_classes_must_be_the_models(folder: Path) -> None:
    images = open_images(folder, IMAGES, training=True)
    check_classes(images, 3)
    with pytest.raises(DataError, match=r"3 classes \(class0.*the model has 10.*--num-classes 3"):
        check_classes(images, 10)


def test_too_few_images_for_a_batch(folder: Path) -> None:
    images = open_images(folder, IMAGES, training=True)
    with pytest.raises(DataError, match=r"24 images, fewer than one batch of 50.*--batch-size"):
        training_loader(images, IMAGES, EpochSampler(24, 25, 0, 0, 2))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("tar", [False, True])
def test_corrupt_images_are_skipped_and_named(folder: Path, workers: int, tar: bool) -> None:
    (folder / "class1" / "3.png").write_bytes(b"no image")
    whole = (folder / "class2" / "0.png").read_bytes()
    (folder / "class2" / "0.png").write_bytes(whole[: len(whole) // 2])
    options = replace(IMAGES, workers=workers)
    images = open_images(pack_tar(folder) if tar else folder, options, training=False)
    images[1]  # a worker must not share the open tar
    labels = torch.cat([labels for _, labels in evaluation_loader(images, options)])
    assert labels.bincount().tolist() == [8, 8, 8]
    assert sorted(Path(name).name for name in images.corrupt_names()) == ["0.png", "3.png"]
    assert images.corrupt_names() == []


def test_corrupt_images_can_be_refused(folder: Path) -> None:
    (folder / "class1" / "3.png").write_bytes(b"no image")
    images = open_images(folder, replace(IMAGES, corrupt="refuse"), training=False)
    with pytest.raises(DataError, match=r"class1/3.png is no readable image.*--corrupt skip"):
        list(images)


def test_nothing_but_corrupt_images_ends(tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "bad", 1, 3)
    for path in (folder / "class0").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="in a row do not decode"):
        open_images(folder, IMAGES, training=True)[0]
