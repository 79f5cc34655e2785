"""Training-time layers: binary convolutions that are torch's own, and ReActNet's activation.

Each `BinaryConv*` subclasses torch's class and, made by `from_float`, shares its Parameters, so
`layer1.0.conv1.weight` keeps its name and every float checkpoint still loads. The gate is its
child `link`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from el_convert.errors import ConversionError
from el_convert.functional import (
    binarize_ste,
    scaled_sign,
    sign_and_pass,
    weight_scale,
    xnor_activation_scale,
)
from el_convert.link import ElasticLink, LinkGeometry, link_geometry
from el_convert.recipes import Recipe, find_recipe

_TRANSPOSES = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_TORCH_KINDS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
LayerT = TypeVar("LayerT", bound="BinaryLayer")


class OneBitLayer(nn.Module):
    """The arithmetic that binary layers and packed ones share.

    Attributes:
        recipe: the choices it was made with.
        threshold: (C_in,) or None.
        norm: a norm moved between convolution and link (`link.place=after-norm`), or None.
        link: the gate, or None.
    """

    recipe: Recipe
    threshold: Tensor | None
    norm: nn.Module | None
    link: ElasticLink | None
    bias: Tensor | None
    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, ...]

    def _channelwise(self, values: Tensor) -> Tensor:
        return values.view(-1, *[1] * len(self.kernel_size))

    def _binary_input(self, input: Tensor) -> Tensor:
        if not self.recipe.input.binary:
            return input
        if self.threshold is not None:
            input = input - self._channelwise(self.threshold)
        return binarize_ste(input, self.recipe.input.gradient)

    def _signs(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """What the convolution reads, and the input for what else reads it."""
        fused = self.training and self.link is not None and self.threshold is None
        if fused and self.recipe.input.binary:
            return sign_and_pass(input, self.recipe.input.gradient)
        return self._binary_input(input), input

    def _finish(self, input: Tensor, output: Tensor) -> Tensor:
        """What follows the convolution: a norm that moved inside, then the gate."""
        if self.norm is not None:
            output = self.norm(output)
        return output if self.link is None else self.link(input, output)


class OneBitConv(OneBitLayer):
    """Of these, the ones with one kernel for all samples."""

    def _scaled(
        self,
        input: Tensor,
        signs: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        output_size: Sequence[int] | None,
    ) -> Tensor:
        """The convolution of the input's signs, its scales and its bias."""
        output = self._apply_kernel(signs, weight, None, output_size)
        if scale is not None:
            output = output * self._channelwise(scale)
        if self.recipe.input.scale == "xnor":
            output = output * self._activation_scale(input, output_size)
        return output if self.bias is None else output + self._channelwise(self.bias)

    def _activation_scale(self, input: Tensor, output_size: Sequence[int] | None) -> Tensor:
        def box_filter(magnitude: Tensor, taps: Tensor) -> Tensor:
            return self._apply_kernel(magnitude, taps, None, output_size)

        return xnor_activation_scale(
            input, self.out_channels, self.groups, box_filter, self.kernel_size
        )

    def _apply_kernel(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output_size: Sequence[int] | None,
    ) -> Tensor:
        """The convolution itself: what each kind of layer has of its own."""
        raise NotImplementedError


def transposed_convolution(
    layer: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_size: Sequence[int] | None,
) -> Tensor:
    """A transposed convolution of a layer's geometry, `output_size` as in torch."""
    dims = len(layer.kernel_size)
    size = None if output_size is None else list(output_size)
    # Of the layer it reads `output_padding` alone.
    output_padding: Any = _ConvTransposeNd._output_padding
    geometry = (layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation)
    padding = output_padding(layer, input, size, *geometry)
    transpose: Callable[..., Tensor] = _TRANSPOSES[dims - 1]
    return transpose(
        input, weight, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation
    )


