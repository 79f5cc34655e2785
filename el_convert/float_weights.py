"""Starting from the weights of a float network."""

from __future__ import annotations

from pathlib import Path

from timm.models import load_state_dict
from torch import nn

from el_convert.errors import TrainingError, first_few, first_line
from el_convert.latent import binary_layers
from el_convert.slopes import ChannelPReLU, RPReLU


def load_float_weights(model: nn.Module, path: Path) -> str:
    """Load a float checkpoint into a network, binarized or not.

    Binarized convolutions keep the names of the float ones, so every checkpoint of timm or
    torchvision fits; gates, thresholds and slopes stay as they are. A classifier of other classes
    stays as it is too.

    Args:
        model: changed in place.
        path: what `timm.models.load_state_dict` reads; only tensors are unpickled.

    Returns:
        What of the network the file lacks or has in another shape, in words; "" for nothing.

    Raises:
        TrainingError: the file does not load, or holds less than half of the network.
    """
    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # torch, pickle and safetensors raise what they like
        raise TrainingError(f"{path} is no checkpoint of weights ({first_line(error)})") from error
    own = model.state_dict()
    ours = _of_conversion(model)
    expected = [name for name in own if name not in ours]
    fitting = {
        name: value
        for name, value in state.items()
        if name in own and value.shape == own[name].shape
    }
    missing = [name for name in expected if name not in fitting]
    if 2 * len(missing) > len(expected):
        raise TrainingError(
            f"{path} is of another network: it lacks {len(missing)} of {len(expected)} tensors, as "
            f"{first_few(missing)}"
        )
    model.load_state_dict(fitting, strict=False)
    return first_few(missing)


def _of_conversion(model: nn.Module) -> set[str]:
    """Names that only the binarized network has."""
    added: set[str] = set()
    for path, _ in binary_layers(model):
        added |= {f"{path}.link.gamma", f"{path}.threshold", f"{path}.learned_scale"}
    for path, module in model.named_modules():
        if isinstance(module, (ChannelPReLU, RPReLU)):
            added |= {f"{path}.{name}" for name, _ in module.named_parameters()}
    return added
