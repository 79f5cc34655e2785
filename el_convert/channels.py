"""Sums and copies of neighbouring channels, each the gradient of the other; expanding gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_FEW = 8  # up to so many, slices are added faster than torch sums a short dimension


class _SumChannels(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, dim: int, group: int) -> Tensor:
        parts = torch.unflatten(input, dim, (-1, group))
        if group > _FEW:
            return parts.sum(dim + 1)
        first, second, *rest = parts.unbind(dim + 1)
        total: Tensor = first + second
        for part in rest:
            total += part
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        _, ctx.dim, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return repeat_channels(grads[0], ctx.dim, ctx.group), None, None


class _RepeatChannels(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, dim: int, count: int) -> Tensor:
        if input.is_contiguous():
            return input.repeat_interleave(count, dim)
        last = input.movedim(dim, -1).unsqueeze(-1)  # where channels_last has them
        return last.expand(*last.shape[:-1], count).flatten(-2).movedim(-1, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        _, ctx.dim, ctx.count = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return sum_channels(grads[0], ctx.dim, ctx.count), None, None


def sum_channels(input: Tensor, dim: int, group: int) -> Tensor:
    """Sums of `group` neighbouring channels; its gradient is `repeat_channels`.

    Args:
        input: any shape with C channels at `dim`.
        group: 2 or more; divides C.

    Returns:
        The shape of `input` with C / group channels.

    Example:
        >>> sum_channels(torch.tensor([1.0, 2.0, 5.0, 6.0]), 0, 2)
        tensor([ 3., 11.])
    """
    apply: Callable[[Tensor, int, int], Tensor] = _SumChannels.apply
    return apply(input, dim % input.dim(), group)


def repeat_channels(input: Tensor, dim: int, count: int) -> Tensor:
    """Each channel `count` times, as `torch.repeat_interleave`; its gradient is `sum_channels`.

    Args:
        input: any shape with C channels at `dim`.
        count: 2 or more.

    Returns:
        The shape of `input` with C * count channels.

    Example:
        >>> repeat_channels(torch.tensor([1.0, 2.0]), 0, 2)
        tensor([1., 1., 2., 2.])
    """
    apply: Callable[[Tensor, int, int], Tensor] = _RepeatChannels.apply
    return apply(input, dim % input.dim(), count)


class _RepeatGate(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, gamma: Tensor, input: Tensor, dim: int, count: int) -> Tensor:
        return torch.addcmul(output, gamma, repeat_channels(input, dim, count))

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int, int], output: Tensor
    ) -> None:
        _, gamma, input, ctx.dim, ctx.count = inputs
        ctx.save_for_backward(gamma, input)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        gamma, input = ctx.saved_tensors
        product = repeat_channels(input, ctx.dim, ctx.count) * grads[0]
        of_gamma = product.sum_to_size(gamma.shape)
        of_input = sum_channels(grads[0] * gamma, ctx.dim, ctx.count)
        return grads[0], of_gamma, of_input, None, None


def repeat_gate(output: Tensor, gamma: Tensor, input: Tensor, dim: int, count: int) -> Tensor:
    r"""Elastic-Link's sum where it expands, :math:`y + \gamma \, \text{repeat}(x)`.

    Keeps x for the gradient, not its copies, which are `count` times as large.

    Args:
        output: y, any shape with C * count channels at `dim`.
        gamma: broadcasts over `output`.
        input: x, with C channels.
        dim: where the channels are.
        count: 2 or more.

    Returns:
        The shape of `output`.
    """
    apply: Callable[..., Tensor] = _RepeatGate.apply
    return apply(output, gamma, input, dim % input.dim(), count)
