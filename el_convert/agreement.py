"""Whether another runtime computes what a model does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from el_convert.errors import ExportError, first_line

_SEED = 0


def random_images(count: int, size: Sequence[int]) -> Tensor:
    """The same ones every time.

    Args:
        count: N.
        size: (C, H, W).

    Returns:
        (N, C, H, W)
    """
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(_SEED))


@torch.no_grad()
def outputs_of(model: nn.Module, batch: Tensor) -> list[Tensor]:
    """The tensors of a model's output, in the order in which exporters flatten it.

    Raises:
        ExportError: the model does not run on it, or an output is not finite.
    """
    try:
        found, _ = torch.utils._pytree.tree_flatten(model(batch))
    except Exception as error:  # of any kind: a forward is the user's code
        raise ExportError(
            f"{type(model).__name__} does not run on a batch of {list(batch.shape)} "
            f"({first_line(error)}): give its input_size; models of other inputs than one batch "
            "of images cannot be exported"
        ) from error
    tensors = [value for value in found if isinstance(value, Tensor)]
    if not all(bool(value.isfinite().all()) for value in tensors):
        raise ExportError(
            "the model's outputs are not finite, so no file can be compared with it: train it, or "
            "let its norms see images with calibrate"
        )
    return tensors


def output_names(outputs: Sequence[Tensor]) -> list[str]:
    """What the outputs are called in a file: "output", or "output0", "output1", ..."""
    return ["output"] if len(outputs) == 1 else [f"output{i}" for i in range(len(outputs))]


def difference(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest value of the same output.

    Returns:
        Infinity where shapes differ or a value is NaN.

    Example:
        >>> difference([torch.tensor([1.0, 4.0])], [torch.tensor([2.0, 4.0])])
        0.25
    """
    if [tuple(value.shape) for value in given] != [tuple(value.shape) for value in wanted]:
        return math.inf
    pairs = zip(given, wanted, strict=True)
    found = [
        float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
        for ours, theirs in pairs
    ]
    return math.inf if any(map(math.isnan, found)) else max(found)


def refuse_difference(runtime: str, error: float, tolerance: float) -> None:
    """Raise ExportError where a runtime's outputs are too far from the model's."""
    if error > tolerance:
        raise ExportError(
            f"{runtime} differs from the model by {error:.1e}, more than the tolerance of "
            f"{tolerance:.0e}: nothing was written"
        )
