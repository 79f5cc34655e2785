"""Labelled images in folders or tar files: opened by timm, checked before they are trained on."""

from __future__ import annotations

import multiprocessing
import random
import tarfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, Literal

import numpy
import timm.data
import torch
from PIL import Image
from timm.data.readers import create_reader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from el_convert.errors import DataError, first_few, first_line
from el_convert.train_options import ImageOptions

_TRAIN, _VALIDATION = ("train", "training"), ("val", "validation", "test")
_MANY_CORRUPT = 50
Sample = tuple[Any, int]


class LabelledImages(Dataset[Sample]):
    """One folder per class, as a folder or a tar file, read by timm.

    Args:
        root: the folder or the tar file.
        transform: what is done to each image.
        corrupt: images that do not decode are "skip"ped (a neighbour stands in) or "refuse"d.

    Attributes:
        classes: class names, sorted; a label is an index into them.

    Raises:
        DataError: nothing is there, it is no tar file, it holds no image, or a class folder holds
            none. On reading a sample: it does not decode, and `corrupt` is "refuse".
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable[[Image.Image], Any] | None = None,
        corrupt: Literal["skip", "refuse"] = "skip",
    ) -> None:
        self.root, self.corrupt = Path(root), corrupt
        self._reader = _open(self.root)
        weakref.finalize(self, _close, self._reader)
        self.transform = transform
        names = _class_indices(self._reader)
        self._chosen: Sequence[int] = range(len(self._reader))
        self.classes = tuple(sorted(names, key=names.__getitem__))
        _refuse_empty_classes(self.root, set(self.classes))
        # Through the fork or the pickle that starts a worker, so that all report to one place.
        self._found: SimpleQueue[str] = multiprocessing.get_context().SimpleQueue()

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        if isinstance(index, tuple):  # whoever loads it, at whatever time, an image is cut the same
            seed, index = index
            seed_all(seed)
        if not 0 <= index < len(self):
            raise IndexError(index)  # which ends a loop over all
        for near in range(_MANY_CORRUPT):
            at = self._chosen[(index + near) % len(self)]
            try:
                stream, label = self._reader[at]
                with stream, Image.open(stream) as image:
                    image.load()
                return (self.transform(image) if self.transform else image), label
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                name = str(self._reader.filename(at))
                if self.corrupt == "refuse":
                    raise DataError(
                        f"{self.root}: {name} is no readable image ({first_line(error)}): mend or "
                        "delete it, or let such images be skipped with --corrupt skip"
                    ) from None
                self._found.put(name)
        raise DataError(f"{self.root}: {_MANY_CORRUPT} images in a row do not decode, up to {name}")

    def first(self, count: int) -> LabelledImages:
        """Keep only `count` images, every class evenly; gives these images back.

        Raises:
            DataError: there are fewer.
        """
        if count > len(self):
            raise DataError(f"{self.root} has {len(self)} images, not {count}")
        step = len(self) / count
        self._chosen = [int(place * step) for place in range(count)]
        return self

    def reopen(self) -> None:
        """Close an open tar file: processes that share one would move each other's place in it."""
        _close(self._reader)

    def corrupt_names(self) -> list[str]:
        """Images found not to decode since the last call, by any worker, each as often as met."""
        names = []
        while not self._found.empty():
            names.append(self._found.get())
        return names


def _open(root: Path) -> Any:
    if not root.exists():
        raise DataError(f"{root} does not exist: name a folder or a tar file of images")
    if root.is_file() and (root.suffix != ".tar" or not tarfile.is_tarfile(root)):
        raise DataError(f"{root} is neither a folder nor a .tar file")
    try:
        # Its cache of a tar's index would be a pickle beside the user's file.
        kwargs = {"cache_tarinfo": False} if root.is_file() else {}
        reader = create_reader("", str(root), **kwargs)
    except (RuntimeError, AssertionError, tarfile.TarError) as error:
        raise DataError(f"{root} holds no images: one folder per class is expected") from error
    if not len(reader):
        raise DataError(f"{root} holds no images: one folder per class is expected")
    return reader


def _close(reader: Any) -> None:
    """Close the tar file, which timm opens on the first read; the next read opens it again."""
    state = getattr(reader, "tar_state", None)
    if state is not None and getattr(state, "tf", None) is not None:
        state.tf.close()
        state.reset()


def _class_indices(reader: Any) -> dict[str, int]:
    names: dict[str, int] = getattr(reader, "class_to_idx", None) or reader.class_name_to_idx
    return names


def _refuse_empty_classes(root: Path, classes: set[str]) -> None:
    if not root.is_dir():
        return
    folders = {path.name for path in root.iterdir() if path.is_dir()}
    empty = sorted(folders - {name.split("/")[0] for name in classes})
    if empty:
        raise DataError(f"{root}: no image in {first_few(empty)}: fill or delete these folders")


def find_splits(data: str | Path, validation: str | Path | None) -> tuple[Path, Path | None]:
    """Where the images to train on are, and those to validate on.

    Args:
        data: a folder of classes, a folder with `train` and `val` in it, or a tar file.
        validation: likewise; None looks for `val` beside `train`.
    """
    root = Path(data)
    named = None if validation is None else split_of(validation)
    train = _subfolder(root, _TRAIN)
    if train is None:
        return root, named
    return train, named or _subfolder(root, _VALIDATION)


