"""A small convolutional network for scikit-learn's digits, 8x8 grey pixels."""

from torch import Tensor, nn

from sqs_pyro.networks.registry import register_network


class DigitsNet(nn.Module):
    """Three 3x3 convolutions with batch norms, of 1, 2 and 4 times `width` channels, and a linear layer.

    Wider than the digits need, as networks worth compressing are: 93,728 weights at the default width.
    Input [B, 1, H, W], output logits [B, num_classes].
    """

    def __init__(self, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(1, width),
            *_convolution(width, 2 * width),
            nn.MaxPool2d(2),  # [B, 2 width, H / 2, W / 2]
            *_convolution(2 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),  # [B, 4 width]
        )
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, num_classes]``."""
        return self.fc(self.features(x))


def _convolution(in_channels: int, out_channels: int) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU()]


@register_network("digits_net")
def digits_net(num_classes: int = 10, width: int = 32) -> DigitsNet:
    """Four layers with weights; see :class:`DigitsNet`."""
    return DigitsNet(num_classes, width)
