"""The way back from packed modules to plain ones, in place; and who is told of new packed networks."""

import copy

import pytest
import torch
from torch import nn

from sqs_pyro.kernels import dense_state, load, network, packed_network, save
from sqs_pyro.kernels.placing import unpack_weights
from sqs_pyro.testing.layouts import random_coded


class Mixed(nn.Module):
    """Modules of every kind that can be packed, a shared weight, and one module under two names."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding="same", padding_mode="reflect")
        self.again = self.conv
        self.up = nn.ConvTranspose1d(8, 6, 2, stride=2)
        self.words = nn.Embedding(11, 6, padding_idx=0)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.words.weight

    def forward(self, image, words):
        seen = self.up(self.conv(image).mean(3)).mT
        read = torch.cat([seen, self.words(words)], dim=1)
        return self.head(self.attention(read, read, read)[0])


INPUTS = torch.randn(3, 2, 5, 4), torch.randint(0, 11, (3, 4))


@pytest.fixture
def net():
    return Mixed().eval()


@pytest.fixture
def packed(net):
    return packed_network(net, code_matrices(net))


def code_matrices(net):
    matrices = [(name, tuple(p.shape)) for name, p in net.named_parameters() if p.dim() > 1]
    return {name: random_coded(shape, 5, seed=seed) for seed, (name, shape) in enumerate(matrices)}


def test_unpacked_is_the_plain_network_with_the_decoded_weights(net, packed):
    net.load_state_dict(dense_state(packed))
    expected = packed(*INPUTS)
    plain = unpack_weights(packed)
    assert plain is packed
    assert [type(module) for module in plain.modules()] == [type(module) for module in net.modules()]
    assert torch.equal(plain(*INPUTS), expected)
    assert plain.state_dict().keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value), name
    assert plain.head.weight is plain.words.weight and plain.again is plain.conv
    assert plain.words.padding_idx == 0 and plain.conv.padding == "same"
    assert not any(module.training for module in plain.modules())
    plain(*INPUTS).sum().backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())


def test_a_copy_is_unpacked_alone(packed):
    expected = packed(*INPUTS)
    other = unpack_weights(copy.deepcopy(packed))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(packed(*INPUTS), expected)


def test_dtypes(packed):
    half = unpack_weights(copy.deepcopy(packed).bfloat16())
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    mixed = unpack_weights(packed, torch.float64)
    assert mixed.head.weight.dtype == torch.float64 and mixed.head.bias.dtype == torch.float32


def test_a_network_that_is_one_layer():
    packed = packed_network(nn.Linear(4, 3), {"weight": random_coded((3, 4), 3)})
    plain = unpack_weights(packed)
    assert type(plain) is nn.Linear
    assert torch.equal(plain(torch.ones(2, 4)), packed(torch.ones(2, 4)))


def test_packed_again(net, packed):
    expected = packed(*INPUTS)
    coded = code_matrices(net)
    assert torch.equal(packed_network(unpack_weights(packed), coded)(*INPUTS), expected)


def test_functions_that_are_called_after_packing(net, packed, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(network, "_after_packing", [])
    network.after_packing(seen.append)
    made = packed_network(net, code_matrices(net))
    save(made, tmp_path / "net")
    loaded = load(tmp_path / "net", net)
    assert len(seen) == 2 and seen[0] is made and seen[1] is loaded
