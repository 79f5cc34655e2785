"""Saving and loading: a file is data, the plan is replayed, and what does not fit is refused."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from el_convert.atomic import names_folder, replace_file
from el_convert.convert import apply, conversion_of, copy_model, floating_dtype
from el_convert.errors import CheckpointError, ConversionError, ElConvertError, UnknownNameError
from el_convert.folders import (
    WEIGHTS,
    check_present,
    read_folder,
    read_safetensors,
    write_folder,
    write_safetensors,
)
from el_convert.header import KEY, Header, geometry_of, parse_header, write_header
from el_convert.limits import (
    Allowance,
    check_activations,
    check_archive,
    check_built,
    check_size,
    room_for,
)
from el_convert.packed import PackedConv
from el_convert.packing import pack_layers
from el_convert.patterns import find_pattern
from el_convert.planning import NORMS, Conversion
from el_convert.state import check_tensors, difference, gather, pooled, restored, shapes
from el_convert.tracing import is_convolution, join
from el_convert.zoo import Source, create, find_source, input_spec, source_of

_PASSING = ("training", "grad_checkpointing", "pretrained_cfg", "default_cfg", "_model_args")
_SUFFIXES = (".pt", ".safetensors")
_BRING = "load(path, model=...) with the float model it was made from"


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    source: Source | str | None = None,
    half: bool = False,
) -> None:
    """Write a binarized or packed model to a `.pt` or `.safetensors` file, or to a folder.

    The file is `{"el_convert": <JSON header>, "state_dict": {...}}`: `torch.load` reads it with
    `weights_only=True`; in `.safetensors` the header is the metadata. A folder, as the Hugging Face
    hub has them, gets `model.safetensors` and `config.json`, each with the header. Saving proves
    itself: the float skeleton is rebuilt, the conversion replayed and compared before anything is
    written.

    Args:
        model: made by `binarize`, `pack` or `load`.
        path: where to; an existing file is replaced in one step or stays as it was. "bnn/" and the
            name of an existing folder mean a folder, other files of which are left alone.
        source: "resnet50", "timm/...", "torchvision/..." or a Source. By default what the model
            itself says. Without a source the file loads only with `load(path, model=...)`.
        half: store floating-point tensors in float16; `load` gives them their dtype back, with
            what that rounds off lost.

    Warns:
        UserWarning: what the model says of itself does not rebuild it, so the file names no source.

    Raises:
        ConversionError: the model is not binarized.
        CheckpointError: the suffix is another, the given source does not rebuild this model, the
            folder holds another program's model, or the file cannot be written.
        UnknownNameError: `source` is no model's name.

    Example:
        >>> import tempfile, timm
        >>> from el_convert.convert import binarize
        >>> model = binarize(timm.create_model("resnet18", num_classes=10))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, f"{folder}/bnn.pt")
        ...     type(load(f"{folder}/bnn.pt")).__name__
        'ResNet'
    """
    folder = names_folder(path, _SUFFIXES)
    path = Path(path) if folder else _checked_path(path)
    conversion = conversion_of(model)
    known = find_source(source) if isinstance(source, str) else source or source_of(model)
    header = _describe(model, conversion, known, half)
    if known is not None:
        problem = _rebuild_problem(model, header, known)
        if problem and source is not None:
            raise CheckpointError(
                f"{known} does not rebuild this model ({problem}): leave source out and read the "
                f"file by {_BRING}"
            )
        if problem:
            warnings.warn(
                f"{path} will not say how to build its model, as {known} does not rebuild it "
                f"({problem}): read it by {_BRING}",
                UserWarning,
                stacklevel=2,
            )
            header = replace(header, source=None)
    state, text = gather(model, half), write_header(header)
    parse_header(text)  # what load would refuse must not be written
    try:
        if folder:
            write_folder(path, text, state)
        else:
            replace_file(path, lambda part: _write(part, path.suffix, text, state))
    except CheckpointError:
        raise
    except Exception as error:  # each format raises its own; all mean the same to the user
        raise CheckpointError(
            f"could not write {path}: {_reason(error)}; nothing was changed"
        ) from error


def _reason(error: BaseException) -> BaseException:
    """The operating system's own word where there is one: torch hides it behind its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def _checked_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise CheckpointError(
            f"{path}: the name must end in {' or '.join(_SUFFIXES)}, or in / for a folder"
        )
    return path


