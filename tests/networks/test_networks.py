from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sqs_pyro.errors import NetworkError, RecipeError
from sqs_pyro.networks.digits import digits_net
from sqs_pyro.networks.registry import build_network, network_names
from sqs_pyro.networks.resnet_cifar import BasicBlock, resnet20, resnet32, resnet44, resnet56
from sqs_pyro.networks.resnet_torchvision import resnet18, resnet50

CIFAR = {20: resnet20, 32: resnet32, 44: resnet44, 56: resnet56}


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def layers(net: nn.Module) -> int:
    return sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in net.modules())


def cifar_parameters(n: int, in_channels: int, num_classes: int) -> int:
    """He et al. 2015, section 4.2, with 2n layers on maps of 16, 32 and 64 channels, added up by hand."""
    convolutions = 9 * in_channels * 16 + 2 * n * 9 * 16**2
    convolutions += 9 * 16 * 32 + (2 * n - 1) * 9 * 32**2 + 9 * 32 * 64 + (2 * n - 1) * 9 * 64**2
    norms = 2 * 16 + 2 * n * 2 * (16 + 32 + 64)
    return convolutions + norms + 64 * num_classes + num_classes


@pytest.mark.parametrize("depth", CIFAR)
@pytest.mark.parametrize(("in_channels", "num_classes"), [(1, 10), (3, 10), (3, 100)])
def test_cifar_resnets_have_the_papers_layers_and_parameters(depth: int, in_channels: int, num_classes: int):
    net = CIFAR[depth](num_classes=num_classes, in_channels=in_channels)
    n = (depth - 2) // 6
    assert layers(net) == 6 * n + 2 == depth
    assert count(net) == cifar_parameters(n, in_channels, num_classes)


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_cifar_resnets_have_the_papers_table_6_sizes(depth: int, millions: float):
    assert round(count(CIFAR[depth]()) / 1e6, 2) == millions


@pytest.mark.parametrize(("in_channels", "side"), [(3, 32), (1, 28)])
def test_cifar_resnet_maps_shrink_as_in_the_paper(in_channels: int, side: int):
    net = resnet20(in_channels=in_channels).eval()
    shapes = []
    for stage in (net.stage1, net.stage2, net.stage3):
        stage.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    assert net(torch.randn(2, in_channels, side, side)).shape == (2, 10)
    assert shapes == [(16, side, side), (32, side // 2, side // 2), (64, side // 4, side // 4)]


def test_option_a_shortcut_is_subsampling_and_zeros():
    """With the residual switched off a block is its shortcut, which is written out here with indices."""
    block = BasicBlock(4, 8, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(3, 4, 6, 6)
    expected = torch.zeros(3, 8, 3, 3)
    for channel in range(4):
        for row in range(3):
            for column in range(3):
                expected[:, channel + 2, row, column] = x[:, channel, 2 * row, 2 * column]
    assert torch.equal(block(x), expected)


def test_block_is_relu_of_residual_plus_identity():
    block = BasicBlock(4, 4, stride=1).eval()
    x = torch.randn(2, 4, 5, 5)
    hidden = F.conv2d(x, block.conv1.weight, padding=1) / (1 + block.bn1.eps) ** 0.5
    residual = F.conv2d(hidden.clamp(min=0), block.conv2.weight, padding=1) / (1 + block.bn2.eps) ** 0.5
    torch.testing.assert_close(block(x), (residual + x).clamp(min=0))


def test_digits_net():
    net = digits_net()
    weights = sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert weights == 9 * 32 + 9 * 32 * 64 + 9 * 64 * 128 + 128 * 10 == 93_728
    assert all(m.bias is None for m in net.modules() if isinstance(m, nn.Conv2d))
    assert net(torch.randn(5, 1, 8, 8)).shape == (5, 10)
    assert digits_net(num_classes=3, width=4)(torch.randn(5, 1, 8, 8)).shape == (5, 3)


@pytest.mark.parametrize(
    ("ours", "name", "parameters"), [(resnet18, "resnet18", 11_689_512), (resnet50, "resnet50", 25_557_032)]
)
def test_imagenet_resnets_are_torchvisions(ours, name: str, parameters: int):
    import torchvision

    with torch.device("meta"):
        net = ours()
        reference = getattr(torchvision.models, name)()
    assert count(net) == parameters
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    assert shapes == {key: value.shape for key, value in reference.state_dict().items()}


@pytest.mark.parametrize(("stem", "side", "map_side"), [("imagenet", 64, 16), ("cifar", 32, 32)])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_stems(stem: str, side: int, map_side: int, in_channels: int):
    """ImageNet's stem quarters the image before the first stage; the stem for small images keeps it."""
    net = resnet18(num_classes=7, in_channels=in_channels, stem=stem).eval()
    sides = []
    net.layer1.register_forward_pre_hook(lambda module, inputs: sides.append(inputs[0].shape[-1]))
    with torch.no_grad():
        assert net(torch.randn(1, in_channels, side, side)).shape == (1, 7)
    assert sides == [map_side]


def test_unknown_stem():
    with pytest.raises(RecipeError, match="stem 'small' is unknown: give 'imagenet' or 'cifar'"):
        resnet18(stem="small")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_from_a_file(tmp_path: Path, suffix: str):
    from safetensors.torch import save_file

    net = resnet18(num_classes=3, stem="cifar")
    path = tmp_path / f"weights{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(net.state_dict(), path)
    copy = resnet18(num_classes=3, stem="cifar", weights=str(path))
    for name, tensor in net.state_dict().items():
        assert torch.equal(copy.state_dict()[name], tensor)
    with pytest.raises(NetworkError, match=r"another network's: 'conv1.weight' is \[64, 3, 3, 3\] there"):
        resnet18(num_classes=3, weights=str(path))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(NetworkError, match=r"cannot be read .*: fetch them again"):
        resnet18(num_classes=3, stem="cifar", weights=str(path))


def test_weights_missing_or_no_state_dict(tmp_path: Path):
    with pytest.raises(NetworkError, match="does not exist"):
        resnet18(weights=str(tmp_path / "nothing.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(NetworkError, match="holds no state dict"):
        resnet18(weights=str(tmp_path / "list.pt"))


def test_every_network_is_registered_and_remembers_how_it_was_built():
    names = {"digits_net", "resnet18", "resnet20", "resnet32", "resnet44", "resnet50", "resnet56"}
    assert names <= set(network_names())
    net = build_network("resnet20", in_channels=1)
    assert net.network_spec == {"name": "resnet20", "options": {"in_channels": 1}}


def test_a_network_is_rebuilt_without_the_file_of_its_first_weights(tmp_path: Path):
    path = tmp_path / "weights.pt"
    torch.save(resnet18(num_classes=3, stem="cifar").state_dict(), path)
    net = build_network("resnet18", num_classes=3, stem="cifar", weights=str(path))
    assert net.network_spec == {"name": "resnet18", "options": {"num_classes": 3, "stem": "cifar"}}


@pytest.mark.parametrize("name", ["digits_net", "resnet20"])
def test_networks_export_as_one_graph(name: str):
    net = build_network(name, in_channels=1) if name == "resnet20" else build_network(name)
    x = torch.randn(2, 1, 8, 8)
    exported = torch.export.export(net.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), net(x))