def split_of(data: str | Path) -> Path:
    """The subfolder to validate on where there is one, else `data` itself."""
    return _subfolder(Path(data), _VALIDATION) or Path(data)


def _subfolder(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def image_transform(options: ImageOptions, *, training: bool) -> Callable[[Image.Image], Any]:
    """timm's transform for training or evaluation, after a conversion to the model's channels."""
    common = {"mean": options.mean, "std": options.std, "interpolation": "bilinear"}
    mode = _image_mode(options.size[0])
    size = options.size[1:] if options.size[1] != options.size[2] else options.size[1]
    made: Callable[[Image.Image], Any]
    if training and options.augment:
        made = timm.data.create_transform(
            size,
            is_training=True,
            scale=options.scale,
            hflip=options.hflip,
            color_jitter=options.color_jitter or None,
            auto_augment=options.auto_augment,
            re_prob=options.re_prob,
            **common,
        )
    else:
        made = timm.data.create_transform(size, crop_pct=options.crop_pct, **common)
    return _Converted(mode, made)


class _Converted:
    """A class, not a closure, so that it can be sent to a worker."""

    def __init__(self, mode: str, transform: Callable[[Image.Image], Any]) -> None:
        self.mode, self.transform = mode, transform

    def __call__(self, image: Image.Image) -> Any:
        return self.transform(image.convert(self.mode))


def _image_mode(channels: int) -> str:
    if channels not in (1, 3):
        raise DataError(f"images have 1 or 3 channels, the model takes {channels}")
    return "L" if channels == 1 else "RGB"


def open_images(root: str | Path, options: ImageOptions, *, training: bool) -> LabelledImages:
    """Images ready for a model.

    Raises:
        DataError: see `LabelledImages`.
    """
    return LabelledImages(root, image_transform(options, training=training), options.corrupt)


def check_classes(images: LabelledImages, classes: int) -> None:
    """Refuse images whose classes are not the model's.

    Raises:
        DataError: the numbers differ.
    """
    if len(images.classes) != classes:
        raise DataError(
            f"{images.root} has {len(images.classes)} classes "
            f"({first_few(images.classes, 4)}) but the model has {classes}: "
            f"convert it with --num-classes {len(images.classes)}"
        )


def training_loader(
    images: LabelledImages, options: ImageOptions, order: EpochSampler
) -> DataLoader[Sample]:
    """Batches of what a sampler chooses.

    Raises:
        DataError: there are fewer images than one batch of all processes takes.
    """
    if len(order) == 0:
        raise DataError(
            f"{images.root} has {len(images)} images, fewer than one batch of {order.whole_batch}: "
            "pass a smaller --batch-size"
        )
    return _loader(images, options, order)


def evaluation_loader(
    images: LabelledImages, options: ImageOptions, *, rank: int = 0, world: int = 1
) -> DataLoader[Sample]:
    """Batches of this process: every `world`-th image, in order, none twice."""
    return _loader(images, options, range(rank, len(images), world))


class EpochSampler(Sampler[tuple[int, int]]):
    """A shuffled share of the images, each with the seed that its augmentation draws from.

    What an epoch holds depends on seed and epoch alone, so a run can go on anywhere, and `world`
    processes with batches of B see together, step by step, what one process with batches of
    `world * B` sees. The last batch of all processes is dropped unless it is full.

    Attributes:
        whole_batch: images of a step, over all processes.

    Args:
        count: images there are.
        batch_size: of one process.
        seed: of the run.
        rank, world: this process and how many there are.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self._count, self._batch, self._seed = count, batch_size, seed
        self._rank, self._world = rank, world
        self.whole_batch = batch_size * world
        self.go_to(0)

    def go_to(self, epoch: int, batch: int = 0) -> None:
        """What is yielded next: this epoch from this batch on."""
        self._epoch, self._skipped = epoch, batch * self._batch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.Generator().manual_seed(mix_seed(self._seed, self._epoch))
        whole = self._count - self._count % self.whole_batch
        shuffled = torch.randperm(self._count, generator=order)[:whole]
        for index in shuffled[self._rank :: self._world][self._skipped :].tolist():
            yield mix_seed(self._seed, self._epoch, index), index

    def __len__(self) -> int:
        return self._count // self.whole_batch * self._batch - self._skipped


def _loader(
    images: LabelledImages, options: ImageOptions, sampler: Sampler[Any] | Sequence[int]
) -> DataLoader[Sample]:
    return DataLoader(
        images,
        options.batch_size,
        sampler=sampler,
        num_workers=options.workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
    )


def _start_worker(_: int) -> None:
    worker = get_worker_info()
    if worker is not None and isinstance(worker.dataset, LabelledImages):
        worker.dataset.reopen()


def mix_seed(*parts: int) -> int:
    """One seed of several numbers, well spread."""
    words = numpy.random.SeedSequence([part % 2**32 for part in parts]).generate_state(1)
    return int(words[0])


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators: timm draws from all three."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def to_device(batch: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Images, laid out channels_last, and labels."""
    images, labels = batch
    return (
        images.to(device, non_blocking=True, memory_format=torch.channels_last),
        labels.to(device, non_blocking=True),
    )