def _describe(
    model: nn.Module, conversion: Conversion, source: Source | None, half: bool
) -> Header:
    modules = dict(model.named_modules(remove_duplicate=False))
    convs = {path: module for path, module in modules.items() if is_convolution(module)}
    geometry = {d.path: geometry_of(convs[d.path]) for d in conversion.binarized}
    dtype = str(floating_dtype(model)).removeprefix("torch.")
    packed = any(isinstance(module, PackedConv) for module in modules.values())
    stored = "float16" if half and dtype != "float16" else ""
    spec = input_spec(model, source)
    return Header(conversion, geometry, source, spec, dtype, packed=packed, stored=stored)


def _rebuild_problem(model: nn.Module, header: Header, source: Source) -> str:
    """Why the header would not give this model again; "" when it does."""
    try:
        twin = _skeleton(source, header.dtype, room_for(model.state_dict()))
        twin = _replay(twin, header)
    except ElConvertError as error:
        return str(error)
    problem = difference(shapes(twin.state_dict()), shapes(model.state_dict()))
    # Options that leave no parameter (pooling, activations, dropout) show elsewhere.
    lines = zip_longest(_lines(twin), _lines(model), fillvalue="nothing")
    differing = next((f"{a} became {b}" for a, b in lines if a != b), "")
    return problem or differing or _changed_option(twin, model)


def _lines(model: nn.Module) -> list[str]:
    """Like the repr, without children that are None."""
    modules = model.named_modules(remove_duplicate=False)
    return [f"{path}: {type(module).__name__}({module.extra_repr()})" for path, module in modules]


def _changed_option(twin: nn.Module, model: nn.Module) -> str:
    """An attribute that shows neither in a parameter nor in the repr; "" when there is none."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, built in twin.named_modules(remove_duplicate=False):
        own = vars(modules[path])
        for name, value in vars(built).items():
            if name not in own or name in _PASSING:
                continue
            settings = {_setting(value), _setting(own[name])}
            if len(settings) > 1 and None not in settings:
                return f"{join(path, name)}: {value!r} became {own[name]!r}"
    return ""


def _setting(value: Any) -> str | None:
    """A text that is equal for equal settings; None for what is no setting, such as a tensor."""
    if isinstance(value, (bool, int, float, str)):
        return repr(value)
    if type(value) in (list, tuple):
        parts = [_setting(part) for part in value]
    elif type(value) is dict:
        parts = [_setting(part) for pair in value.items() for part in pair]
    elif type(value).__module__.startswith("torchvision.") and not isinstance(value, nn.Module):
        parts = [_setting(part) for part in vars(value).values()]  # box coders, matchers
    else:
        return None
    # A list is like a tuple: either may come of the same call.
    return None if None in parts else f"({', '.join(map(str, parts))})"


def _skeleton(source: Source, dtype: str, room: int) -> nn.Module:
    """Build the float model, in no more memory than `room`, which the tensors account for."""
    with torch.random.fork_rng(devices=[]), Allowance(room):
        if "img_size" in source.kwargs:  # tables of positions grow with its fourth power
            with suppress(ConversionError), torch.device("meta"):
                check_built(create(source), room)
        return create(source).to(getattr(torch, dtype))


def _write(path: Path, suffix: str, header: str, state: dict[str, Tensor]) -> None:
    if suffix == ".pt":
        with path.open("wb") as stream:  # given a name, torch writes that into the file
            torch.save({KEY: header, "state_dict": pooled(state)}, stream)
    else:
        write_safetensors(path, header, state)


def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Read a model that `save` wrote. Never runs code from the file, never half-loads.

    Args:
        path: a `.pt` or `.safetensors` file, or a folder with `model.safetensors` and
            `config.json`. Nothing is ever downloaded.
        model: the float model it was made from, for models of neither library; left as it was.
        device: where the result goes.

    Returns:
        The binarized model in train mode, as its library builds it; a packed one in eval mode.

    Raises:
        CheckpointError: the file is missing, truncated, foreign, newer, or does not fit; says why.

    Example:
        See `save`.
    """
    header, state = read(path)
    try:
        room = room_for(state)
        check_activations(header.conversion.activations, room)
        # A copy: a refusal must leave the user's model alone.
        twin = _checked_skeleton(header, state, room) if model is None else copy_model(model)
        twin = _replay(twin, header)
    except ElConvertError as error:
        raise CheckpointError(f"{path}: {error}") from error
    own = twin.state_dict()
    if header.stored:
        state = {key: restored(value, own.get(key)) for key, value in state.items()}
    problem = difference(shapes(own), shapes(state))
    if problem:
        raise CheckpointError(
            f"{path} does not fit {header.source or 'the given model'}: {problem}"
        )
    own.update(state)  # not `state` itself: some models want the version marks of their own
    twin.load_state_dict(own, strict=True)
    return (twin.eval() if header.packed else twin).to(device)


