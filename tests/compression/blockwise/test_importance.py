"""Importance of outputs: the Fisher information, against the network's own second derivatives."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from sqs_pyro.compression.blockwise.importance import output_importance
from sqs_pyro.errors import DataError
from sqs_pyro.models.likelihoods import Gaussian


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).eval()


def layers(net):
    return {"first": net[0], "last": net[2]}


def fisher(net, x):
    """Diagonal of ``E_x Jᵀ F J`` in each layer's outputs, F the Fisher information of a categorical's logits."""
    found = {"first": torch.zeros(4), "last": torch.zeros(3)}
    for row in x:
        inner = net[0](row).detach()
        logits = net[1:](inner).detach()
        p = logits.softmax(-1)
        of_logits = torch.diag(p) - p[:, None] * p
        jacobian = torch.autograd.functional.jacobian(net[1:], inner)
        found["first"] += (jacobian.T @ of_logits @ jacobian).diagonal()
        found["last"] += of_logits.diagonal()
    return {name: total / len(x) for name, total in found.items()}


def test_is_the_fisher_information_of_the_outputs():
    net, x = network(), torch.randn(40, 5)
    found = output_importance(net, layers(net), [x] * 400)
    expected = fisher(net, x)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0.05, atol=1e-3)


def test_of_a_gaussian_likelihood():
    """Unit noise on the outputs: the last layer's gradients are the noise, of variance 1."""
    net = network()
    found = output_importance(net, layers(net), [torch.randn(500, 5)] * 20, Gaussian())
    torch.testing.assert_close(found["last"], torch.ones(3), rtol=0.1, atol=0)


def test_leaves_the_network_alone_and_follows_the_seed():
    net, x = network(), torch.randn(6, 5)
    net[0].weight.requires_grad_(False)
    before = torch.get_rng_state()
    first, again = (output_importance(net, layers(net), [x], seed=3) for _ in range(2))
    other = output_importance(net, layers(net), [x], seed=4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["last"], other["last"])
    assert torch.equal(torch.get_rng_state(), before)
    assert not net[0].weight.requires_grad and net[2].weight.requires_grad
    assert all(p.grad is None for p in net.parameters())
    assert not any(layer._forward_hooks for layer in layers(net).values())


def test_parallel_layers_with_frozen_weights_are_all_seen():
    """Layers that share an input which needs no gradient, as q, k and v of a frozen language model."""

    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.q(x) * self.k(x)

    net = Parallel().requires_grad_(False)
    found = output_importance(net, {"q": net.q, "k": net.k}, [torch.randn(30, 4)])
    assert all((value > 0).all() for value in found.values())


def test_tokens_are_counted_one_by_one():
    net = nn.Sequential(nn.Linear(4, 6))
    x = torch.randn(3, 7, 4)
    by_sequence = output_importance(net, {"0": net[0]}, [x] * 200)
    by_token = output_importance(net, {"0": net[0]}, [x.reshape(21, 4)] * 200)
    torch.testing.assert_close(by_sequence["0"], by_token["0"], rtol=0.1, atol=1e-3)


def test_no_minibatch():
    net = network()
    with pytest.raises(DataError, match="at least one minibatch"):
        output_importance(net, layers(net), [])


def test_own_likelihood():
    net = network()

    def bernoulli(output):
        return dist.Bernoulli(logits=output).to_event(1)

    found = output_importance(net, layers(net), [torch.randn(400, 5)] * 10, bernoulli)
    p = torch.sigmoid(net(torch.randn(4000, 5))).detach()
    torch.testing.assert_close(found["last"], (p * (1 - p)).mean(0), rtol=0.1, atol=1e-2)


def test_a_layer_that_never_mattered_is_as_the_least_of_its_neighbours():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))

        def forward(self, x):
            return self.experts[0](x) + 0.1 * self.experts[1](x) + 0.0 * self.experts[2](x)

    net = Mixture()
    layers = {f"experts.{i}": layer for i, layer in enumerate(net.experts)}
    found = output_importance(net, layers, [torch.randn(40, 3)], Gaussian())
    assert float(found["experts.0"].mean()) > 50 * float(found["experts.1"].mean()) > 0
    assert torch.equal(found["experts.2"], found["experts.1"].mean().expand(2))
    alone = output_importance(net, {"experts.2": net.experts[2]}, [torch.randn(40, 3)], Gaussian())
    assert torch.equal(alone["experts.2"], torch.zeros(2)), "nothing says how much it could matter"
