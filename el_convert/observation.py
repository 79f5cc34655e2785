"""What a binarized network does on images: its input signs, its links, and packed beside float."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from el_convert.convert import conversion_of, copy_model
from el_convert.datasets import to_device
from el_convert.errors import DataError
from el_convert.link import ElasticLink
from el_convert.nn import OneBitLayer
from el_convert.packed import PackedConv
from el_convert.packing import pack_layers, packable
from el_convert.tracing import undisturbed

_CHUNK = 8  # images at a time: the signs of every layer's input are held for so many


@dataclass(frozen=True)
class LayerObservation:
    """One binarized layer.

    Attributes:
        path: qualified name.
        positive: of each input channel, the share of values whose sign is +1; () where the input
            is not binarized.
        link_share: of the output's power before the link's sum, what the link gives: l / (l + y),
            l and y the mean squares of gamma * align(input) and of what it is added to. None
            without a link, and in packed networks, where the sum is one pass.
        difference: packed and unpacked on the same inputs: the largest difference of their
            outputs, relative to the largest output. None where it cannot be packed, or is.
        flips: share of input signs that differ between the packed and the unpacked network, each
            having computed all layers before. None likewise.
    """

    path: str
    positive: tuple[float, ...] = ()
    link_share: float | None = None
    difference: float | None = None
    flips: float | None = None

    @property
    def constant(self) -> int:
        """Input channels whose sign never changed: they tell the layer nothing."""
        return sum(share in (0.0, 1.0) for share in self.positive)


@dataclass(frozen=True)
class Observation:
    """A network on images.

    Attributes:
        images: how many.
        layers: the binarized ones that were called, in the model's order.
        difference: of the outputs of packed and unpacked network, as of a layer's.
        same_answer: images of which both say the same class; None where outputs are no logits.
        right: images whose label the network says; None without labels.
    """

    images: int
    layers: tuple[LayerObservation, ...]
    difference: float | None = None
    same_answer: int | None = None
    right: int | None = None


def observe(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Observation:
    """Run a binarized network on images, packed and as it is, and look into every layer.

    Args:
        model: made by `binarize`, `load` or `pack`; run in eval mode, left as it was.
        batches: of images (N, C, H, W) and labels (N,), or None for labels; at least one.
        device: where the model is.
        progress: called with the number of images after each batch.

    Raises:
        ConversionError: the model is not binarized.
        DataError: there is no image.

    Example:
        >>> from el_convert import binarize
        >>> model = binarize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Flatten()))
        >>> found = observe(model, [(torch.rand(5, 3, 8, 8), None)])
        >>> found.images, found.layers[0].path, len(found.layers[0].positive)
        (5, '1', 4)
    """
    conversion_of(model)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, OneBitLayer)}
    watches = {path: _Watch(layer) for path, layer in layers.items()}
    twin = pack_layers(copy_model(model).eval()) if any(map(packable, model.modules())) else None
    outputs = _Outputs()
    with undisturbed(model), _watching(layers, twin, watches):
        for batch in batches:
            for images, labels in _chunks(batch, torch.device(device)):
                output = _main_tensor(model(images))
                outputs.add(len(images), output, labels, _run(twin, images))
                for watch in watches.values():
                    watch.signs.clear()  # of layers that the twin does not have
            if progress:
                progress(len(batch[0]))
    if not outputs.images:
        raise DataError("there is no image to look at the network with")
    rows = [watch.observation(path) for path, watch in watches.items() if watch.calls]
    return outputs.observation(tuple(rows))


def _chunks(batch: Any, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
    images, labels = batch
    if isinstance(labels, Tensor):
        images, labels = to_device(batch, device)
        yield from zip(torch.split(images, _CHUNK), torch.split(labels, _CHUNK), strict=True)
    else:
        yield from ((part, None) for part in torch.split(images.to(device), _CHUNK))


def _run(twin: nn.Module | None, images: Tensor) -> Tensor | None:
    return None if twin is None else _main_tensor(twin(images))


def _main_tensor(output: object) -> Tensor | None:
    """The tensor of an output, or the first of several."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


class _Difference:
    """The largest difference of two tensors, relative to the second's largest value."""

    def __init__(self) -> None:
        self._apart, self._largest = torch.zeros(()), torch.zeros(())
        self._any = False

    def add(self, given: Tensor, wanted: Tensor) -> None:
        if wanted.numel():
            apart = (given.double() - wanted.double()).abs().amax().cpu()
            # Not max, as a value that is no number must show.
            self._apart = torch.maximum(self._apart, apart)
            self._largest = torch.maximum(self._largest, wanted.double().abs().amax().cpu())
            self._any = True

    @property
    def relative(self) -> float | None:
        if not self._any:
            return None
        return float(self._apart / self._largest) if self._largest != 0 else float(self._apart)


class _Outputs:
    """What comes out of the network and of its packed twin."""

    def __init__(self) -> None:
        self.images = 0
        self._difference = _Difference()
        self._same: int | None = None
        self._right: int | None = None

    def add(
        self, images: int, output: Tensor | None, labels: Tensor | None, packed: Tensor | None
    ) -> None:
        self.images += images
        if output is None:
            return
        if packed is not None:
            self._difference.add(packed, output)
        if output.dim() != 2:
            return
        answers = output.argmax(1)
        if packed is not None:
            self._same = (self._same or 0) + int((packed.argmax(1) == answers).sum())
        if labels is not None:
            self._right = (self._right or 0) + int((labels == answers).sum())

    def observation(self, layers: tuple[LayerObservation, ...]) -> Observation:
        return Observation(self.images, layers, self._difference.relative, self._same, self._right)


class _Watch:
    """Counts for one layer, over all its calls."""

    def __init__(self, layer: OneBitLayer) -> None:
        self.calls = 0
        self.signs: list[Tensor] = []
        # Of a copy, as a packed layer shares the link, whose mode is the model's.
        self._packed = PackedConv(copy_model(layer).eval()) if packable(layer) else None
        self._positive, self._values = torch.zeros((), dtype=torch.int64), 0
        self._of_link, self._of_rest = 0.0, 0.0
        self._difference = _Difference()
        self._flipped, self._compared = 0, 0

    def after(self, layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        """A forward hook of the layer."""
        self.calls += 1
        if layer.recipe.input.binary:
            signs = _signs(layer, args[0])
            by_channel = signs.movedim(-1 - len(layer.kernel_size), 0).flatten(1)
            self._positive = self._positive + by_channel.sum(1).cpu()
            self._values += by_channel.shape[1]
            self.signs.append(signs)
        if self._packed is not None:
            self._difference.add(self._packed(*args, **kwargs), output)

    def after_link(self, link: ElasticLink, args: tuple[Any, ...], output: Tensor) -> None:
        """A forward hook of the layer's link."""
        self._of_link += float((output.double() - args[1].double()).square().sum())
        self._of_rest += float(args[1].double().square().sum())

    def before_packed(self, layer: Any, args: tuple[Any, ...]) -> None:
        """A hook of the same layer in the packed network, which runs after the other."""
        if layer.recipe.input.binary and self.signs:
            signs = self.signs.pop(0)
            self._flipped += int((_signs(layer, args[0]) != signs).sum())
            self._compared += signs.numel()

    def observation(self, path: str) -> LayerObservation:
        power = self._of_link + self._of_rest
        return LayerObservation(
            path,
            tuple((self._positive.double() / self._values).tolist()) if self._values else (),
            self._of_link / power if power else None,
            self._difference.relative,
            self._flipped / self._compared if self._compared else None,
        )


def _signs(layer: Any, input: Tensor) -> Tensor:
    """Where the layer's binarized input is +1."""
    if layer.threshold is not None:
        input = input - layer.threshold.view(-1, *[1] * len(layer.kernel_size))
    return input > 0


@contextmanager
def _watching(
    layers: Mapping[str, OneBitLayer], twin: nn.Module | None, watches: Mapping[str, _Watch]
) -> Iterator[None]:
    of_twin = {} if twin is None else dict(twin.named_modules(remove_duplicate=False))
    with ExitStack() as stack:
        for path, layer in layers.items():
            watch = watches[path]
            handles = [layer.register_forward_hook(watch.after, with_kwargs=True)]
            if layer.link is not None:
                handles.append(layer.link.register_forward_hook(watch.after_link))
            packed = of_twin.get(path)
            if isinstance(packed, PackedConv):
                handles.append(packed.register_forward_pre_hook(watch.before_packed))
            for handle in handles:
                stack.callback(handle.remove)
        yield