def read(path: str | os.PathLike[str]) -> tuple[Header, dict[str, Tensor]]:
    """Read and check a file's header and tensors, without building a model.

    Raises:
        CheckpointError: as `load`.
    """
    path = Path(path)
    folder = path.is_dir()
    if not folder:
        check_present(path)
        _checked_path(path)
    read_file = _read_pt if path.suffix == ".pt" else _read_safe
    try:
        text, state = read_folder(path) if folder else read_file(path)
    except CheckpointError:
        raise
    except Exception as error:  # torch, zipfile and pickle raise a dozen kinds for a damaged file
        first = str(error).split("\n")[0]
        raise CheckpointError(
            f"{path} is damaged, or is no file of el_convert, or holds code: {first}"
        ) from error
    try:
        header = parse_header(text)
        check_tensors(state)
        check_size(state, path / WEIGHTS if folder else path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return header, dict(state)


def _read_pt(path: Path) -> tuple[Any, Any]:
    check_archive(path)
    # Mapped, as then no tensor can reach beyond the file, and none is read before it is wanted.
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "resize" not in str(error):  # torch's word where the file ends before a tensor does
            raise
        raise CheckpointError(
            f"{path} is damaged, get it anew: a tensor claims more bytes than the file has"
        ) from error
    if not isinstance(content, dict) or set(content) != {KEY, "state_dict"}:
        raise CheckpointError(f"{path} is no file of el_convert: it holds other things")
    return content[KEY], content["state_dict"]


def _read_safe(path: Path) -> tuple[Any, Any]:
    text, state = read_safetensors(path)
    if text is None:
        raise CheckpointError(f"{path} is no file of el_convert: its metadata lacks {KEY!r}")
    return text, state


def _checked_skeleton(header: Header, state: Mapping[str, Tensor], room: int) -> nn.Module:
    """Build the skeleton, after making sure that the file holds as many classes as it claims."""
    if header.source is None:
        raise CheckpointError(f"the file does not say what its model is built from: use {_BRING}")
    classes = header.source.kwargs.get("num_classes", 0)
    # Detection heads have several rows for each class.
    rows = [value.shape[0] for value in state.values() if value.dim()]
    if classes and not any(count and count % classes == 0 for count in rows):
        raise CheckpointError(f"its header claims {classes} classes, its tensors do not")
    return _skeleton(header.source, header.dtype, room)


def _replay(model: nn.Module, header: Header) -> nn.Module:
    """Check the plan against the skeleton, then apply it. Never matches anew."""
    modules = dict(model.named_modules(remove_duplicate=False))
    present = [path for path, module in model.named_modules() if is_convolution(module)]
    for decision in header.conversion.binarized:
        conv = modules.get(decision.path)
        if not is_convolution(conv):
            raise CheckpointError(f"layer {decision.path!r} is no convolution of {_kind(model)}")
        if geometry_of(conv) != header.geometry[decision.path]:
            raise CheckpointError(
                f"layer {decision.path!r} is {geometry_of(conv)}, "
                f"the file says {header.geometry[decision.path]}"
            )
        _check_pattern(decision.path, decision.pattern)
        if decision.norm and type(modules.get(decision.norm)) not in NORMS:
            raise CheckpointError(f"{decision.norm!r} is no norm of {_kind(model)}")
    for change in header.conversion.activations:
        if change.action == "replace" and type(modules.get(change.path)).__name__ != change.kind:
            raise CheckpointError(f"{change.path!r} is no {change.kind} of {_kind(model)}")
    odd = sorted({d.path for d in header.conversion.decisions} ^ set(present))
    if odd:
        raise CheckpointError(f"the file and {_kind(model)} do not have the same layers: {odd[0]}")
    model = apply(model, header.conversion)
    return pack_layers(model) if header.packed else model


def _kind(model: nn.Module) -> str:
    return type(model).__name__


def _check_pattern(path: str, name: str) -> None:
    try:
        pattern = find_pattern(name)
    except UnknownNameError:
        raise CheckpointError(
            f"layer {path!r} was converted by pattern {name!r}, which is not registered here: "
            "call register_pattern with it before load"
        ) from None
    if pattern.action != "binarize":
        raise CheckpointError(f"layer {path!r}: pattern {name!r} does not binarize")
