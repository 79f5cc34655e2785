"""Recipes: every choice a binarization makes, as frozen data. No tensors, no torch.

What is not known of the Elastic-Link paper (arXiv 2112.10149) is a field that lists its
alternatives in its type; `Recipe.with_options` reaches each by its dotted name, as in
`link.gamma_init=0.5`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from el_convert.errors import ElConvertError, UnknownNameError


class RecipeError(ElConvertError, ValueError):
    """A recipe field was given a value it cannot take."""


@dataclass(frozen=True)
class InputOptions:
    """How a convolution's input becomes 1-bit.

    Attributes:
        binary: False leaves the input real-valued (first step of two-step training, or identity).
        gradient: surrogate of the sign's gradient: Bi-Real's "approx" or "clip".
        threshold: "learned" is ReActNet's RSign, one per input channel, starting at 0.
        scale: "xnor" multiplies each output position by the mean input magnitude (XNOR-Net).
    """

    binary: bool = True
    gradient: Literal["approx", "clip"] = "approx"
    threshold: Literal["none", "learned"] = "none"
    scale: Literal["none", "xnor"] = "none"


@dataclass(frozen=True)
class WeightOptions:
    """How a convolution's weight becomes 1-bit.

    Attributes:
        binary: False leaves the weight real-valued.
        gradient: surrogate of the sign's gradient.
        scale: per output channel: "mean" of the magnitudes, with gradient (XNOR-Net);
            "mean-detached", without (Bi-Real, ReActNet); "learned", starting at the mean; "none".
    """

    binary: bool = True
    gradient: Literal["clip", "approx"] = "clip"
    scale: Literal["mean", "mean-detached", "learned", "none"] = "mean"


@dataclass(frozen=True)
class LinkOptions:
    """The Elastic-Link gate: output + gamma * align(input).

    Attributes:
        enabled: False builds no link.
        where: "all" convolutions, or only those with "equal" input and output channels.
        place: before or after the norm that follows. "after-norm" moves the norm inside the binary
            convolution; where a norm is fused with an activation or has other users the link
            stays before it and the report says so.
        gamma: learned per output "channel", learned "scalar", or "fixed" at `gamma_init`.
        gamma_init: where gamma starts; where no norm follows, at most at 1.
        squeeze: channels shrink: "mean" or "sum" over groups, or a "slice" with one of each group.
        expand: channels grow: "repeat" each channel, "tile" the whole block, or append "zero".
        downsample: stride: "max" or "average" over the stride's window, or a "slice".
    """

    enabled: bool = True
    where: Literal["all", "equal"] = "all"
    place: Literal["before-norm", "after-norm"] = "before-norm"
    gamma: Literal["channel", "scalar", "fixed"] = "channel"
    gamma_init: float = 3.0
    squeeze: Literal["mean", "sum", "slice"] = "mean"
    expand: Literal["repeat", "tile", "zero"] = "repeat"
    downsample: Literal["max", "average", "slice"] = "max"


@dataclass(frozen=True)
class ActivationOptions:
    """What becomes of the activations that feed binarized convolutions, where they are modules.

    Attributes:
        replacement: "keep", per-channel "prelu", "rprelu" (ReActNet) or "identity".
        which: the "relu" family (ReLU, ReLU6), or "any" activation.
        slope: where a PReLU's negative slope starts; 1 changes nothing until it is trained.
    """

    replacement: Literal["keep", "prelu", "rprelu", "identity"] = "prelu"
    which: Literal["relu", "any"] = "relu"
    slope: float = 1.0


@dataclass(frozen=True)
class KeepOptions:
    """Which kinds of convolution stay in float; `keep=` names single ones.

    Attributes:
        image: the convolution that reads the model's input.
        output: the one whose result is the model's output.
        single_pixel: those on 1x1-pixel maps: squeeze-excite and pooled heads.
        position: those that encode positions: their input is the same for every image.
        shortcut: projections on residual shortcuts.
        depthwise: one input channel per group.
    """

    image: bool = True
    output: bool = True
    single_pixel: bool = True
    position: bool = True
    shortcut: bool = False
    depthwise: bool = False


@dataclass(frozen=True)
class NormOptions:
    """What becomes of norms.

    Attributes:
        zero_weights: "one" starts norms at 1 whose weights are all 0, as timm's ResNets have the
            last norm of each residual branch: else nothing of a gate within comes through until
            they have grown. "keep" leaves them. "auto" is "one" where shortcuts stay in float.
    """

    zero_weights: Literal["auto", "keep", "one"] = "auto"


@dataclass(frozen=True)
class TrainingOptions:
    """How the recipe's authors train it, which `train` follows.

    Attributes:
        loss: "cross-entropy" with labels, or ReActNet's "distribution" loss against a teacher.
        steps: 2 trains with binary activations and real weights first.
    """

    loss: Literal["cross-entropy", "distribution"] = "cross-entropy"
    steps: Literal[1, 2] = 1


@dataclass(frozen=True)
class Recipe:
    """A complete set of choices. Frozen: derive others with `with_options`.

    Raises:
        RecipeError: on construction, when a field's value is not one of its alternatives.

    Example:
        >>> RECIPES["elastic-link"].with_options({"link.gamma_init": "0.5"}).link.gamma_init
        0.5
    """

    name: str
    summary: str = ""
    input: InputOptions = field(default_factory=InputOptions)
    weight: WeightOptions = field(default_factory=WeightOptions)
    link: LinkOptions = field(default_factory=LinkOptions)
    activation: ActivationOptions = field(default_factory=ActivationOptions)
    keep: KeepOptions = field(default_factory=KeepOptions)
    norm: NormOptions = field(default_factory=NormOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        for name, kind, value in _leaves(self):
            _check_value(name, kind, value)

    @property
    def opens_branches(self) -> bool:
        """Whether norms whose weights are all 0 start at 1; see `NormOptions`."""
        choice = self.norm.zero_weights
        return choice == "one" or (choice == "auto" and self.keep.shortcut)

    def with_options(self, options: Mapping[str, Any]) -> Recipe:
        """A copy with dotted fields set; text is parsed to the field's type.

        Args:
            options: dotted field name to value, as in `{"link.gamma": "scalar"}`.

        Raises:
            UnknownNameError: a field does not exist; carries the nearest names.
            RecipeError: a value the field cannot take.
        """
        recipe = self
        kinds = {name: kind for name, kind, _ in _leaves(self)}
        for name, value in options.items():
            if name not in kinds:
                raise UnknownNameError(
                    "recipe field", name, kinds, f"the fields are {', '.join(kinds)}"
                )
            parsed = _parse(name, kinds[name], value) if isinstance(value, str) else value
            recipe = _with_leaf(recipe, name, parsed)
        return recipe

    def option_names(self) -> tuple[str, ...]:
        """Every dotted field, as in "link.gamma_init"."""
        return tuple(name for name, _, _ in _leaves(self))

    def option(self, name: str) -> Any:
        """The value of one dotted field, as in `recipe.option("keep.shortcut")`."""
        values = {known: value for known, _, value in _leaves(self)}
        if name not in values:
            raise UnknownNameError("recipe field", name, values)
        return values[name]

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`; refuses fields and values it does not know.

        Raises:
            RecipeError, UnknownNameError: as in `with_options`.
        """
        flat: dict[str, Any] = {}
        groups = [group.name for group in fields(cls) if group.name not in ("name", "summary")]
        for group, value in data.items():
            if group in ("name", "summary"):
                continue
            if group not in groups:
                raise UnknownNameError("recipe group", group, groups)
            if not isinstance(value, Mapping):
                raise RecipeError(f"{group} must be an object, not {value!r}")
            flat.update({f"{group}.{name}": leaf for name, leaf in value.items()})
        name, summary = data.get("name", ""), data.get("summary", "")
        if not isinstance(name, str) or not isinstance(summary, str):
            raise RecipeError("name and summary must be text")
        recipe = cls(name, summary).with_options(flat)
        for name, _, value in _leaves(recipe):
            if name in flat and type(flat[name]) is str and type(value) is not str:
                raise RecipeError(f"{name} must not be text: {flat[name]!r}")
        return recipe


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _leaves(recipe: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, type, value) of every option."""
    for group in fields(recipe):
        options = getattr(recipe, group.name)
        if is_dataclass(options):
            hints = _hints(options.__class__)
            for leaf in fields(options):
                yield f"{group.name}.{leaf.name}", hints[leaf.name], getattr(options, leaf.name)


def _with_leaf(recipe: Recipe, name: str, value: Any) -> Recipe:
    group, leaf = name.split(".")
    changes: dict[str, Any] = {group: replace(getattr(recipe, group), **{leaf: value})}
    return replace(recipe, **changes)


def _check_value(name: str, kind: Any, value: Any) -> None:
    if get_origin(kind) is Literal:
        # `type` as well: True would pass as the integer 1.
        good = any(value == choice and type(value) is type(choice) for choice in get_args(kind))
        wanted = "one of " + ", ".join(str(choice) for choice in get_args(kind))
    elif kind is bool:
        good, wanted = isinstance(value, bool), "true or false"
    else:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        # Comparing, as isfinite fails for integers that no float can hold.
        good, wanted = good and abs(value) <= sys.float_info.max, "a finite number"
    if not good:
        raise RecipeError(f"{name} must be {wanted}, not {value!r}")


def _parse(name: str, kind: Any, text: str) -> Any:
    if kind is bool:
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(
            text.lower(), text
        )
    if kind is float:
        try:
            return float(text)
        except ValueError:
            raise RecipeError(f"{name} must be a finite number, not {text!r}") from None
    by_text = {str(choice): choice for choice in get_args(kind)}
    return by_text.get(text, text)


def find_recipe(recipe: Recipe | str) -> Recipe:
    """The recipe of that name, or the given recipe itself.

    Raises:
        UnknownNameError: no recipe has that name.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise UnknownNameError("recipe", recipe, RECIPES, f"the recipes are {', '.join(RECIPES)}")
    return RECIPES[recipe]


