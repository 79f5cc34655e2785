"""Linear layers whose time, for few inputs, is that of reading their weights from memory."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from el_convert.fast_path import plain_rows
from el_convert.kernels import engine
from el_convert.tracing import has_forward_hooks

_FEW = 4  # inputs
_LARGE = 1 << 18  # weights; smaller ones stay in the caches


class LargeLinear(nn.Linear):
    """A classifier: `nn.Linear` that reads its weights faster where there are at most four inputs.

    Results agree with those of `nn.Linear` to rounding.

    Args:
        linear: whose parameters it takes over.

    Shape:
        (N, in_features) to (N, out_features); others as `nn.Linear`

    Example:
        >>> linear = nn.Linear(1024, 1000)
        >>> input = torch.randn(1, 1024)
        >>> bool((LargeLinear(linear)(input) - linear(input)).abs().max() < 1e-4)
        True
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        few = plain_rows(input, self.in_features) and 0 < len(input) <= _FEW
        if not few or not _readable(weight, bias) or _is_differentiated(input, weight, bias):
            return F.linear(input, weight, bias)
        library = engine()
        if library is None or torch.is_autocast_enabled("cpu"):
            return F.linear(input, weight, bias)
        return library.linear(input.contiguous(), weight, bias)


def large_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `LargeLinear` does the same faster."""
    plain = type(module) is nn.Linear and not has_forward_hooks(module)
    return plain and module.weight.numel() >= _LARGE  # type: ignore[operator]


def _readable(*tensors: Tensor | None) -> bool:
    """Whether the engine can read their memory."""
    return all(
        t is None or (t.is_cpu and t.dtype is torch.float32 and t.is_contiguous()) for t in tensors
    )


def _is_differentiated(*tensors: Tensor | None) -> bool:
    wanted = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return wanted and torch.is_grad_enabled()
