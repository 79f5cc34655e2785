"""The header of a saved file: JSON in, checked data out. Nothing in a file is believed."""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch.nn.modules.conv import _ConvNd

from el_convert._version import __version__
from el_convert.activations import REPLACEABLE, ActivationChange
from el_convert.calls import FunctionalConv
from el_convert.errors import CheckpointError, ElConvertError
from el_convert.planning import Conversion, Decision
from el_convert.recipes import Recipe
from el_convert.zoo import InputSpec, Source

FORMAT = 1
KEY = "el_convert"
_MAX_WIDTH = 1 << 20
_DTYPES = ("float32", "float16", "bfloat16", "float64")
_FIELDS = {
    "format", "created_with", "source", "recipe", "packed", "dtype", "layers", "kept",
    "activations", "input",
}  # fmt: skip
_MAY_LACK = {"functional", "stored"}


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        conversion: replayed on the skeleton.
        geometry: of each binarized convolution, by path.
        source: where the skeleton comes from; None: the user brings it.
        input: what the model expects.
        dtype: of its floating-point parameters.
        created_with: versions of the writing program and its libraries.
        packed: whether binarized weights are stored as bits, see `PackedConv`.
        stored: dtype of the floating-point tensors in the file, where it is another than `dtype`.
    """

    conversion: Conversion
    geometry: Mapping[str, list[Any]]
    source: Source | None
    input: InputSpec
    dtype: str = "float32"
    created_with: Mapping[str, str] | None = None
    packed: bool = False
    stored: str = ""


def geometry_of(conv: _ConvNd) -> list[Any]:
    """The numbers that make a convolution: class, channels, kernel, stride, padding, ..."""
    kind = "ConvTranspose" if getattr(conv, "transposed", False) else "Conv"
    padding = conv.padding if isinstance(conv.padding, str) else list(conv.padding)
    return [
        f"{kind}{len(conv.kernel_size)}d",
        conv.in_channels,
        conv.out_channels,
        list(conv.kernel_size),
        list(conv.stride),
        padding,
        list(conv.dilation),
        list(getattr(conv, "output_padding", [])),
        conv.groups,
        conv.bias is not None,
        getattr(conv, "padding_mode", "zeros"),
        list(getattr(conv, "latent_shape", None) or conv.weight.shape),  # a packed one has none
    ]


def write_header(header: Header) -> str:
    """The header as a JSON string."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm")}
    functional = [asdict(call) for call in header.conversion.functional]
    return json.dumps(
        {
            "format": FORMAT,
            "created_with": {"el_convert": __version__, **versions},
            "source": header.source and asdict(header.source),
            "recipe": header.conversion.recipe.to_dict(),
            "packed": header.packed,
            "dtype": header.dtype,
            "layers": [
                {
                    "path": d.path,
                    "pattern": d.pattern,
                    "reason": d.reason,
                    "norm": d.norm,
                    "geometry": header.geometry[d.path],
                }
                for d in header.conversion.binarized
            ],
            "kept": [
                {"path": d.path, "pattern": d.pattern, "reason": d.reason}
                for d in header.conversion.kept
            ],
            "activations": [asdict(change) for change in header.conversion.activations],
            "input": asdict(header.input),
            **({"functional": functional} if functional else {}),
            **({"stored": header.stored} if header.stored else {}),
        },
        separators=(",", ":"),
    )


def parse_header(text: Any) -> Header:
    """The inverse of `write_header`.

    Raises:
        CheckpointError: for anything that `write_header` would not have written.
    """
    data = json_object(text)
    number = data.get("format")
    if type(number) is not int or number < 1:
        raise CheckpointError(f"the file's format is {number!r}, not a format number")
    if number > FORMAT:
        raise CheckpointError(
            f"the file has format {number}, this el_convert {__version__} reads up to {FORMAT}: "
            "it was written by a newer el_convert, upgrade"
        )
    if set(data) - _MAY_LACK != _FIELDS:
        odd = ", ".join(sorted((set(data) - _MAY_LACK) ^ _FIELDS))
        raise CheckpointError(f"the file's header does not have the expected fields: {odd}")
    if not isinstance(data["packed"], bool):
        raise CheckpointError(f"the file's packed is {data['packed']!r}, not true or false")
    return Header(
        _conversion(data),
        {layer["path"]: layer["geometry"] for layer in data["layers"]},
        _source(data["source"]),
        _input(data["input"]),
        _one_of(data["dtype"], _DTYPES, "dtype"),
        _text_map(data["created_with"]),
        data["packed"],
        _one_of(data.get("stored", ""), ("", "float16"), "stored"),
    )


def json_object(text: Any) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: it is none, or holds what must not be shown in a terminal.
    """
    if not isinstance(text, str):
        raise CheckpointError("the file's header is not text: not a file of el_convert")
    try:
        data = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"the file's header is damaged: {error}") from error
    except RecursionError:
        raise CheckpointError("the file's header is damaged: nested too deeply") from None
    if not isinstance(data, dict):
        raise CheckpointError("the file's header is not an object: not a file of el_convert")
    _refuse_control_characters(data)
    return data


def _refuse_control_characters(data: Any) -> None:
    """What a file says is shown in terminals, which obey such characters."""
    if isinstance(data, str) and any(
        (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in data
    ):
        raise CheckpointError(f"the file's header holds control characters: {data!r}")
    if isinstance(data, dict):
        data = [*data, *data.values()]
    for part in data if isinstance(data, list) else ():
        _refuse_control_characters(part)


def _conversion(data: Mapping[str, Any]) -> Conversion:
    layers = [
        _record(x, "layers", ("path", "pattern", "reason", "norm"), ("geometry",))
        for x in _list(data, "layers")
    ]
    for layer in layers:
        if not isinstance(layer.get("geometry"), list):
            raise CheckpointError(f"{layer['path']}: the file records no geometry")
    kept = [_record(x, "kept", ("path", "pattern", "reason")) for x in _list(data, "kept")]
    decisions = [
        *(Decision(x["path"], x["pattern"], "binarize", x["reason"], x["norm"]) for x in layers),
        *(Decision(x["path"], x["pattern"], "keep", x["reason"]) for x in kept),
    ]
    paths = [d.path for d in decisions]
    if len(paths) != len(set(paths)):
        raise CheckpointError("the file's header lists a layer twice")
    changes = tuple(_activation(x) for x in _list(data, "activations"))
    recipe = _checked(Recipe.from_dict, data["recipe"], "recipe")
    return Conversion(recipe, tuple(decisions), changes, _functional(data))


def _functional(data: Mapping[str, Any]) -> tuple[FunctionalConv, ...]:
    names = ("path", "owner", "function", "where")
    calls = _list(data, "functional") if "functional" in data else []
    return tuple(FunctionalConv(**_record(call, "functional", names)) for call in calls)


def _activation(data: Any) -> ActivationChange:
    names = ("path", "kind", "action", "replacement", "reason")
    record = _record(data, "activations", names, ("channels",))
    if record["action"] == "replace" and record["kind"] not in REPLACEABLE:
        raise CheckpointError(f"{record['path']!r}: {record['kind']!r} is no activation")
    if record["action"] not in ("replace", "leave"):
        raise CheckpointError(f"{record['path']}: unknown action {record['action']!r}")
    channels = record.get("channels")
    if type(channels) is not int or not 0 <= channels <= _MAX_WIDTH:
        raise CheckpointError(f"{record['path']}: {channels!r} is no number of channels")
    if record["action"] == "replace":
        _one_of(record["replacement"], ("prelu", "rprelu", "identity"), "replacement")
    change: ActivationChange = _checked(
        lambda data: ActivationChange(**data), record, "activations"
    )
    return change


def _source(data: Any) -> Source | None:
    if data is None:
        return None
    if not isinstance(data, dict) or not isinstance(data.get("kwargs"), dict):
        raise CheckpointError("the file's source is damaged")
    source: Source = _checked(lambda fields: Source(**fields), data, "source")
    return source


def _input(data: Any) -> InputSpec:
    names = ("size", "mean", "std")
    if not isinstance(data, dict) or set(data) != set(names):
        raise CheckpointError("the file's input is damaged")
    for name in names:
        values = data[name]
        numbers = isinstance(values, list) and all(
            type(v) in (int, float) and abs(v) < math.inf for v in values
        )
        if not numbers or not 0 < len(values) <= 4:
            raise CheckpointError(f"the file's input {name} is damaged: {values!r}")
    if not all(type(side) is int and 0 < side <= 1 << 16 for side in data["size"]):
        raise CheckpointError(f"the file's input size is damaged: {data['size']!r}")
    return InputSpec(*(tuple(data[name]) for name in names))


def _checked(build: Callable[[Any], Any], data: Any, what: str) -> Any:
    try:
        return build(data)
    except (ElConvertError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"the file's {what} is not acceptable: {error}") from error


def _record(
    data: Any, what: str, names: tuple[str, ...], more: tuple[str, ...] = ()
) -> dict[str, Any]:
    if not isinstance(data, dict) or not all(isinstance(data.get(name), str) for name in names):
        raise CheckpointError(f"the file's {what} are damaged")
    odd = set(data) - {*names, *more}
    if odd:
        raise CheckpointError(f"the file's {what} have unknown fields: {', '.join(sorted(odd))}")
    return data


def _list(data: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(data[name], list):
        raise CheckpointError(f"the file's {name} are damaged")
    return cast(list[Any], data[name])


def _one_of(value: Any, choices: tuple[str, ...], what: str) -> str:
    if value not in choices:
        raise CheckpointError(f"the file's {what} is {value!r}, not one of {', '.join(choices)}")
    return cast(str, value)


def _text_map(data: Any) -> dict[str, str]:
    if not isinstance(data, dict) or not all(isinstance(v, str) for v in data.values()):
        raise CheckpointError("the file's created_with is damaged")
    return data
