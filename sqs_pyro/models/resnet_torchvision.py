"""torchvision's ResNet-18 and ResNet-50, with a stem for ImageNet or for small images."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sqs_pyro.errors import NetworkError, RecipeError
from sqs_pyro.registry import register_network

Stem = Literal["imagenet", "cifar"]


@register_network("resnet18")
def resnet18(
    num_classes: int = 1000, in_channels: int = 3, stem: Stem = "imagenet", weights: str | None = None
) -> nn.Module:
    """ResNet-18; 11.69 million parameters for ImageNet. See :func:`resnet50` for the arguments."""
    from torchvision.models import resnet18 as constructor  # heavy, and only needed here

    return _resnet(constructor, num_classes, in_channels, stem, weights)


@register_network("resnet50")
def resnet50(
    num_classes: int = 1000, in_channels: int = 3, stem: Stem = "imagenet", weights: str | None = None
) -> nn.Module:
    """ResNet-50; 25.56 million parameters for ImageNet.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        stem: "imagenet" (7x7 convolution with stride 2, max-pooling) or, for images of about 32 pixels,
            "cifar" (3x3 convolution with stride 1, no pooling).
        weights: a file with this network's state dict, or None for random weights.

    Raises:
        RecipeError: an unknown stem.
        NetworkError: the file of weights is missing, unreadable, or of another network.
    """
    from torchvision.models import resnet50 as constructor  # heavy, and only needed here

    return _resnet(constructor, num_classes, in_channels, stem, weights)


def _resnet(
    constructor: Callable[..., nn.Module], num_classes: int, in_channels: int, stem: str, weights: str | None
) -> nn.Module:
    if stem not in ("imagenet", "cifar"):
        raise RecipeError(f"The stem {stem!r} is unknown: give 'imagenet' or 'cifar'.")
    net = constructor(num_classes=num_classes)
    if stem == "cifar":
        net.conv1 = _first_convolution(in_channels, 3, stride=1)
        net.maxpool = nn.Identity()
    elif in_channels != 3:
        net.conv1 = _first_convolution(in_channels, 7, stride=2)
    if weights is not None:
        load_weights(net, Path(weights))
    return net


def _first_convolution(in_channels: int, size: int, stride: int) -> nn.Conv2d:
    convolution = nn.Conv2d(in_channels, 64, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution


def load_weights(net: nn.Module, path: Path) -> None:
    """Load a state dict (torch's or safetensors' format) that fits `net` exactly. Nothing in it is executed.

    Raises:
        NetworkError: the file is missing, unreadable, or of another network.
    """
    state = _read_state(path)
    wanted = net.state_dict()
    for name in [*wanted, *state]:
        if name not in wanted or name not in state or state[name].shape != wanted[name].shape:
            have, need = _shape(state.get(name)), _shape(wanted.get(name))
            raise NetworkError(
                f"The weights in '{path}' are another network's: '{name}' is {have} there and {need} here; "
                f"give the weights of this network or change its options."
            )
    net.load_state_dict(state)


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise NetworkError(f"The file of weights '{path}' does not exist: correct the path.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each library and each kind of damage raises a class of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NetworkError(f"The weights in '{path}' cannot be read ({reason}): fetch them again.") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise NetworkError(f"'{path}' holds no state dict (names to tensors): save `net.state_dict()`.")
    return state


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(list(tensor.shape))
