"""The table that decides every convolution: ordered rows, first match wins, each with a reason.

Users add rows with `register_pattern`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.utils import parametrize

from el_convert.errors import UnknownNameError
from el_convert.nn import (
    BinaryConv1d,
    BinaryConv2d,
    BinaryConv3d,
    BinaryConvTranspose1d,
    BinaryConvTranspose2d,
    BinaryConvTranspose3d,
)
from el_convert.nn_timm import (
    BinaryCondConv2d,
    BinaryConv2dSame,
    BinaryScaledStdConv2d,
    BinaryScaledStdConv2dSame,
    BinaryStdConv2d,
    BinaryStdConv2dSame,
)
from el_convert.recipes import Recipe
from el_convert.sites import Site
from el_convert.tracing import dotted_name

Action = Literal["binarize", "keep"]
Builder = Callable[[nn.Module, Recipe], nn.Module]


@dataclass(frozen=True)
class Pattern:
    """One row of the table.

    Attributes:
        name: unique; saved files refer to it.
        match: whether the row decides a site.
        action: "binarize" or "keep".
        reason: shown to users; for kept convolutions, why, and what they can do about it.
        build: makes the binary layer from (convolution, recipe); needed to binarize.
        option: a recipe field that must be true for the row to count, as in "keep.shortcut".
        unexpected: whether `binarize` warns about what the row keeps.

    Raises:
        ValueError: `action` is "binarize" and there is no `build`, or it is neither action.

    Example:
        >>> Pattern("stems", lambda site: "stem" in site.path, "keep", "stems stay float").action
        'keep'
    """

    name: str
    match: Callable[[Site], bool]
    action: Action
    reason: str
    build: Builder | None = None
    option: str | None = None
    unexpected: bool = False

    def __post_init__(self) -> None:
        if self.action not in ("binarize", "keep"):
            raise ValueError(f"pattern {self.name!r}: action must be 'binarize' or 'keep'")
        if self.action == "binarize" and self.build is None:
            raise ValueError(f"pattern {self.name!r} binarizes, so it needs build=")

    def decides(self, site: Site, recipe: Recipe) -> bool:
        """Whether the row is switched on by the recipe and matches the site."""
        return (self.option is None or bool(recipe.option(self.option))) and self.match(site)


def exactly(*kinds: type | str) -> Callable[[Site], bool]:
    """Match convolutions of exactly these classes, given as classes or by dotted name."""
    names = {kind if isinstance(kind, str) else dotted_name(kind) for kind in kinds}
    return lambda site: dotted_name(type(site.conv)) in names


def _has_hooks(site: Site) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(site.conv, name) for name in hooks)


def _is_parametrized(site: Site) -> bool:
    return parametrize.is_parametrized(site.conv) or "weight" not in site.conv._parameters


def _is_depthwise(site: Site) -> bool:
    return site.conv.groups > 1 and site.conv.groups == site.conv.in_channels


# Models whose forward does not trace say by these classes where their output comes from.
_PREDICTION_HEADS = {
    *(
        f"torchvision.models.detection.{name}"
        for name in (
            "rpn.RPNHead",
            "retinanet.RetinaNetClassificationHead",
            "retinanet.RetinaNetRegressionHead",
            "fcos.FCOSClassificationHead",
            "fcos.FCOSRegressionHead",
            "ssd.SSDClassificationHead",
            "ssd.SSDRegressionHead",
            "ssdlite.SSDLiteClassificationHead",
            "ssdlite.SSDLiteRegressionHead",
            "mask_rcnn.MaskRCNNPredictor",
            "keypoint_rcnn.KeypointRCNNPredictor",
        )
    ),
    "torchvision.models.optical_flow.raft.FlowHead",
    "torchvision.models.optical_flow.raft.MaskPredictor",
}


def _row(name: str, kind: type | str, build: Builder, reason: str) -> Pattern:
    return Pattern(name, exactly(kind), "binarize", reason, build)


PATTERNS: list[Pattern] = [
    Pattern(
        "parametrized",
        _is_parametrized,
        "keep",
        "its weight is computed from others; first call what undoes that: "
        "torch.nn.utils.parametrize.remove_parametrizations for weight_norm, spectral_norm and "
        "the like, remove_weight_norm for the older weight_norm, prune.remove for pruning",
        unexpected=True,
    ),
    Pattern(
        "hooked",
        _has_hooks,
        "keep",
        "it has hooks, which would see a different layer; remove them before binarizing",
        unexpected=True,
    ),
    Pattern(
        "weight-read",
        lambda site: site.weight_read,
        "keep",
        "other code computes with its weight, as F.conv2d(x, conv.weight) does; "
        "call the convolution itself to have it binarized",
        unexpected=True,
    ),
    Pattern(
        "reads-image",
        lambda site: site.reads_image,
        "keep",
        "it reads the image, whose few channels carry too little after a sign",
        option="keep.image",
    ),
    Pattern(
        "feeds-output",
        lambda site: site.feeds_output,
        "keep",
        "its result is the model's output",
        option="keep.output",
    ),
    Pattern(
        "prediction-head",
        lambda site: site.ends_region and not _PREDICTION_HEADS.isdisjoint(site.owners),
        "keep",
        "its result is a prediction: boxes, scores, masks or flow",
        option="keep.output",
    ),
    Pattern(
        "single-pixel",
        lambda site: site.single_pixel,
        "keep",
        "it works on a map of one pixel (squeeze-excite or pooled head): nothing to gain",
        option="keep.single_pixel",
    ),
    Pattern(
        "position-code",
        lambda site: site.featureless_input,
        "keep",
        "it encodes positions: its input is the same for every image",
        option="keep.position",
    ),
    Pattern(
        "shortcut",
        lambda site: site.on_shortcut,
        "keep",
        "the recipe keeps projections on shortcuts real-valued",
        option="keep.shortcut",
    ),
    Pattern(
        "depthwise",
        _is_depthwise,
        "keep",
        "the recipe keeps depthwise convolutions real-valued",
        option="keep.depthwise",
    ),
    _row("conv1d", nn.Conv1d, BinaryConv1d.from_float, "1d convolution"),
    _row("conv2d", nn.Conv2d, BinaryConv2d.from_float, "2d convolution"),
    _row("conv3d", nn.Conv3d, BinaryConv3d.from_float, "3d convolution"),
    _row("conv-transpose1d", nn.ConvTranspose1d, BinaryConvTranspose1d.from_float, "1d transposed"),
    _row("conv-transpose2d", nn.ConvTranspose2d, BinaryConvTranspose2d.from_float, "2d transposed"),
    _row("conv-transpose3d", nn.ConvTranspose3d, BinaryConvTranspose3d.from_float, "3d transposed"),
    _row(
        "std-conv2d",
        "timm.layers.std_conv.StdConv2d",
        BinaryStdConv2d.from_float,
        "the standardized weight is binarized",
    ),
    _row(
        "scaled-std-conv2d",
        "timm.layers.std_conv.ScaledStdConv2d",
        BinaryScaledStdConv2d.from_float,
        "the standardized and scaled weight is binarized",
    ),
    _row(
        "std-conv2d-same",
        "timm.layers.std_conv.StdConv2dSame",
        BinaryStdConv2dSame.from_float,
        'the standardized weight is binarized, padding to "same" follows the sign',
    ),
    _row(
        "scaled-std-conv2d-same",
        "timm.layers.std_conv.ScaledStdConv2dSame",
        BinaryScaledStdConv2dSame.from_float,
        'the standardized and scaled weight is binarized, padding to "same" follows the sign',
    ),
    _row(
        "conv2d-same",
        "timm.layers.conv2d_same.Conv2dSame",
        BinaryConv2dSame.from_float,
        'padding to "same" follows the sign',
    ),
    _row(
        "cond-conv2d",
        "timm.layers.cond_conv2d.CondConv2d",
        BinaryCondConv2d.from_float,
        "each sample's mixed kernel is binarized",
    ),
    Pattern(
        "conv3d-video",
        exactly(
            "torchvision.models.video.resnet.Conv3DSimple",
            "torchvision.models.video.resnet.Conv3DNoTemporal",
        ),
        "binarize",
        "a 3d convolution with a constructor of its own",
        BinaryConv3d.from_float,
    ),
    Pattern(
        "unknown-class",
        lambda site: True,
        "keep",
        "its class has a forward of its own and no row in the table; register_pattern adds one",
        unexpected=True,
    ),
]
"""The rows in order. Read it; change it through `register_pattern`."""


def register_pattern(pattern: Pattern, *, before: str | None = None) -> None:
    """Add a row to the table, for the rest of the process.

    Args:
        pattern: the row.
        before: name of the row to put it in front of. By default it goes in front of the first
            row that binarizes, so what protects the image-reading convolution, the output and
            single-pixel maps protects the new class too.

    Raises:
        ValueError: a row of that name exists.
        UnknownNameError: there is no row named `before`.

    Example:
        >>> row = Pattern("stems", lambda site: "stem" in site.path, "keep", "stems stay float")
        >>> register_pattern(row)
        >>> unregister_pattern("stems")
    """
    names = [row.name for row in PATTERNS]
    if pattern.name in names or pattern.name == KEPT_BY_NAME:
        raise ValueError(f"a pattern named {pattern.name!r} is registered already")
    if before is None:
        before = next(row.name for row in PATTERNS if row.action == "binarize")
    if before not in names:
        raise UnknownNameError("pattern", before, names, f"the patterns are {', '.join(names)}")
    PATTERNS.insert(names.index(before), pattern)


def unregister_pattern(name: str) -> None:
    """Take out a row that was added.

    Raises:
        UnknownNameError: there is no such row.
    """
    PATTERNS.remove(find_pattern(name))


def find_pattern(name: str) -> Pattern:
    """The row of that name.

    Raises:
        UnknownNameError: there is no such row.
    """
    for pattern in PATTERNS:
        if pattern.name == name:
            return pattern
    names = [pattern.name for pattern in PATTERNS]
    raise UnknownNameError("pattern", name, names, f"the patterns are {', '.join(names)}")


KEPT_BY_NAME = "named"
"""Pattern name of convolutions that `keep=` names."""


def first_match(site: Site, recipe: Recipe) -> Pattern:
    """The row that decides a site; the last row matches everything."""
    return next(pattern for pattern in PATTERNS if pattern.decides(site, recipe))
