"""What else is done with modules: other state dicts, devices without values, other tracers."""

import pytest
import torch
from torch import nn

from sqs_pyro.errors import NetworkError
from sqs_pyro.kernels import packed_network
from sqs_pyro.testing.layouts import random_coded


def network(components=5):
    net = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), OfItsOwn())
    names = ("0.weight", "3.weight", "4.mixing")
    coded = {name: random_coded(tuple(net.get_parameter(name).shape), components) for name in names}
    return net, packed_network(net, coded)


class OfItsOwn(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixing = nn.Parameter(torch.ones(8, 16))

    def forward(self, x):
        return x @ self.mixing.T


X = torch.randn(2, 4, 4)


@pytest.mark.parametrize("strict", [True, False])
def test_a_dense_state_is_not_taken_for_a_packed_one(strict):
    dense, packed = network()
    with pytest.raises(NetworkError, match=r"'0\.weight' as a dense weight, .* is packed: load it"):
        packed.load_state_dict(dense.state_dict(), strict=strict)


def test_a_dense_state_of_a_module_that_reads_its_weight():
    _, packed = network()
    with pytest.raises(NetworkError, match="'mixing' as a dense weight"):
        packed[4].load_state_dict(OfItsOwn().state_dict(), strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_of_another_compression(strict):
    _, packed = network()
    _, other = network(20)
    with pytest.raises(NetworkError, match=r"'0\.weight' packed with .* of another compression"):
        packed.load_state_dict(other.state_dict(), strict=strict)


def test_a_partial_state_leaves_the_rest():
    _, packed = network()
    expected = packed(X)
    result = packed.load_state_dict({"3.bias": packed[3].bias.detach().clone()}, strict=False)
    assert "0.packed_weight.codes" in result.missing_keys
    assert torch.equal(packed(X), expected)


def test_to_meta_and_back():
    _, packed = network()
    expected, state = packed(X), packed.state_dict()
    packed.to("meta")
    with pytest.raises(NetworkError, match="on the meta device, which holds no values"):
        packed[4].mixing  # noqa: B018
    packed.to_empty(device="cpu")
    packed.load_state_dict(state)
    assert torch.equal(packed(X), expected)


@pytest.mark.parametrize("ambient", [torch.float64, torch.bfloat16])
def test_another_default_dtype(ambient):
    dense, _ = network()
    coded = {"0.weight": random_coded((8, 4, 3), 5)}
    expected = packed_network(dense, coded)(X)
    torch.set_default_dtype(ambient)
    try:
        assert torch.equal(packed_network(dense, coded)(X), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_graphs_of_fx():
    _, packed = network()
    traced = torch.fx.symbolic_trace(packed)
    assert torch.equal(traced(X), packed(X))
    with torch.no_grad():
        packed[3].bias.add_(1)
    assert torch.equal(traced(X), packed(X))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_scripts():
    with pytest.raises(NetworkError, match=r"torch\.jit\.script cannot compile .* use torch\.compile"):
        torch.jit.script(network()[1])
