"""What a packed layer does after its norm: an activation and a residual sum, fused into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor


@dataclass(slots=True)
class Tail:
    """What a packed layer does after its norm, fused from the modules around it.

    Attributes:
        activation: "none"; "clamp" to [low, high], as ReLU and ReLU6; "prelu"; "rprelu".
        low, high: of "clamp".
        residual_last: whether the residual is added after the activation instead of before.
        residual: of the output's shape, or None.
        slope: (C_out,) or (1,), of "prelu" and "rprelu".
        shift_in, shift_out: (C_out,), of "rprelu".
    """

    activation: Literal["none", "clamp", "prelu", "rprelu"] = "none"
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
        elif self.activation != "none":
            output = self._prelu(output)
        if self.residual is not None and self.residual_last:
            output = output + self.residual
        return output

    @property
    def _is_relu(self) -> bool:
        return self.low == 0 and self.high == float("inf")

    def _prelu(self, output: Tensor) -> Tensor:
        assert self.slope is not None  # noqa: S101  # both kinds have one
        shape = (-1, *[1] * (output.dim() - 2))
        if self.shift_in is not None:
            output = output - self.shift_in.view(shape)
        output = F.prelu(output, self.slope)
        return output if self.shift_out is None else output + self.shift_out.view(shape)
