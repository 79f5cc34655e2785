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


def differences(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[float]:
    """For each image of a batch the largest difference, relative to its output's largest value.

    Args:
        given: outputs of another runtime, each (N, ...).
        wanted: the model's. An output of another first dimension than the first one's is no
            batch: it counts as a whole, for every image.

    Returns:
        N values, of the worst output each: infinity where shapes differ or a value is NaN.

    Example:
        >>> differences([torch.tensor([[1.0, 4.0], [0, 8]])], [torch.tensor([[2.0, 4.0], [0, 8]])])
        [0.25, 0.0]
    """
    count = len(wanted[0]) if wanted and wanted[0].dim() else 1
    if [tuple(value.shape) for value in given] != [tuple(value.shape) for value in wanted]:
        return [math.inf] * count
    worst = torch.zeros(count, dtype=torch.double)
    for ours, theirs in zip(given, wanted, strict=True):
        if theirs.numel():
            rows = count if theirs.dim() and len(theirs) == count else 1
            apart, size = (
                value.reshape(rows, -1).abs().amax(1).double() for value in (ours - theirs, theirs)
            )  # maxima of what holds NaN are NaN
            worst = torch.maximum(worst, apart / size.clamp_min(1e-30))
    return torch.where(worst.isnan(), math.inf, worst).tolist()


def agreeing(errors: Sequence[float], tolerance: float) -> int:
    """How many images agree."""
    return sum(error <= tolerance for error in errors)


def refuse_disagreement(runtime: str, errors: Sequence[float], tolerance: float) -> None:
    """Raise ExportError unless most images agree.

    A file that computes something else does so for every image. A single one may differ though
    nothing is wrong: where a float layer's rounding takes a number near zero to its other side, a
    sign is another one, and a network may turn that into a visible difference.

    Args:
        runtime: its name, for the message.
        errors: of `differences`, one an image.
        tolerance: what an image may differ by.
    """
    found = agreeing(errors, tolerance)
    if 2 * found <= len(errors) or math.inf in errors:
        raise ExportError(
            f"{runtime} differs from the model by up to {max(errors):.1e}, on "
            f"{len(errors) - found} of {len(errors)} images by more than the tolerance of "
            f"{tolerance:.0e}: nothing was written"
        )