class BinaryLayer(OneBitLayer):
    """What every binary layer has, whichever class of convolution it comes from.

    Attributes:
        recipe: the choices it was made with.
        threshold: (C_in,) or None.
        learned_scale: (C_out,) or None.
        norm: a norm moved between convolution and link (`link.place=after-norm`), or None.
        link: the gate, or None.
        packs: whether its weight can be stored at 1 bit.
    """

    packs: ClassVar[bool] = True
    _needs: ClassVar[tuple[str, ...]] = ()
    threshold: nn.Parameter | None
    learned_scale: nn.Parameter | None
    weight: Tensor

    @classmethod
    def from_float(cls: type[LayerT], conv: nn.Module, recipe: Recipe | str) -> LayerT:
        """A binary layer with the Parameters, mode, hooks and attributes of a convolution.

        Args:
            conv: an initialized convolution of the same kind; not changed.
            recipe: a recipe or its name.

        Raises:
            ConversionError: `conv` is of another kind, or is lazy.
        """
        cls._check_kind(conv)
        lacking = [name for name in cls._needs if not hasattr(conv, name)]
        if lacking:
            raise ConversionError(f"{type(conv).__name__} has no {', '.join(lacking)}")
        if isinstance(conv.weight, nn.parameter.UninitializedParameter):
            raise ConversionError(
                f"{type(conv).__name__} has no weights yet: run one forward first"
            )
        layer = cls.__new__(cls)
        # Not __init__, which would draw new weights: the random state stays as it was.
        layer.__dict__.update(
            {
                name: value.copy() if isinstance(value, (dict, set)) else value
                for name, value in vars(conv).items()
            }
        )
        layer._attach(find_recipe(recipe))
        return layer

    @classmethod
    def _check_kind(cls, conv: nn.Module) -> None:
        """Raise ConversionError for what `from_float` cannot take."""

    def _attach(self, recipe: Recipe) -> None:
        self.recipe = recipe
        weight = self.latent_weight().detach()
        threshold = weight.new_zeros(self.in_channels)
        learned = recipe.input.binary and recipe.input.threshold == "learned"
        self.register_parameter("threshold", nn.Parameter(threshold) if learned else None)
        learned = recipe.weight.binary and recipe.weight.scale == "learned"
        scale = self._mean_scale(weight) if learned else None
        self.register_parameter("learned_scale", None if scale is None else nn.Parameter(scale))
        self.norm = None
        linked = recipe.link.enabled and (
            recipe.link.where == "all" or self.in_channels == self.out_channels
        )
        link = ElasticLink(self._link_geometry(), recipe.link, like=weight).train(self.training)
        self.link = link if linked else None

    def _link_geometry(self) -> LinkGeometry:
        return link_geometry(self)

    def latent_weight(self) -> Tensor:
        """The real-valued weight whose sign is used, of the shape of `weight`."""
        return self.weight

    def output_scale(self, latent: Tensor) -> Tensor | None:
        """The weight scale, (C_out,), or None where the recipe has none.

        Args:
            latent: what `latent_weight` gave.
        """
        kind = self.recipe.weight.scale
        if not self.recipe.weight.binary or kind == "none":
            return None
        if kind == "learned":
            return self.learned_scale
        if kind == "mean-detached":
            latent = latent.detach()
        return self._mean_scale(latent)

    def _mean_scale(self, weight: Tensor) -> Tensor:
        return weight_scale(weight)


