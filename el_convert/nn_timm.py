"""Binary forms of timm's own convolution classes, which need no timm: attributes are taken over.

Weight-standardized convolutions, TensorFlow's dynamic "same" padding, and CondConv.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from el_convert.errors import ConversionError
from el_convert.functional import binarize_ste, pad_same, xnor_activation_scale
from el_convert.link import LinkGeometry
from el_convert.nn import BinaryConv2d, BinaryLayer


class BinaryStdConv2d(BinaryConv2d):
    r"""Weight-standardized convolutions: the standardized weight is what is binarized.

    .. math:: \hat w = (w - \mu) / \sqrt{\sigma^2 + \epsilon}

    over each output channel (arXiv 1903.10520). Takes over the attributes of timm's `StdConv2d`.
    """

    _needs: ClassVar[tuple[str, ...]] = ("eps",)
    eps: float

    def latent_weight(self) -> Tensor:
        return self._standardized(None)

    def _standardized(self, factor: Tensor | None) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(
            flat, None, None, weight=factor, training=True, momentum=0.0, eps=self.eps
        )
        return weight.reshape_as(self.weight)


class BinaryScaledStdConv2d(BinaryStdConv2d):
    r"""Scaled weight standardization (NF-ResNet, arXiv 2101.08692).

    .. math:: \hat w = (w - \mu) / \sqrt{\sigma^2 + \epsilon} \cdot \text{gain} \cdot \text{scale}

    Takes over the attributes of timm's `ScaledStdConv2d`.
    """

    _needs: ClassVar[tuple[str, ...]] = ("eps", "gain", "scale")
    gain: nn.Parameter
    scale: float

    def latent_weight(self) -> Tensor:
        return self._standardized((self.gain * self.scale).view(-1))


class _SamePadding(BinaryConv2d):
    """TensorFlow's "same" padding, computed from the input's size, after the sign."""

    def _link_geometry(self) -> LinkGeometry:
        geometry = super()._link_geometry()
        # Outputs are the input's size over the stride, rounded up: windows start at the border.
        return replace(geometry, offset=(0, 0)) if self.pads_to_same else geometry

    @property
    def pads_to_same(self) -> bool:
        return bool(getattr(self, "same_pad", True))  # Conv2dSame has no such flag

    def _apply_kernel(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output_size: Sequence[int] | None,
    ) -> Tensor:
        if self.pads_to_same:
            input = pad_same(input, self.kernel_size, self.stride, self.dilation)
        return super()._apply_kernel(input, weight, bias, output_size)


class BinaryConv2dSame(_SamePadding):
    """1-bit form of timm's `Conv2dSame`: outputs are ceil(H / s) x ceil(W / s)."""


class BinaryStdConv2dSame(_SamePadding, BinaryStdConv2d):
    """1-bit form of timm's `StdConv2dSame`; see `BinaryStdConv2d`."""


class BinaryScaledStdConv2dSame(_SamePadding, BinaryScaledStdConv2d):
    """1-bit form of timm's `ScaledStdConv2dSame`; see `BinaryScaledStdConv2d`."""


class BinaryCondConv2d(BinaryLayer):
    r"""1-bit form of timm's `CondConv2d` (arXiv 1904.04971).

    Each sample's mixed kernel is binarized:

    .. math:: w_n = \textstyle\sum_e r_{ne} w_e, \qquad
              y_n = s(w_n) \cdot \text{conv}(b(x_n), b(w_n)) + \text{bias}_n

    followed by the gate as in `BinaryConv`. A learned scale is shared by all samples.

    Shape:
        input (N, C_in, H, W) and routing weights (N, E) to (N, C_out, H', W').
        `weight` is (E, C_out * C_in / G * kH * kW).
    """

    _needs: ClassVar[tuple[str, ...]] = ("num_experts", "weight_shape", "dynamic_padding")
    packs: ClassVar[bool] = False  # experts are mixed before the sign
    transposed: ClassVar[bool] = False
    num_experts: int
    weight_shape: tuple[int, ...]
    dynamic_padding: bool
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def _check_kind(cls, conv: nn.Module) -> None:
        if not isinstance(getattr(conv, "weight", None), Tensor):
            raise ConversionError(f"{type(conv).__name__} is not a convolution")

    def _link_geometry(self) -> LinkGeometry:
        geometry = super()._link_geometry()
        return replace(geometry, offset=(0, 0)) if self.dynamic_padding else geometry

    def _mean_scale(self, weight: Tensor) -> Tensor:
        experts = weight.view(self.num_experts, self.out_channels, -1)
        return experts.abs().mean((0, 2))

    def forward(self, input: Tensor, routing_weights: Tensor) -> Tensor:
        return self._finish(input, self._binary_output(input, routing_weights))

    def _binary_output(self, input: Tensor, routing_weights: Tensor) -> Tensor:
        latent = torch.matmul(routing_weights, self.weight)
        bias = None if self.bias is None else torch.matmul(routing_weights, self.bias)
        signs, options = self._binary_input(input), self.recipe.weight
        if not options.binary and self.recipe.input.scale == "none":
            return self._per_sample(signs, latent, bias)
        weight = binarize_ste(latent, options.gradient) if options.binary else latent
        output = self._per_sample(signs, weight, None)
        scale = self.sample_scale(latent)
        if scale is not None:
            output = output * scale
        if self.recipe.input.scale == "xnor":
            output = output * xnor_activation_scale(
                input, self.out_channels, self.groups, self._box_filter, self.kernel_size
            )
        return output if bias is None else output + bias[:, :, None, None]

    def sample_scale(self, latent: Tensor) -> Tensor | None:
        """The scale of each sample's mixed weights: (N, C_out, 1, 1), (C_out, 1, 1) or None."""
        kind = self.recipe.weight.scale
        if not self.recipe.weight.binary or kind == "none":
            return None
        if kind == "learned" and self.learned_scale is not None:
            return self._channelwise(self.learned_scale)
        scale = torch.unflatten(latent, 1, (self.out_channels, -1)).abs().mean(2)
        scale = scale.detach() if kind == "mean-detached" else scale
        return scale[:, :, None, None]

    def _per_sample(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One grouped convolution for all samples: their channels and kernels side by side."""
        batch = input.shape[0]
        kernels = weight.view(-1, *self.weight_shape[1:])
        folded = input.reshape(1, -1, input.shape[2], input.shape[3])
        output = self._convolve(
            folded, kernels, None if bias is None else bias.flatten(), self.groups * batch
        )
        return output.view(batch, self.out_channels, output.shape[2], output.shape[3])

    def _box_filter(self, magnitude: Tensor, taps: Tensor) -> Tensor:
        return self._convolve(magnitude, taps, None, self.groups)

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        padding = self.padding
        if self.dynamic_padding:
            input, padding = pad_same(input, self.kernel_size, self.stride, self.dilation), (0, 0)
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, groups)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, experts={self.num_experts}, recipe={self.recipe.name}"
        )
