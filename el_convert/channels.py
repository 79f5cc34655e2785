"""Sums and copies of neighbouring channels, each the gradient of the other; the gate's sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from el_convert.kernels import passes

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
        if torch.compiler.is_compiling():  # what compilers fuse and ONNX has
            shape = (*input.shape[: dim + 1], count, *input.shape[dim + 1 :])
            return input.unsqueeze(dim + 1).expand(shape).flatten(dim, dim + 1)
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


class _Gate(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, gamma: Tensor, input: Tensor, dim: int, count: int) -> Tensor:
        if count > 1 and dim == 1 and passes.runs_native(output, gamma, input):
            return passes.expand(output, gamma, input)
        return torch.addcmul(output, gamma, _copies(input, dim, count))

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int, int], output: Tensor
    ) -> None:
        _, gamma, input, ctx.dim, ctx.count = inputs
        ctx.save_for_backward(gamma, input)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        gamma, input = ctx.saved_tensors
        if ctx.dim == 1 and passes.runs_native(input, gamma, grads[0]):
            of_input, of_gamma = passes.expand_grad(input, gamma, grads[0])
            return grads[0], of_gamma, of_input, None, None
        product = _copies(input, ctx.dim, ctx.count) * grads[0]
        of_gamma, of_input = product.sum_to_size(gamma.shape), grads[0] * gamma
        if ctx.count > 1:
            of_input = sum_channels(of_input, ctx.dim, ctx.count)
        return grads[0], of_gamma, of_input, None, None


def _copies(input: Tensor, dim: int, count: int) -> Tensor:
    return input if count == 1 else repeat_channels(input, dim, count)


def gate(output: Tensor, gamma: Tensor, input: Tensor, dim: int, count: int = 1) -> Tensor:
    r"""Elastic-Link's sum, :math:`y + \gamma \, \text{repeat}(x)`, for training.

    Keeps x for the gradient, not its copies, which are `count` times as large.

    Args:
        output: y, any shape with C * count channels at `dim`.
        gamma: broadcasts over `output`: one value, or one for each channel.
        input: x, with C channels.
        dim: where the channels are.
        count: how many copies of each channel of x are side by side.

    Returns:
        The shape of `output`.
    """
    apply: Callable[..., Tensor] = _Gate.apply
    return apply(output, gamma, input, dim % input.dim(), count)


class _SqueezeGate(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        output: Tensor, gamma: Tensor, input: Tensor, dim: int, factor: float
    ) -> tuple[Tensor, Tensor]:
        if dim == 1 and passes.runs_native(output, gamma, input):
            return passes.squeeze(output, gamma, input, factor)
        added = sum_channels(input, dim, input.shape[dim] // output.shape[dim])
        added = added if factor == 1 else added * factor
        return torch.addcmul(output, gamma, added), added

    @staticmethod
    def setup_context(
        ctx: Any,
        inputs: tuple[Tensor, Tensor, Tensor, int, float],
        output: tuple[Tensor, Tensor],
    ) -> None:
        _, gamma, input, ctx.dim, ctx.factor = inputs
        ctx.count = input.shape[ctx.dim] // output[0].shape[ctx.dim]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(gamma, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        gamma, added = ctx.saved_tensors
        if ctx.dim == 1 and passes.runs_native(gamma, added, grads[0]):
            both = passes.squeeze_grad(added, gamma, grads[0], ctx.count, ctx.factor)
            return grads[0], both[1], both[0], None, None
        of_gamma = (added * grads[0]).sum_to_size(gamma.shape)
        share = grads[0] * (gamma * ctx.factor)
        return grads[0], of_gamma, repeat_channels(share, ctx.dim, ctx.count), None, None


def squeeze_gate(
    output: Tensor, gamma: Tensor, input: Tensor, dim: int, factor: float = 1.0
) -> Tensor:
    r"""Elastic-Link's sum where it squeezes, :math:`y + \gamma f \sum x`, for training.

    Keeps the sums for the gradient, not x, which is as many times larger.

    Args:
        output: y, any shape with C channels at `dim`.
        gamma: broadcasts over `output`: one value, or one for each channel.
        input: x, with C * count channels, count neighbours of which are summed.
        dim: where the channels are.
        factor: f, of the sums: 1 / count for means.

    Returns:
        The shape of `output`.
    """
    apply: Callable[..., tuple[Tensor, Tensor]] = _SqueezeGate.apply
    return apply(output, gamma, input, dim % input.dim(), factor)[0]
