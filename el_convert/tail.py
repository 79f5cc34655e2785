"""What a packed layer does after its norm: an activation and a residual sum, fused into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from el_convert.slopes import ChannelPReLU, RPReLU


@dataclass(slots=True)
class Tail:
    """What a packed layer does after its norm, fused from the modules around it.

    Attributes:
        activation: "none"; "clamp" to [low, high], as ReLU and ReLU6; "prelu"; "rprelu"; "silu";
            "hardswish".
        low, high: of "clamp".
        residual_last: whether the residual is added after the activation instead of before.
        residual: of the output's shape, or None.
        slope: (C_out,) or (1,), of "prelu" and "rprelu".
        shift_in, shift_out: (C_out,), of "rprelu".
    """

    activation: Literal["none", "clamp", "prelu", "rprelu", "silu", "hardswish"] = "none"
    low: float = 0.0
    high: float = float("inf")
    residual_last: bool = False
    residual: Tensor | None = None
    slope: Tensor | None = None
    shift_in: Tensor | None = None
    shift_out: Tensor | None = None

    def given(
        self,
        residual: Tensor | None,
        slope: Tensor | None,
        shift_in: Tensor | None,
        shift_out: Tensor | None,
    ) -> Tail:
        """The same with the tensors of one call."""
        choices = (self.activation, self.low, self.high, self.residual_last)
        return Tail(*choices, residual, slope, shift_in, shift_out)

    def apply(self, output: Tensor) -> Tensor:
        """The formula in plain torch, on (N, C_out, ...)."""
        if self.residual is not None and not self.residual_last:
            output = output + self.residual
        if self.activation == "clamp":
            output = F.relu(output) if self._is_relu else output.clamp(self.low, self.high)
        elif self.activation == "silu":
            output = F.silu(output)
        elif self.activation == "hardswish":
            output = F.hardswish(output)
        elif self.activation != "none":
            output = self._prelu(output)
        if self.residual is not None and self.residual_last:
            output = output + self.residual
        return output

    @property
    def _is_relu(self) -> bool:
        return self.low == 0 and self.high == float("inf")

    def _prelu(self, output: Tensor) -> Tensor:
        assert self.slope is not None  # noqa: S101  # both other kinds have one
        shape = (-1, *[1] * (output.dim() - 2))
        if self.shift_in is not None:
            output = output - self.shift_in.view(shape)
        output = F.prelu(output, self.slope)
        return output if self.shift_out is None else output + self.shift_out.view(shape)


def normalized(output: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """What `fold_norm` gave, applied to (N, C, ...) by torch's own kernel, which rounds so."""
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    return F.batch_norm(output, zeros, ones, scale, shift, False, 0.0, 0.0)


def tail_of(activation: nn.Module | None) -> Tail | None:
    """A fusable activation's tail, with its tensors; None for others.

    Example:
        >>> tail_of(nn.ReLU6()).high, tail_of(nn.GELU())
        (6.0, None)
    """
    if type(activation) is nn.ReLU:
        return Tail("clamp", 0.0, float("inf"))
    if isinstance(activation, nn.Hardtanh):  # ReLU6 is one
        return Tail("clamp", float(activation.min_val), float(activation.max_val))
    if isinstance(activation, nn.PReLU) and type(activation) in (nn.PReLU, ChannelPReLU):
        return Tail("prelu", slope=activation.weight)
    if type(activation) is nn.SiLU:
        return Tail("silu")
    if type(activation) is nn.Hardswish:
        return Tail("hardswish")
    if type(activation) is RPReLU:
        return Tail(
            "rprelu",
            slope=activation.slope,
            shift_in=activation.shift_in,
            shift_out=activation.shift_out,
        )
    return None


def foldable(norm: Any) -> bool:
    """Whether a norm is, in eval mode, one multiply-add per channel."""
    return isinstance(norm, _BatchNorm) and norm.running_mean is not None


def fold_norm(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """A batch norm's inference as alpha and beta, alpha * y + beta, exactly as torch computes it.

    Args:
        norm: one that `foldable` accepts.

    Returns:
        Two of (C,).
    """
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None  # noqa: S101  # it is foldable
    # Asked of torch's own kernel, whose inverse root is not rounded alike on every machine.
    one, zero = torch.ones_like(mean)[None], torch.zeros_like(mean)
    with torch.no_grad():
        scale = F.batch_norm(one, zero, variance, norm.weight, None, False, 0.0, norm.eps)
        shift = F.batch_norm(
            zero[None], mean, variance, norm.weight, norm.bias, False, 0.0, norm.eps
        )
    return scale[0], shift[0]
