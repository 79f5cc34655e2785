"""Inference-time layers: weights at 1 bit each, everything else as it was trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from el_convert.bits import pack_bits, unpack_bits
from el_convert.errors import ConversionError
from el_convert.fast_path import FastPath, Prepared
from el_convert.functional import pad_same, same_padding
from el_convert.kernels import ConvGeometry, binary_conv2d
from el_convert.nn import BinaryConv, OneBitConv, transposed_convolution
from el_convert.tail import Tail, fold_norm, foldable, normalized

_CONVOLVE: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)
_GEOMETRY = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "transposed",
    "output_padding",
    "groups",
    "padding_mode",
)


class PackedConv(OneBitConv):
    r"""A binary convolution of any kind for inference: what `BinaryConv` computes in eval mode.

    The sums of signs are exact, and what follows is done in the same order and precision, on
    the native engine where it has a fast path (see `obstacle`), else in torch.

    .. math:: y = s \cdot \text{conv}(\text{pad}_0(b(x - t)), \pm 1) + \text{bias}, \qquad
              \text{out} = y + \gamma \cdot \text{align}(x)

    Args:
        layer: a trained binary convolution; not changed, its tensors other than the weight are
            shared.

    Attributes:
        bits: (C_out, ceil(C_in / G * prod(kernel) / 8)) uint8, see `pack_bits`: the weight's
            signs in torch's order; for transposed convolutions (C_in, ...).
        scale: (C_out,) weight scale, or None.
        bias: (C_out,) or None.
        threshold: (C_in,) or None.
        norm_scale, norm_shift: (C_out,), a batch norm folded to two vectors, or None.
        norm: a norm of another kind between convolution and link, or None.
        link: the gate, or None.
        tail: activation and residual that were fused into the layer.

    Raises:
        ConversionError: the layer's weight is real-valued, or called in training mode.

    Example:
        >>> from el_convert.nn import BinaryConv2d
        >>> layer = BinaryConv2d(8, 16, 3, padding=1).eval()
        >>> packed, x = PackedConv(layer), torch.randn(1, 8, 5, 5)
        >>> tuple(packed.bits.shape), torch.equal(packed(x), layer(x))
        ((16, 9), True)
    """

    bits: Tensor
    scale: Tensor | None
    norm_scale: Tensor | None
    norm_shift: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    padding_mode: str

    def __init__(self, layer: BinaryConv) -> None:
        super().__init__()
        if not layer.recipe.weight.binary:
            raise ConversionError("its weight is real-valued: there is nothing to pack")
        for name in _GEOMETRY:
            setattr(self, name, getattr(layer, name))
        self.recipe = layer.recipe
        self.same_padding = layer.pads_to_same
        latent = layer.latent_weight().detach()
        self.latent_shape = tuple(latent.shape)
        self.register_buffer("bits", pack_bits(latent.flatten(1)))
        scale = layer.output_scale(latent)
        self.register_buffer("scale", None if scale is None else scale.detach().clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        threshold = layer.threshold
        self.register_buffer("threshold", None if threshold is None else threshold.detach())
        self._border = getattr(layer, "_reversed_padding_repeated_twice", [])
        self.register_module("norm", layer.norm)
        self.register_module("link", layer.link)
        self.tail = Tail()
        self.register_buffer("norm_scale", None)
        self.register_buffer("norm_shift", None)
        if isinstance(self.norm, _BatchNorm) and foldable(self.norm):
            self.fold(self.norm)
            self.norm = None
        self._fast = FastPath()
        self.train(layer.training)

    def fold(self, norm: _BatchNorm) -> None:
        """Take over a batch norm's inference: alpha * y + beta, exactly as torch computes it.

        Args:
            norm: one that `foldable` accepts.
        """
        self.norm_scale, self.norm_shift = fold_norm(norm)

    def obstacle(self) -> str:
        """Why the native engine has no fast path for this layer; "" where it has one."""
        if len(self.kernel_size) != 2:
            return f"{len(self.kernel_size)}d convolution"
        if self.transposed:
            return "transposed convolution"
        if self.padding_mode != "zeros":
            return f"padding mode {self.padding_mode}"
        if not self.recipe.input.binary:
            return "its input is real-valued"
        if self.recipe.input.scale != "none":
            return f"activation scale {self.recipe.input.scale}"
        if self.norm is not None:
            return f"{type(self.norm).__name__} between convolution and link"
        if self._too_deep():
            return "its kernel is too large to be counted in 16 bits"
        return ""

    def _too_deep(self) -> bool:
        depthwise = self.in_channels == self.out_channels == self.groups
        depth = self.in_channels // self.groups * torch.Size(self.kernel_size).numel()
        return depth > (255 if depthwise else 65535)

    def geometry(self, size: tuple[int, int]) -> ConvGeometry | None:
        """The layer as the engine knows it, for (H, W); None where there is an `obstacle`."""
        return None if self.obstacle() else self._geometry(self._pads(size))

    def prepare(self, tail: Tail, size: tuple[int, int]) -> Prepared | None:
        """The layer as the engine runs it on (H, W), followed by `tail`; None where it cannot."""
        return self._fast.prepare(self, tail, size)

    def _geometry(self, pads: Sequence[int]) -> ConvGeometry:
        left, right, top, bottom = pads
        return ConvGeometry(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            groups=self.groups,
            kernel=(self.kernel_size[0], self.kernel_size[1]),
            stride=(self.stride[0], self.stride[1]),
            dilation=(self.dilation[0], self.dilation[1]),
            padding=(top, bottom, left, right),
        )

    def _pads(self, size: Sequence[int]) -> list[int]:
        """Zeros around the input, in the order of `F.pad`."""
        if self.same_padding:
            return same_padding(size, self.kernel_size, self.stride, self.dilation)
        if isinstance(self.padding, str):
            spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            pads = [[n // 2, n - n // 2] if self.padding == "same" else [0, 0] for n in spans]
        else:
            pads = [[n, n] for n in self.padding]
        return [n for pair in reversed(pads) for n in pair]

    def forward(
        self,
        input: Tensor,
        output_size: Sequence[int] | None = None,
        residual: Tensor | None = None,
        slope: Tensor | None = None,
        shift_in: Tensor | None = None,
        shift_out: Tensor | None = None,
    ) -> Tensor:
        if self.training:
            raise ConversionError(
                "a packed layer does not train: call eval(), or train the model it was packed from"
            )
        tail = self.tail
        if residual is not None or slope is not None:
            tail = tail.given(residual, slope, shift_in, shift_out)
        output = self._fast.run(self, input, tail)
        return tail.apply(self._by_torch(input, output_size)) if output is None else output

    def _by_torch(self, input: Tensor, output_size: Sequence[int] | None) -> Tensor:
        """The layer up to its norm and link, operation by operation."""
        if not (torch.compiler.is_compiling() or torch._C._is_tracing()):
            self._check_channels(input)
        by_operator = self._by_operator(input)
        weight = self.bits if by_operator else self.signs(input.dtype)
        # The operator takes the signs itself.
        signs = input if by_operator else self._binary_input(input)
        return self._finish(input, self._scaled(input, signs, weight, self.scale, output_size))

    def _check_channels(self, input: Tensor) -> None:
        dims = len(self.kernel_size)
        if input.dim() in (dims + 1, dims + 2) and input.shape[-1 - dims] != self.in_channels:
            shape = tuple(input.shape)
            raise ValueError(f"the input is {shape}, not of {self.in_channels} channels")

    def _by_operator(self, input: Tensor) -> bool:
        """Whether `binary_conv2d` computes the sums; its gradient is not defined."""
        if len(self.kernel_size) != 2 or self.transposed or input.dim() != 4:
            return False
        return self.recipe.input.binary and not (torch.is_grad_enabled() and input.requires_grad)

    def _finish(self, input: Tensor, output: Tensor) -> Tensor:
        if self.norm_scale is None or self.recipe.link.place == "after-norm":
            return super()._finish(input, self._normalized(output))
        return self._normalized(super()._finish(input, output))

    def _normalized(self, output: Tensor) -> Tensor:
        scale, shift = self.norm_scale, self.norm_shift
        if scale is None or shift is None:
            return output
        if output.dim() == len(self.kernel_size) + 1:  # without a batch, which the kernel needs
            return self._normalized(output.unsqueeze(0)).squeeze(0)
        return normalized(output, scale, shift)

    def signs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as +1 and -1, of the shape it was trained in."""
        count = torch.Size(self.latent_shape[1:]).numel()
        return unpack_bits(self.bits, count, dtype).view(self.latent_shape)

    def _apply_kernel(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output_size: Sequence[int] | None,
    ) -> Tensor:
        if self.transposed:
            return transposed_convolution(self, input, weight, bias, output_size)
        padding: Any = self.padding
        if weight.dtype == torch.uint8:
            if self.padding_mode != "zeros":
                input, pads = F.pad(input, self._border, mode=self.padding_mode), [0, 0, 0, 0]
            else:
                pads = self._pads(input.shape)
            return binary_conv2d(input, weight, self.threshold, self._geometry(pads))
        if self.same_padding:
            input = pad_same(input, self.kernel_size, self.stride, self.dilation)
        elif self.padding_mode != "zeros":
            input, padding = F.pad(input, self._border, mode=self.padding_mode), 0
        convolve: Callable[..., Tensor] = _CONVOLVE[len(self.kernel_size) - 1]
        return convolve(input, weight, bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        shape: str = _ConvNd.extra_repr(self)  # type: ignore[arg-type, no-untyped-call]
        fused = ["norm"] if self.norm_scale is not None else []
        fused += [self.tail.activation] if self.tail.activation != "none" else []
        with_fused = f", with {', '.join(fused)}" if fused else ""
        return f"{shape}, recipe={self.recipe.name}, packed{with_fused}"