_NO_LINK = LinkOptions(enabled=False)
_BLOCK_SHORTCUT = LinkOptions(where="equal", place="after-norm", gamma="fixed", gamma_init=1.0)
_REACT_INPUT = InputOptions(threshold="learned")
_DETACHED = WeightOptions(scale="mean-detached")
_REACT_ACTIVATION = ActivationOptions("rprelu", "any", slope=0.25)
_KEEP_SHORTCUT = KeepOptions(shortcut=True)
_ZEROS_STAY = NormOptions("keep")
_REACT_TRAINING = TrainingOptions(loss="distribution", steps=2)

_TABLE = (
    Recipe("elastic-link", "a learned gate carries the real-valued input past every convolution"),
    Recipe("plain", "the same without links: the baseline", link=_NO_LINK),
    Recipe(
        "xnor",
        "XNOR-Net: scaled by mean |w| and by the input's magnitude at each position",
        input=InputOptions(gradient="clip", scale="xnor"),
        link=_NO_LINK,
        activation=ActivationOptions("keep"),
    ),
    Recipe(
        "bi-real",
        "Bi-Real Net: a real-valued shortcut around each convolution of equal channels, no ReLU",
        weight=_DETACHED,
        link=_BLOCK_SHORTCUT,
        activation=ActivationOptions("identity"),
        keep=_KEEP_SHORTCUT,
        norm=_ZEROS_STAY,
    ),
    Recipe(
        "reactnet",
        "ReActNet: Bi-Real's shortcuts, learned thresholds (RSign) and RPReLU",
        input=_REACT_INPUT,
        weight=_DETACHED,
        link=_BLOCK_SHORTCUT,
        activation=_REACT_ACTIVATION,
        keep=_KEEP_SHORTCUT,
        norm=_ZEROS_STAY,
        training=_REACT_TRAINING,
    ),
    Recipe(
        "elastic-reactnet",
        "ReActNet with Elastic-Link gates in place of its shortcuts",
        input=_REACT_INPUT,
        weight=_DETACHED,
        activation=_REACT_ACTIVATION,
        keep=_KEEP_SHORTCUT,
        norm=NormOptions("one"),
        training=_REACT_TRAINING,
    ),
    Recipe(
        "identity",
        "swaps every convolution and binarizes none: for tests and experiments",
        input=InputOptions(binary=False),
        weight=WeightOptions(binary=False),
        link=_NO_LINK,
        activation=ActivationOptions("keep"),
    ),
)
RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in _TABLE}
"""The built-in recipes by name. `elastic-link` is the default."""
