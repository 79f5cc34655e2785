"""Fitting norms and thresholds to data, without gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from el_convert.convert import conversion_of
from el_convert.datasets import to_device
from el_convert.errors import DataError
from el_convert.latent import binary_layers
from el_convert.nn import BinaryLayer

_Norm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Calibration:
    """What was fitted.

    Attributes:
        thresholds: layers whose learned thresholds were set.
        norms: batch norms whose statistics were measured anew.
        batches: how many were seen.
    """

    thresholds: int
    norms: int
    batches: int


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Any], *, device: torch.device | str = "cpu"
) -> Calibration:
    """Set learned thresholds to each input channel's median, then measure norms anew.

    A threshold at the median lets half of the signs be +1. Layers are fitted from first to last
    on the first batch, each on what the ones before now give. The statistics of batch norms
    become the plain mean over all batches, as those of a float network say little about a
    binarized one.

    Args:
        model: a binarized model; changed in place, left in the mode it was in.
        batches: of images (N, C, H, W) and labels, which are not used; at least one.
        device: where the model is.

    Raises:
        ConversionError: the model is not binarized.
        DataError: there is no batch.

    Example:
        >>> from el_convert import binarize
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
        >>> model = binarize(nn.Sequential(net, nn.Flatten()), "reactnet")
        >>> calibrate(model, [(torch.randn(4, 3, 8, 8), None)]).norms
        1
    """
    conversion_of(model)
    target = torch.device(device)
    layers = [layer for _, layer in binary_layers(model) if layer.threshold is not None]
    norms = [module for module in model.modules() if isinstance(module, _Norm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    seen = 0
    with _measuring(model, norms):
        for batch in batches:
            images = _images(batch, target)
            if not seen:
                with _fitting(layers):
                    model(images)
                for norm in norms:
                    norm.reset_running_stats()
            model(images)
            seen += 1
    if not seen:
        raise DataError("there is no batch to calibrate on")
    return Calibration(len(layers), len(norms), seen)


def _images(batch: Any, device: torch.device) -> Tensor:
    if isinstance(batch[1], Tensor):
        return to_device(batch, device)[0]
    images: Tensor = batch[0].to(device)
    return images


@contextmanager
def _measuring(model: nn.Module, norms: list[Any]) -> Iterator[None]:
    """Eval mode, with norms that average what they see."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = None  # torch's way to say a plain mean
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode


@contextmanager
def _fitting(layers: list[BinaryLayer]) -> Iterator[None]:
    """Each layer sets its threshold from the input it is about to take."""
    handles = [layer.register_forward_pre_hook(_fit) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fit(layer: Any, args: tuple[Any, ...]) -> None:
    channels = -1 - len(layer.kernel_size)
    values = args[0].float().movedim(channels, 0).flatten(1)
    layer.threshold.copy_(values.median(1).values)
