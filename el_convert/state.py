"""A model's tensors as a file holds them: gathered, checked and compared."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from el_convert.errors import CheckpointError

_SMALL = 1 << 16  # bytes; a large tensor's record costs nothing beside it
_PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64)


def gather(model: nn.Module, half: bool) -> dict[str, Tensor]:
    """A model's state_dict, on the CPU, contiguous, each tensor whole and stored once.

    Args:
        model: any module.
        half: give floating-point tensors in float16.

    Raises:
        CheckpointError: something in it is no tensor, or too large for float16.
    """
    state: dict[str, Tensor] = {}
    copies: dict[Any, Tensor] = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{key} of the state_dict is {type(value).__name__}, no tensor")
        # Cloned where it is a view or shared, so a file holds each once and nothing more.
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.numel() == 0 or place not in copies:
            plain = value.detach().cpu().contiguous().clone()
            copies[place] = _halved(key, plain) if half and value.is_floating_point() else plain
        state[key] = copies[place]
    return state


def pooled(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, small ones of a dtype in one storage; what is shared stays so.

    In a `.pt` file each storage is a record of its own, with 180 bytes of names and padding.

    Args:
        state: contiguous tensors.
    """
    small = {id(v): v for v in state.values() if 0 < v.nbytes <= _SMALL and v.dtype in _PLAIN}
    views: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(value.dtype for value in small.values()):
        group = {key: value for key, value in small.items() if value.dtype == dtype}
        pool = torch.cat([value.flatten() for value in group.values()])
        parts = torch.split(pool, [value.numel() for value in group.values()])
        for (key, value), part in zip(group.items(), parts, strict=True):
            views[key] = part.view(value.shape)
    return {name: views.get(id(value), value) for name, value in state.items()}


def _halved(key: str, value: Tensor) -> Tensor:
    half = value.half()
    if half.isinf().sum() > value.isinf().sum():
        raise CheckpointError(f"{key} has values beyond float16: leave half out")
    return half


def restored(value: Tensor, own: Tensor | None) -> Tensor:
    """A tensor stored in half precision in the dtype the model has it in."""
    stored = value.dtype == torch.float16 and own is not None and own.is_floating_point()
    return value.to(own.dtype) if stored and own is not None else value


def check_tensors(state: Any) -> None:
    """Refuse what is no plain tensor, and what claims more than the file holds.

    Raises:
        CheckpointError: names the tensor.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError("its state_dict is no mapping")
    for key, value in state.items():
        plain = type(value) is Tensor and value.layout == torch.strided and value.is_cpu
        if not isinstance(key, str) or not plain:
            raise CheckpointError(f"{key!r} of its state_dict is not a plain tensor")
        # A shape can claim more than the file holds, by strides of 0.
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"{key} claims shape {list(value.shape)}, which the file lacks")


def shapes(state: Mapping[str, Any]) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shape and dtype of every tensor, by name."""
    return {k: (list(v.shape), v.dtype) for k, v in state.items() if isinstance(v, Tensor)}


def difference(
    wanted: Mapping[str, tuple[list[int], torch.dtype]],
    given: Mapping[str, tuple[list[int], torch.dtype]],
) -> str:
    """What tells two sets of tensors apart, in words; "" when nothing does."""
    missing = [key for key in wanted if key not in given]
    extra = [key for key in given if key not in wanted]
    if missing or extra:
        near = [difflib.get_close_matches(key, extra, 1) for key in missing[:1]]
        hint = f" (there is {near[0][0]!r} instead)" if near and near[0] else ""
        parts = [f"{len(missing)} missing, first {missing[0]!r}{hint}"] if missing else []
        parts += [f"{len(extra)} unexpected, first {extra[0]!r}"] if extra else []
        return "tensors: " + "; ".join(parts)
    for key, expected in wanted.items():
        if given[key] != expected:
            return (
                f"{key} should be {expected[0]} {expected[1]}, is {given[key][0]} {given[key][1]}"
            )
    return ""
