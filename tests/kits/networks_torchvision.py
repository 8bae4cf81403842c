"""torchvision's architectures at a few thousand weights, built from their own classes and blocks."""

from functools import partial

import pyro.distributions as dist
from kits.network_case import CLASSES, Network, per_position, tensor
from torch import nn
from torch.nn import functional as F

IMAGE = tensor(3, 32, 32)


def resnet() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    class Narrow(ResNet):
        def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
            return super()._make_layer(block, planes // 8, blocks, stride, dilate)

    net = Narrow(BasicBlock, [1, 1, 1, 1])
    net.fc = nn.Linear(64, CLASSES)
    return net


def mobilenet_v2() -> nn.Module:
    from torchvision.models import MobileNetV2

    net = MobileNetV2(CLASSES, 0.1, [[1, 8, 1, 1], [6, 8, 2, 2], [6, 16, 1, 2]])
    net.features[-1] = nn.Sequential(nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
    net.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, CLASSES))
    return net


def mobilenet_v3() -> nn.Module:
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    rows = [
        (16, 3, 16, 16, True, "RE", 2, 1),
        (16, 3, 32, 16, False, "HS", 1, 1),
        (16, 5, 32, 24, True, "HS", 2, 1),
    ]
    return MobileNetV3([InvertedResidualConfig(*row, 0.5) for row in rows], 32, num_classes=CLASSES)


def efficientnet() -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    rows = [(1, 3, 1, 8, 8, 1), (4, 3, 2, 8, 16, 1), (4, 5, 2, 16, 16, 2)]
    return EfficientNet([MBConvConfig(*row) for row in rows], 0.2, num_classes=CLASSES, last_channel=32)


def convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], 0.1, num_classes=CLASSES)


def vision_transformer() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=CLASSES, dropout=0.1)


def swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 8, [1, 2], [1, 2], [4, 4], num_classes=CLASSES)


def squeezenet() -> nn.Module:
    from torchvision.models.squeezenet import Fire, SqueezeNet

    net = SqueezeNet("1_1", num_classes=CLASSES)
    net.features = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), Fire(16, 4, 8, 8), Fire(16, 4, 8, 8))
    net.classifier[1] = nn.Conv2d(16, CLASSES, 1)
    return net


def shufflenet() -> nn.Module:
    from torchvision.models import ShuffleNetV2

    return ShuffleNetV2([1, 1, 1], [8, 8, 16, 16, 32], num_classes=CLASSES)


def densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(4, (2, 2), 8, num_classes=CLASSES)


def mnasnet() -> nn.Module:
    from torchvision.models import MNASNet

    net = MNASNet(0.1, num_classes=CLASSES)
    net.layers = nn.Sequential(*net.layers[:9], nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24))
    net.classifier = nn.Linear(24, CLASSES)
    return net


def inception() -> nn.Module:
    """GoogLeNet's blocks and its auxiliary head, which answers in training only."""
    from torchvision.models.googlenet import BasicConv2d, GoogLeNetOutputs, Inception

    class Googlish(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = BasicConv2d(3, 8, kernel_size=3, stride=2)
            self.blocks = nn.ModuleList([Inception(8, 4, 4, 4, 4, 4, 4), Inception(16, 4, 4, 8, 4, 4, 4)])
            self.aux, self.head = nn.Linear(16, CLASSES), nn.Linear(20, CLASSES)

        def forward(self, x):
            middle = self.blocks[0](self.stem(x))
            out = self.head(self.blocks[1](middle).mean((2, 3)))
            return GoogLeNetOutputs(out, self.aux(middle.mean((2, 3))), None) if self.training else out

    return Googlish()


def fcn() -> nn.Module:
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)

        def forward(self, x):
            x = F.relu(self.norm(self.conv(x)))
            return {"out": x, "aux": x}

    return FCN(Stem(), FCNHead(16, CLASSES), FCNHead(16, CLASSES))


def pixels(output) -> dist.TorchDistribution:
    """Segmentation: logits ``[B, C, H, W]`` under ``"out"``, class axis 1 as in torch."""
    return dist.Categorical(logits=output["out"].movedim(1, -1)).to_event(2)


def video() -> nn.Module:
    from torchvision.models.video.resnet import BasicBlock, BasicStem, Conv3DSimple, VideoResNet

    class Narrow(VideoResNet):
        def _make_layer(self, block, conv_builder, planes, blocks, stride=1):
            if planes > 64:
                return nn.Identity()
            return super()._make_layer(block, conv_builder, planes, blocks, stride)

    class Stem(BasicStem):
        def __init__(self):
            super().__init__()
            self[0], self[1] = nn.Conv3d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm3d(4)

    class Small(BasicBlock):
        def __init__(self, inplanes, planes, conv_builder, stride=1, downsample=None):
            super().__init__(4, 4, conv_builder, 1, None)

    net = Narrow(Small, [Conv3DSimple] * 4, [1, 1, 1, 1], Stem)
    net.fc = nn.Linear(4, CLASSES)
    return net


TORCHVISION = {
    "resnet": Network(resnet, IMAGE),
    "mobilenet_v2": Network(mobilenet_v2, IMAGE),
    "mobilenet_v3": Network(mobilenet_v3, IMAGE),
    "efficientnet": Network(efficientnet, IMAGE),
    "convnext": Network(convnext, IMAGE),
    "vision_transformer": Network(vision_transformer, IMAGE),
    "swin": Network(swin, IMAGE),
    "squeezenet": Network(squeezenet, IMAGE),
    "shufflenet": Network(shufflenet, IMAGE),
    "densenet": Network(densenet, IMAGE),
    "mnasnet": Network(mnasnet, IMAGE),
    "inception": Network(inception, IMAGE),
    "fcn": Network(fcn, tensor(3, 16, 16), per_position(16, 16), pixels, classifier=False),
    "video": Network(video, tensor(3, 4, 16, 16)),
}


def _timm(name: str, **options) -> nn.Module:
    import sqs_pyro  # noqa: F401, I001  before torchvision, which timm imports
    import timm

    return timm.create_model(name, num_classes=CLASSES, **options)


#: timm's own networks for tests, 0.1 to 0.4 million weights.
TIMM = {
    f"timm_{name}": Network(partial(_timm, f"test_{name}", **options), tensor(3, size, size))
    for name, size, options in (
        ("efficientnet", 32, {}),
        ("efficientnet_evos", 32, {}),
        ("byobnet", 32, {}),
        ("nfnet", 32, {}),  # convolutions that standardise their weights in forward
        ("convnext", 32, {}),
        ("mambaout", 32, {}),
        ("resnet", 32, {}),
        ("vit", 32, {"img_size": 32}),
    )
}
