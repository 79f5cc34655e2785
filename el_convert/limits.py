"""What a file may claim: no more than it holds, known before memory is spent on it."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from el_convert.activations import ActivationChange
from el_convert.errors import CheckpointError

# A model is built of more than its file keeps: a backbone's classifier, norms that are folded.
# torchvision's ssd300_vgg16 has the worst ratio, 4.5, and needs both.
_FACTOR, _ALWAYS = 4, 256 << 20
_FLOAT = 4  # bytes
_FACTORIES: frozenset[Callable[..., Any]] = frozenset(
    {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange}
)


def check_archive(path: Path) -> None:
    """Refuse a `.pt` file whose records become more in memory than they are on disk.

    Raises:
        CheckpointError: a record is compressed, or records overlap.
        zipfile.BadZipFile: it is no archive, or a damaged one.
    """
    with zipfile.ZipFile(path) as archive:
        entries, comment = archive.infolist(), archive.comment
    foreign = f"{path} is no file of el_convert"
    compressed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]
    if compressed:
        raise CheckpointError(
            f"{foreign}: its record {compressed[0]!r} is compressed, which save never does, and "
            "may be of any size in memory; write it anew by save"
        )
    claimed, size = sum(e.file_size for e in entries), path.stat().st_size
    if claimed > size:
        raise CheckpointError(
            f"{path} is damaged, get it anew: its records claim {claimed} bytes, it has {size}"
        )
    # Readers disagree on archives with anything before or after: torch could see another one.
    if comment or min((e.header_offset for e in entries), default=1):
        raise CheckpointError(f"{foreign}: something is put before or after its records")


def check_size(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that claim more bytes than their file has.

    Raises:
        CheckpointError: says how many.
    """
    # By place, as several may share one.
    claimed = sum({v.untyped_storage().data_ptr(): _bytes(v) for v in state.values()}.values())
    size = path.stat().st_size
    if claimed > size:
        raise CheckpointError(f"its tensors claim {claimed} bytes, it has {size}: get it anew")


def _bytes(value: Tensor) -> int:
    return value.untyped_storage().nbytes()


def room_for(state: Mapping[str, Any]) -> int:
    """Bytes a model may need that is stored as these tensors; a bit may stand for a float."""
    held: dict[int, int] = {}
    for value in state.values():
        if isinstance(value, Tensor):
            floats = 8 if value.dtype == torch.uint8 else 1
            place = value.untyped_storage().data_ptr()  # several tensors may share one
            count = _bytes(value) // value.element_size() * floats
            held[place] = max(count, held.get(place, 0))
    return _ALWAYS + _FACTOR * _FLOAT * sum(held.values())


def check_activations(changes: Iterable[ActivationChange], room: int) -> None:
    """Refuse new activations that need more than the file has room for.

    Raises:
        CheckpointError: says how many channels.
    """
    channels = sum(change.channels for change in changes if change.action == "replace")
    if 3 * _FLOAT * channels > room:  # RPReLU has three parameters
        raise CheckpointError(f"its activations claim {channels} channels{_too_many(room)}")


def check_built(model: nn.Module, room: int) -> None:
    """Refuse a model, on no device, that would need more than the file has room for.

    Raises:
        CheckpointError: says how much.
    """
    needed = sum(value.nbytes for value in [*model.parameters(), *model.buffers()])
    if needed > room:
        raise CheckpointError(f"its model would need {needed >> 20} MiB{_too_many(room)}")


class Allowance(TorchFunctionMode):
    """While it is entered, a tensor that exceeds what is left is refused before it is made.

    Args:
        room: bytes, in all.

    Raises:
        CheckpointError: where that is used up.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = self.left = room

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func in _FACTORIES:
            options = {name: given[name] for name in given if name not in ("generator", "out")}
            self.left -= func(*args, **{**options, "device": "meta"}).nbytes
            if self.left < 0:
                needed = self.room - self.left
                raise CheckpointError(
                    f"its model would need {needed >> 20} MiB or more{_too_many(self.room)}"
                )
        return func(*args, **given)


def _too_many(room: int) -> str:
    return (
        f", its tensors account for {room >> 20} MiB at most: the header and the tensors are not "
        "of one model; save it anew, or use load(path, model=...) if you trust the file"
    )
