"""The arithmetic of 1-bit layers, each formula once: tensors in, tensors out.

Shapes: N batch, C channels, G groups, spatial dimensions written as `...`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from el_convert.kernels import passes

SignGradient = Literal["approx", "clip"]


def _sign(input: Tensor) -> Tensor:
    if passes.runs_native(input):
        return passes.sign(input)
    # Three passes in place: many times faster than torch.where, and the same for NaN, which is -1.
    return input.sign().sub_(0.5).sign_()


class _SignSTE(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, gradient: SignGradient) -> Tensor:
        return _sign(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, SignGradient], output: Tensor) -> None:
        input, ctx.gradient = inputs
        ctx.save_for_backward(input)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (input,) = ctx.saved_tensors
        if passes.runs_native(input, grads[0]):
            return passes.sign_grad(input, grads[0], ctx.gradient == "clip"), None
        return sign_surrogate(input, ctx.gradient) * grads[0], None


class _Fork(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, gradient: SignGradient) -> tuple[Tensor, Tensor]:
        return _sign(input), input.view_as(input)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, SignGradient], output: tuple[Tensor, Tensor]
    ) -> None:
        input, ctx.gradient = inputs
        ctx.save_for_backward(input)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (input,) = ctx.saved_tensors
        if passes.runs_native(input, *grads):
            return passes.sign_grad(input, grads[0], ctx.gradient == "clip", grads[1]), None
        return (sign_surrogate(input, ctx.gradient) * grads[0]).add_(grads[1]), None


class _ScaledSign(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        latent: Tensor, scale: Tensor | None, gradient: SignGradient, through_mean: bool
    ) -> tuple[Tensor, Tensor]:
        if passes.runs_native(latent):
            return passes.scaled_sign(latent, scale)
        scale = weight_scale(latent) if scale is None else scale.clone()
        return _sign(latent).mul_(_beside(scale, latent)), scale

    @staticmethod
    def setup_context(
        ctx: Any,
        inputs: tuple[Tensor, Tensor | None, SignGradient, bool],
        output: tuple[Tensor, Tensor],
    ) -> None:
        latent, _, ctx.gradient, ctx.through_mean = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(latent, output[1], output[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        latent, scale, output = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1]
        if passes.runs_native(latent, grads[0]):
            clip, through_mean = ctx.gradient == "clip", ctx.through_mean
            both = passes.scaled_sign_grad(latent, scale, grads[0], clip, through_mean)
            return both[0], both[1] if wanted else None, None, None
        wide = _beside(scale, latent)
        # Not in place: for gradients of each sample, the last factor alone may be batched.
        gradient = sign_surrogate(latent, ctx.gradient).mul_(wide) * grads[0]
        if not (ctx.through_mean or wanted):
            return gradient, None, None, None
        inner = tuple(range(1, latent.dim()))
        # The output is sign times scale, saved by the convolution anyway: divided once per channel.
        inverse = torch.where(wide == 0, wide, 1 / wide)
        of_scale = (grads[0] * output).sum(inner, keepdim=True).mul_(inverse)
        if not ctx.through_mean:
            return gradient, of_scale.view_as(scale), None, None
        count = latent[0].numel()
        share = of_scale.mul_(inverse).div_(count)
        return torch.addcmul(gradient, output, share), None, None, None


def _beside(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (weight.dim() - 1))


def binarize_ste(input: Tensor, gradient: SignGradient = "approx") -> Tensor:
    r"""Strict sign with a straight-through gradient.

    .. math:: b(x) = +1 \text{ if } x > 0 \text{ else } -1

    Zero, negative zero and NaN become -1. The comparison is strict because most networks
    feed convolutions from a ReLU, where `x >= 0` would always hold.

    Args:
        input: any floating-point tensor.
        gradient: "approx" (Bi-Real Net, arXiv 1808.00278) or "clip" (BinaryConnect/BNN,
            arXiv 1602.02830); see `sign_surrogate`.

    Returns:
        A tensor of the same shape and dtype holding only -1 and +1.

    Raises:
        ValueError: when `gradient` is not one of the two.

    Example:
        >>> binarize_ste(torch.tensor([-0.5, 0.0, 2.0]))
        tensor([-1., -1.,  1.])
    """
    if gradient not in ("approx", "clip"):
        raise ValueError(f"gradient must be 'approx' or 'clip', not {gradient!r}")
    if has_torch_function_unary(input):  # one node in a traced graph
        traced: Tensor = handle_torch_function(binarize_ste, (input,), input, gradient)
        return traced
    apply: Callable[[Tensor, SignGradient], Tensor] = _SignSTE.apply
    return apply(input, gradient)


def sign_and_pass(input: Tensor, gradient: SignGradient = "approx") -> tuple[Tensor, Tensor]:
    """`binarize_ste(input)`, and the input for what else reads it: the gate.

    Both gradients are then added in the pass that computes the first.

    Args:
        input: any floating-point tensor.
        gradient: see `binarize_ste`.

    Returns:
        Two tensors of the shape of `input`.
    """
    if has_torch_function_unary(input) or torch.compiler.is_compiling():
        return binarize_ste(input, gradient), input
    apply: Callable[[Tensor, SignGradient], tuple[Tensor, Tensor]] = _Fork.apply
    return apply(input, gradient)


def sign_surrogate(input: Tensor, gradient: SignGradient) -> Tensor:
    r"""The derivative that stands in for that of the sign.

    .. math:: \text{clip: } 1_{|x| \le 1} \qquad \text{approx: } (2 - 2|x|)\, 1_{|x| \le 1}

    Args:
        input: what the sign was taken of, any shape.
        gradient: "clip" or "approx".

    Returns:
        A tensor of the shape of `input`. Where that is NaN, "clip" gives 0 and "approx" NaN.
    """
    if gradient == "clip":
        return input.abs().le_(1)
    return input.abs().mul_(-2).add_(2).clamp_min_(0)


def scaled_sign(
    latent: Tensor,
    scale: Tensor | None = None,
    gradient: SignGradient = "clip",
    *,
    through_mean: bool = True,
) -> Tensor:
    r"""A binary weight with its scale multiplied in, which training convolves with.

    .. math:: W_c = s_c \, b(L_c)

    One function, as its gradients take a third of the passes over memory that those of the
    product would.

    Args:
        latent: L, (C_out, ...).
        scale: s, (C_out,); `weight_scale(latent)` where None.
        gradient: surrogate of the sign's gradient; see `sign_surrogate`.
        through_mean: whether that mean's gradient goes to `latent`, where `scale` is None.

    Returns:
        The shape of `latent`.

    Example:
        >>> scaled_sign(torch.tensor([[0.3, -2.0]]), torch.tensor([0.5]))
        tensor([[ 0.5000, -0.5000]])
    """
    if has_torch_function_unary(latent):  # one node in a traced graph
        options = {"through_mean": through_mean}
        traced: Tensor = handle_torch_function(
            scaled_sign, (latent,), latent, scale, gradient, **options
        )
        return traced
    apply: Callable[..., tuple[Tensor, Tensor]] = _ScaledSign.apply
    return apply(latent, scale, gradient, through_mean and scale is None)[0]


def weight_scale(weight: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
    r"""Mean magnitude of each output channel's weights (XNOR-Net, arXiv 1603.05279).

    .. math:: s_c = \frac{1}{n} \lVert W_c \rVert_1

    Args:
        weight: (C_out, C_in / G, ...), or (C_in, C_out / G, ...) when `transposed`.
        groups: G, needed only when `transposed`.
        transposed: whether the weight belongs to a transposed convolution.

    Returns:
        (C_out,)

    Example:
        >>> weight_scale(torch.tensor([[[1.0, -3.0]]]))
        tensor([2.])
    """
    if has_torch_function_unary(weight):  # one node in a traced graph
        options: dict[str, Any] = {"groups": groups, "transposed": transposed}
        traced: Tensor = handle_torch_function(weight_scale, (weight,), weight, **options)
        return traced
    if transposed:  # to (C_out, C_in / G, ...)
        inputs, outputs = weight.shape[0] // groups, weight.shape[1]
        weight = weight.reshape(groups, inputs, outputs, -1).transpose(1, 2)
        weight = weight.reshape(groups * outputs, -1)
    return weight.abs().mean(tuple(range(1, weight.dim())))


def xnor_activation_scale(
    input: Tensor,
    out_channels: int,
    groups: int,
    box_filter: Callable[[Tensor, Tensor], Tensor],
    kernel_size: tuple[int, ...],
) -> Tensor:
    r"""The scale XNOR-Net gives each output position (arXiv 1603.05279, section 3.2).

    .. math:: K = A * k, \quad A = \tfrac{G}{C}\sum_{c \in g} |x_c|, \quad
              k = 1 / \prod(\text{kernel})

    Args:
        input: (N, C, ...) or (C, ...), the convolution's real-valued input.
        out_channels: C_out.
        groups: G; each group of output channels is scaled by its own group of inputs.
        box_filter: the convolution's geometry: maps (A, k) to K, with G groups.
        kernel_size: spatial size of the kernel.

    Returns:
        (N, 1, ...) when G is 1, else (N, C_out, ...): broadcasts over the output.
    """
    channel_dim = -1 - len(kernel_size)
    magnitude = torch.unflatten(input.abs(), channel_dim, (groups, -1)).mean(channel_dim)
    taps = input.new_full((groups, 1, *kernel_size), 1 / torch.Size(kernel_size).numel())
    scale = box_filter(magnitude, taps)
    return scale if groups == 1 else scale.repeat_interleave(out_channels // groups, channel_dim)


class _PReLU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, slope: Tensor) -> Tensor:
        return F.prelu(input, slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        input, slope = ctx.saved_tensors
        if passes.runs_native(input, grads[0]):
            return passes.prelu_grad(input, slope, grads[0])
        above: Tensor = torch.ops.aten.threshold_backward(grads[0], input, 0)
        below = grads[0] - above
        above = torch.addcmul(above, slope.view(-1, *[1] * (input.dim() - 2)), below)
        dims = [dim for dim in range(input.dim()) if dim != 1 or slope.numel() == 1]
        return above, below.mul_(input).sum(dims).view_as(slope)


def prelu(input: Tensor, slope: Tensor) -> Tensor:
    r"""`torch.nn.functional.prelu`, whose own gradient is slow on the CPU.

    .. math:: f(x) = \max(x, 0) + a_c \min(x, 0)

    Args:
        input: (N, C, ...)
        slope: a, (C,) or (1,).

    Returns:
        The shape of `input`.

    Example:
        >>> prelu(torch.tensor([[-2.0, 4.0]]), torch.tensor([0.5]))
        tensor([[-1.,  4.]])
    """
    if has_torch_function_unary(input):  # one node in a traced graph
        traced: Tensor = handle_torch_function(prelu, (input,), input, slope)
        return traced
    apply: Callable[[Tensor, Tensor], Tensor] = _PReLU.apply
    return apply(input, slope)


def pad_same(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    r"""Zero-pad as TensorFlow's "SAME": outputs are the input's size over the stride, rounded up.

    .. math:: p = \max((\lceil n / s \rceil - 1) s + d (k - 1) + 1 - n,\ 0), \quad
              p_\text{left} = \lfloor p / 2 \rfloor

    Args:
        input: (..., H, W)
        kernel_size, stride, dilation: per spatial dimension.

    Returns:
        (..., H + p_H, W + p_W)

    Example:
        >>> pad_same(torch.zeros(1, 1, 4, 4), (3, 3), (2, 2), (1, 1)).shape
        torch.Size([1, 1, 5, 5])
    """
    if has_torch_function_unary(input):  # one node in a traced graph
        options = (kernel_size, stride, dilation)
        traced: Tensor = handle_torch_function(pad_same, (input,), input, *options)
        return traced
    return F.pad(input, same_padding(input.shape, kernel_size, stride, dilation))


def same_padding(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """What `pad_same` adds, in the order of `F.pad`: the last dimension first, each at both ends.

    Args:
        size: of the input; the last dimensions count.
        kernel_size, stride, dilation: per spatial dimension.
    """
    pads: list[int] = []
    sizes = size[-len(kernel_size) :]
    for n, k, s, d in zip(sizes, kernel_size, stride, dilation, strict=True):
        total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        pads = [total // 2, total - total // 2, *pads]
    return pads