class BinaryConv(BinaryLayer, OneBitConv, _ConvNd):
    r"""What all binary convolutions share; use the subclass of the dimension you need.

    .. math:: y = s \cdot \text{conv}(\text{pad}_0(b(x - t)), b(w)) + \text{bias}, \qquad
              \text{out} = y + \gamma \cdot \text{align}(x)

    Zero padding comes after the sign, so a padded position contributes exactly 0.
    :math:`b` is the strict sign, :math:`s` the weight scale (XNOR-Net, arXiv 1603.05279),
    :math:`t` an optional learned threshold (ReActNet, arXiv 2003.03488), and the last term the
    Elastic-Link gate (arXiv 2112.10149). Which of these are there is the recipe's choice.

    Args:
        *args, **kwargs: those of torch's class of the same dimension.
        recipe: a recipe or its name.

    Attributes:
        threshold: (C_in,) or None.
        learned_scale: (C_out,) or None.
        norm: a norm moved between convolution and link (`link.place=after-norm`), or None.
        link: the gate, or None.

    Raises:
        UnknownNameError: no recipe has that name.

    Example:
        >>> layer = BinaryConv2d(8, 16, 1)
        >>> layer(torch.randn(1, 8, 5, 5)).shape, layer.link.kind
        (torch.Size([1, 16, 5, 5]), 'expand')
    """

    def __init__(self, *args: Any, recipe: Recipe | str = "elastic-link", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._attach(find_recipe(recipe))

    @classmethod
    def _check_kind(cls, conv: nn.Module) -> None:
        if not isinstance(conv, _ConvNd):
            raise ConversionError(f"{type(conv).__name__} is not a convolution")
        kind = next(base for base in cls.__mro__ if base in _TORCH_KINDS)
        if not isinstance(conv, kind):
            raise ConversionError(f"{type(conv).__name__} is no {kind.__name__}")

    @property
    def pads_to_same(self) -> bool:
        """Whether it pads as TensorFlow does, by the input's size."""
        return False

    def _mean_scale(self, weight: Tensor) -> Tensor:
        return weight_scale(weight, groups=self.groups, transposed=self.transposed)

    def _binary_output(
        self, input: Tensor, signs: Tensor, output_size: Sequence[int] | None
    ) -> Tensor:
        weight = latent = self.latent_weight()
        if not self.recipe.weight.binary and self.recipe.input.scale == "none":
            return self._apply_kernel(signs, latent, self.bias, output_size)
        if self._folds_scale():
            weight = self._scaled_weight(latent)
            return self._apply_kernel(signs, weight, self.bias, output_size)
        if self.recipe.weight.binary:
            weight = binarize_ste(latent, self.recipe.weight.gradient)
        return self._scaled(input, signs, weight, self.output_scale(latent), output_size)

    def _folds_scale(self) -> bool:
        # In eval the signs are summed first, exactly, as packed layers do; in training as well
        # where a sum of exactly 0 may go to the next sign as it is.
        moved = self.link is not None or self.bias is not None or self.norm is not None
        exact = not moved or self.transposed or self.recipe.input.scale == "xnor"
        weight = self.recipe.weight
        return self.training and not exact and weight.binary and weight.scale != "none"

    def _scaled_weight(self, latent: Tensor) -> Tensor:
        options = self.recipe.weight
        scale = self.learned_scale if options.scale == "learned" else None
        return scaled_sign(latent, scale, options.gradient, through_mean=options.scale == "mean")

    def _apply_kernel(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output_size: Sequence[int] | None,
    ) -> Tensor:
        output: Tensor = self._conv_forward(input, weight, bias)
        return output

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        signs, input = self._signs(input)
        return self._finish(input, self._binary_output(input, signs, output_size))

    def extra_repr(self) -> str:
        convolution: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{convolution}, recipe={self.recipe.name}"


class _BinaryConvTranspose(BinaryConv, _ConvTransposeNd):
    """Transposed convolutions; `output_size` as in torch."""

    def _apply_kernel(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output_size: Sequence[int] | None,
    ) -> Tensor:
        return transposed_convolution(self, input, weight, bias, output_size)


class BinaryConv1d(BinaryConv, nn.Conv1d):
    """1-bit `torch.nn.Conv1d`: (N, C_in, L) to (N, C_out, L'); see `BinaryConv`."""


class BinaryConv2d(BinaryConv, nn.Conv2d):
    """1-bit `torch.nn.Conv2d`: (N, C_in, H, W) to (N, C_out, H', W'); see `BinaryConv`."""


class BinaryConv3d(BinaryConv, nn.Conv3d):
    """1-bit `torch.nn.Conv3d`: (N, C_in, D, H, W) to (N, C_out, ...); see `BinaryConv`."""


class BinaryConvTranspose1d(_BinaryConvTranspose, nn.ConvTranspose1d):
    """1-bit `torch.nn.ConvTranspose1d`; see `BinaryConv`."""


class BinaryConvTranspose2d(_BinaryConvTranspose, nn.ConvTranspose2d):
    """1-bit `torch.nn.ConvTranspose2d`; see `BinaryConv`."""


class BinaryConvTranspose3d(_BinaryConvTranspose, nn.ConvTranspose3d):
    """1-bit `torch.nn.ConvTranspose3d`; see `BinaryConv`."""
