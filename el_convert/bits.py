"""Signs at one bit each, as files and packed layers keep them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_bits(values: Tensor) -> Tensor:
    """Signs along the last dimension as bits: 1 where a value is above 0.

    Value k is bit k % 8, the least significant first, of byte k // 8. The last byte's unused bits
    are 0.

    Args:
        values: (..., K), any real dtype.

    Returns:
        (..., ceil(K / 8)) uint8

    Example:
        >>> pack_bits(torch.tensor([1.0, -1.0, 1.0, 0.0, -2.0, -0.0, 0.5, 3.0, 1.0]))
        tensor([197,   1], dtype=torch.uint8)
    """
    bits = F.pad((values > 0).to(torch.uint8), (0, -values.shape[-1] % 8))
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=values.device)
    return (bits.view(*bits.shape[:-1], -1, 8) * places).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `pack_bits`: +1 for a bit that is set, else -1.

    Args:
        bits: (..., ceil(K / 8)) uint8
        count: K.
        dtype: of the result.

    Returns:
        (..., K)

    Example:
        >>> unpack_bits(torch.tensor([5], dtype=torch.uint8), 3)
        tensor([ 1., -1.,  1.])
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    single = (bits.unsqueeze(-1) >> shifts) & 1
    return single.flatten(-2)[..., :count].to(dtype) * 2 - 1
