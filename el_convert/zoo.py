"""Models by name: "resnet50" | "timm/x" | "torchvision/x".

With catalog.py the only importer of either library.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from el_convert.catalog import LIBRARIES, LIST_MODELS, bare_names, model_names
from el_convert.errors import ConversionError, ElConvertError, SourceError, UnknownNameError
from el_convert.tracing import is_convolution

_ALLOWED: dict[str, dict[str, type[int] | type[str] | type[float] | type[bool]]] = {
    "timm": {
        "num_classes": int,
        "in_chans": int,
        "img_size": int,
        "global_pool": str,
        "output_stride": int,
        "drop_rate": float,
        "drop_path_rate": float,
    },
    "torchvision": {"num_classes": int, "aux_logits": bool, "transform_input": bool},
}
_MAX_CLASSES = 1_000_000
_MAX_PIXELS = 16_384
_SOURCE = "el_convert_source"


@dataclass(frozen=True)
class Source:
    """Where the float skeleton of a model comes from.

    Attributes:
        library: "timm" or "torchvision".
        name: registered there.
        kwargs: arguments from a short allow-list, such as `num_classes`.

    Raises:
        SourceError: on construction, when anything is not allowed.
    """

    library: str
    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.library not in LIBRARIES:
            raise SourceError(f"unknown library {self.library!r}: timm or torchvision")
        # "hf-hub:" and "local-dir:" names make timm fetch or read files.
        if not isinstance(self.name, str) or any(mark in self.name for mark in ":/\\"):
            raise SourceError(f"{self.name!r} is not the name of a registered model")
        for key, value in self.kwargs.items():
            _check_kwarg(self.library, key, value)

    def __str__(self) -> str:
        return f"{self.library}/{self.name}"


@dataclass(frozen=True)
class InputSpec:
    """What a model expects: (C, H, W) in pixels, and per-channel mean and standard deviation."""

    size: tuple[int, ...] = (3, 224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


def _check_kwarg(library: str, key: str, value: Any) -> None:
    allowed = _ALLOWED[library]
    if key not in allowed:
        raise SourceError(f"argument {key!r} is not allowed: only {', '.join(allowed)}")
    kind = allowed[key]
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise SourceError(f"argument {key} must be {kind.__name__}, not {value!r}")
    top = 1 if kind is float else _MAX_CLASSES if key == "num_classes" else _MAX_PIXELS
    if not isinstance(value, str) and not 0 <= value <= top:
        raise SourceError(f"argument {key} must be between 0 and {top}, not {value}")


def find_source(name: str, **kwargs: Any) -> Source:
    """Resolve a model name: timm first, then torchvision, or as the prefix says.

    Args:
        name: "resnet50", "timm/resnet50", "torchvision/resnet50"; timm's tags are understood.
        **kwargs: allowed arguments; None values are dropped.

    Raises:
        UnknownNameError: no such model; carries the nearest names.
        SourceError: an argument is not allowed.
    """
    given = {key: value for key, value in kwargs.items() if value is not None}
    library, _, bare = name.rpartition("/")
    for candidate in [library] if library else LIBRARIES:
        if candidate in LIBRARIES and _is_registered(candidate, bare):
            return Source(candidate, bare, given)
    # After a prefix only that library's names help.
    known = model_names(f"{library}/*") or bare_names()
    if library in LIBRARIES:
        raise UnknownNameError("model", name, known, LIST_MODELS)
    raise UnknownNameError("model", name, bare_names(), LIST_MODELS, like=bare)


def _is_registered(library: str, name: str) -> bool:
    if not name or any(mark in name for mark in ":/\\"):
        return False
    if library == "timm":
        import timm

        return bool(timm.is_model(name))
    import torchvision

    return name in torchvision.models.list_models()


def create(source: Source, *, pretrained: bool = False) -> nn.Module:
    """Build the float model.

    Args:
        source: from `find_source` or a file.
        pretrained: also fetch the library's trained weights. torchvision's classifier starts
            anew where `num_classes` differs, as timm's does.

    Returns:
        The model, in train mode, on the CPU.

    Raises:
        ConversionError: the library cannot build it, or the weights cannot be had.
    """
    build = _create_timm if source.library == "timm" else _create_torchvision
    if not _is_registered(source.library, source.name):
        raise ConversionError(
            f"{source} is not registered in the installed {source.library} "
            f"{importlib.metadata.version(source.library)}"
        )
    try:
        model = build(source, pretrained)
    except ElConvertError:
        raise
    except Exception as error:  # libraries raise anything here; said again with what was asked
        wanted = "pretrained weights of " if pretrained else ""
        raise ConversionError(f"cannot build {wanted}{source}: {error}") from error
    setattr(model, _SOURCE, _complete(source, model))
    return model


def _create_timm(source: Source, pretrained: bool) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(source.name, pretrained=pretrained, **source.kwargs)
    return model


def _create_torchvision(source: Source, pretrained: bool) -> nn.Module:
    import torchvision

    options: dict[str, Any] = {"weights": None, **source.kwargs}
    accepted = inspect.signature(torchvision.models.get_model_builder(source.name)).parameters
    if "weights_backbone" in accepted:
        options["weights_backbone"] = None  # its default downloads
    if source.name.removeprefix("quantized_") in ("googlenet", "inception_v3"):
        options["init_weights"] = True  # their default, said aloud: else they warn
    fresh_head = "num_classes" in source.kwargs
    if pretrained and not fresh_head:
        options["weights"] = "DEFAULT"
        options.pop("init_weights", None)
    model: nn.Module = torchvision.models.get_model(source.name, **options)
    if pretrained and fresh_head:
        if hasattr(model, "transform_input"):  # what their own weights= switches on
            setattr(model, "transform_input", True)  # noqa: B010
        weights = torchvision.models.get_model_weights(source.name).DEFAULT
        _load_matching(model, weights.get_state_dict(progress=False, check_hash=True))
    return model


def _load_matching(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load all but what has another shape: the classifier."""
    own = model.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    model.load_state_dict(fitting, strict=False)


