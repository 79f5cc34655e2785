"""Turn any torchvision or timm model into a binarized network with Elastic-Link gates.

    from el_convert import binarize
    model = binarize(timm.create_model("resnet50"))

The public names are imported when first used, so that `el-convert --help` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from el_convert._version import __version__

if TYPE_CHECKING:
    from el_convert.calibration import calibrate
    from el_convert.checkpoint import load, save
    from el_convert.convert import binarize
    from el_convert.datasets import open_images
    from el_convert.errors import (
        CheckpointError,
        ConversionError,
        DataError,
        ElConvertError,
        ExportError,
        TrainingError,
        UnknownNameError,
    )
    from el_convert.evaluation import evaluate
    from el_convert.exporting import Exported, export
    from el_convert.findings import Findings, examine
    from el_convert.graphs import BinarizePass, to_graph
    from el_convert.link import ElasticLink
    from el_convert.nn import (
        BinaryConv1d,
        BinaryConv2d,
        BinaryConv3d,
        BinaryConvTranspose1d,
        BinaryConvTranspose2d,
        BinaryConvTranspose3d,
    )
    from el_convert.packed import PackedConv
    from el_convert.packing import pack
    from el_convert.page import PageTexts
    from el_convert.patterns import Pattern, register_pattern, unregister_pattern
    from el_convert.planning import Decision, plan
    from el_convert.recipes import RECIPES, Recipe, RecipeError
    from el_convert.report import Summary, summarize
    from el_convert.reporting import write_report
    from el_convert.slopes import RPReLU
    from el_convert.train_options import ImageOptions, TrainOptions
    from el_convert.training import train
    from el_convert.zoo import Source

_HOME = {
    "BinarizePass": "graphs",
    "BinaryConv1d": "nn",
    "BinaryConv2d": "nn",
    "BinaryConv3d": "nn",
    "BinaryConvTranspose1d": "nn",
    "BinaryConvTranspose2d": "nn",
    "BinaryConvTranspose3d": "nn",
    "CheckpointError": "errors",
    "ConversionError": "errors",
    "DataError": "errors",
    "Decision": "planning",
    "ElConvertError": "errors",
    "ElasticLink": "link",
    "ExportError": "errors",
    "Exported": "exporting",
    "Findings": "findings",
    "ImageOptions": "train_options",
    "PackedConv": "packed",
    "PageTexts": "page",
    "Pattern": "patterns",
    "RECIPES": "recipes",
    "RPReLU": "slopes",
    "Recipe": "recipes",
    "RecipeError": "recipes",
    "Source": "zoo",
    "Summary": "report",
    "TrainOptions": "train_options",
    "TrainingError": "errors",
    "UnknownNameError": "errors",
    "binarize": "convert",
    "calibrate": "calibration",
    "evaluate": "evaluation",
    "examine": "findings",
    "export": "exporting",
    "load": "checkpoint",
    "open_images": "datasets",
    "pack": "packing",
    "plan": "planning",
    "register_pattern": "patterns",
    "save": "checkpoint",
    "summarize": "report",
    "to_graph": "graphs",
    "train": "training",
    "unregister_pattern": "patterns",
    "write_report": "reporting",
}

__all__ = [
    "RECIPES",
    "BinarizePass",
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryConv3d",
    "BinaryConvTranspose1d",
    "BinaryConvTranspose2d",
    "BinaryConvTranspose3d",
    "CheckpointError",
    "ConversionError",
    "DataError",
    "Decision",
    "ElConvertError",
    "ElasticLink",
    "ExportError",
    "Exported",
    "Findings",
    "ImageOptions",
    "PackedConv",
    "PageTexts",
    "Pattern",
    "RPReLU",
    "Recipe",
    "RecipeError",
    "Source",
    "Summary",
    "TrainOptions",
    "TrainingError",
    "UnknownNameError",
    "__version__",
    "binarize",
    "calibrate",
    "evaluate",
    "examine",
    "export",
    "load",
    "open_images",
    "pack",
    "plan",
    "register_pattern",
    "save",
    "summarize",
    "to_graph",
    "train",
    "unregister_pattern",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'el_convert' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"el_convert.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
