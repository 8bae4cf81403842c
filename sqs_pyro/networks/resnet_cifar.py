"""Residual networks for small images: He et al. 2015, "Deep Residual Learning", section 4.2."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sqs_pyro.networks.registry import register_network

_STAGES = (16, 32, 64)  # channels; the second and third stage halve the image


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (the paper's option A).

    [B, Cin, H, W] to [B, Cout, H / stride, W / stride].
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Residual plus shortcut."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        """Identity; where the shape changes, every stride-th pixel and zeros for the new channels."""
        if self.stride == 1 and self.new_channels == 0:
            return x
        before = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))


class CifarResNet(nn.Module):
    """6n + 2 layers with weights: a convolution, three stages of n blocks, a linear layer.

    Input [B, in_channels, H, W], output logits [B, num_classes].
    """

    def __init__(self, blocks_per_stage: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, _STAGES[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STAGES[0])
        self.stage1 = _stage(_STAGES[0], _STAGES[0], blocks_per_stage, stride=1)
        self.stage2 = _stage(_STAGES[0], _STAGES[1], blocks_per_stage, stride=2)
        self.stage3 = _stage(_STAGES[1], _STAGES[2], blocks_per_stage, stride=2)
        self.fc = nn.Linear(_STAGES[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, num_classes]``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.stage3(self.stage2(self.stage1(x)))  # [B, 64, H / 4, W / 4]
        return self.fc(torch.mean(x, dim=(2, 3)))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


@register_network("resnet20")
def resnet20(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """20 layers, 0.27 million parameters."""
    return CifarResNet(3, num_classes, in_channels)


@register_network("resnet32")
def resnet32(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """32 layers, 0.46 million parameters."""
    return CifarResNet(5, num_classes, in_channels)


@register_network("resnet44")
def resnet44(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """44 layers, 0.66 million parameters."""
    return CifarResNet(7, num_classes, in_channels)


@register_network("resnet56")
def resnet56(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """56 layers, 0.85 million parameters."""
    return CifarResNet(9, num_classes, in_channels)