def _complete(source: Source, model: nn.Module) -> Source:
    """Add what trained weights switch on and the parameters do not show."""
    if source.library == "torchvision" and hasattr(model, "transform_input"):
        flags = {name: bool(getattr(model, name)) for name in ("aux_logits", "transform_input")}
        return Source(source.library, source.name, {**source.kwargs, **flags})
    return source


def source_of(model: nn.Module) -> Source | None:
    """Where a model came from: `create`, or timm's own record; None when it does not say.

    For timm the arguments are guessed; who uses the answer must check it against the model.
    """
    source, classes = getattr(model, _SOURCE, None), getattr(model, "num_classes", None)
    if isinstance(source, Source):
        if source.library == "timm" and isinstance(classes, int):  # reset_classifier changes it
            return Source("timm", source.name, {**source.kwargs, "num_classes": classes})
        return source
    config = getattr(model, "pretrained_cfg", None)
    if not type(model).__module__.startswith("timm.") or not isinstance(config, Mapping):
        return None
    name = config.get("architecture")
    recorded = getattr(model, "_model_args", None)  # by timm 1.0.31 and newer
    kwargs = _guessed_kwargs(model) if recorded is None else _allowed_kwargs(recorded)
    if isinstance(classes, int):
        kwargs["num_classes"] = classes
    return Source("timm", name, kwargs) if isinstance(name, str) else None


def _allowed_kwargs(given: Mapping[str, Any]) -> dict[str, Any]:
    allowed = _ALLOWED["timm"]
    return {key: value for key, value in given.items() if type(value) is allowed.get(key)}


def _guessed_kwargs(model: nn.Module) -> dict[str, Any]:
    kwargs: dict[str, Any] = {}
    first = next((m for m in model.modules() if is_convolution(m)), None)
    if getattr(model, "drop_rate", 0.0):
        kwargs["drop_rate"] = model.drop_rate
    if first is not None and first.in_channels not in (3, 48, 192):  # plain, or pixels unshuffled
        kwargs["in_chans"] = first.in_channels
    return kwargs


def input_spec(model: nn.Module, source: Source | None = None) -> InputSpec:
    """What the model expects, from timm's configuration or torchvision's weights.

    Returns:
        ImageNet's usual 3 x 224 x 224 where neither says; for other numbers of channels, each
        with the mean of the three.
    """
    spec = _library_input(model, source)
    channels = source.kwargs.get("in_chans") if source is not None else None
    if not isinstance(channels, int) or channels == spec.size[0]:
        return spec
    mean, std = sum(spec.mean) / len(spec.mean), sum(spec.std) / len(spec.std)
    return InputSpec((channels, *spec.size[1:]), (mean,) * channels, (std,) * channels)


def _library_input(model: nn.Module, source: Source | None) -> InputSpec:
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, Mapping) and config.get("input_size"):
        spec = InputSpec()
        size = getattr(model, "img_size", None)
        wanted = tuple(config["input_size"])
        if isinstance(size, int):
            wanted = (wanted[0], size, size)
        return InputSpec(
            wanted, tuple(config.get("mean") or spec.mean), tuple(config.get("std") or spec.std)
        )
    if source is not None and source.library == "torchvision":
        return _torchvision_input(source.name)
    return InputSpec()


def _torchvision_input(name: str) -> InputSpec:
    import torchvision

    weights = torchvision.models.get_model_weights(name)
    transform = weights.DEFAULT.transforms() if len(weights) else None
    side = getattr(transform, "crop_size", None)
    if transform is None or not side:
        return InputSpec()
    height, width = (side[0], side[-1]) if len(side) else (224, 224)
    return InputSpec((3, height, width), tuple(transform.mean), tuple(transform.std))
