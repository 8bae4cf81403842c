"""torchvision's ResNet-18 and ResNet-50, with a stem for ImageNet or for small images."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from torch import nn

from sqs_pyro.errors import RecipeError
from sqs_pyro.extras import needed_for
from sqs_pyro.networks.registry import register_network
from sqs_pyro.networks.state import load_weights

Stem = Literal["imagenet", "cifar"]


@register_network("resnet18")
def resnet18(
    num_classes: int = 1000, in_channels: int = 3, stem: Stem = "imagenet", weights: str | None = None
) -> nn.Module:
    """ResNet-18; 11.69 million parameters for ImageNet. See :func:`resnet50` for the arguments."""
    with needed_for("ResNets of torchvision"):
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
    with needed_for("ResNets of torchvision"):
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
        net.maxpool = nn.Identity()  # 32 pixels would be 8 before the first block
    elif in_channels != 3:
        net.conv1 = _first_convolution(in_channels, 7, stride=2)
    if weights is not None:
        load_weights(net, Path(weights))
    return net


def _first_convolution(in_channels: int, size: int, stride: int) -> nn.Conv2d:
    convolution = nn.Conv2d(in_channels, 64, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution
