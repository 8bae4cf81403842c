"""Networks that cannot be compressed as they are: a sentence says how to repair each, and the repair works."""

import copy
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm as new_weight_norm
from torch.utils.data import DataLoader, TensorDataset

import sqs_pyro
from sqs_pyro.compression.baseline import BaselineRecipe, train_baseline
from sqs_pyro.errors import NetworkError
from sqs_pyro.evaluation.classification import evaluate
from sqs_pyro.networks.checks import check_network

X, Y = torch.randn(8, 4), torch.arange(8) % 3
LOADER = DataLoader(TensorDataset(X, Y), 4)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def hooked(function):
    net = plain()
    function(net[0])
    net(X)
    return net


def on_meta() -> nn.Module:
    net = plain()
    net[2] = net[2].to("meta")
    return net


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:torch.ao.quantization", "ignore:torch.quantize_per_tensor"
)
class TestNetworks:
    cases: ClassVar = {
        "parallel": (lambda: nn.DataParallel(plain()), "net.module", lambda net: net.module),
        "parallel inside": (lambda: nn.Sequential(nn.DataParallel(plain())), "'0' is a DataParallel", None),
        "old weight norm": (
            lambda: hooked(torch.nn.utils.weight_norm),
            "remove_weight_norm",
            lambda net: (torch.nn.utils.remove_weight_norm(net[0], "weight"), net)[1],
        ),
        "old spectral norm": (
            lambda: hooked(torch.nn.utils.spectral_norm),
            "remove_spectral_norm",
            lambda net: (torch.nn.utils.remove_spectral_norm(net[0], "weight"), net)[1],
        ),
        "pruned": (
            lambda: hooked(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
            "prune.remove",
            lambda net: (prune.remove(net[0], "weight"), net)[1],
        ),
        "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), "call it on one", lambda net: (net(X), net)[1]),
        "partly on meta": (on_meta, "'2.weight' of Sequential is on the 'meta' device", None),
        "scripted": (lambda: torch.jit.script(plain()), "the module that it was made of", None),
        "quantized": (
            lambda: torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear}),
            "in floating point",
            None,
        ),
        "a class": (lambda: nn.Linear, "must be a torch.nn.Module", None),
        "a function": (lambda: plain().forward, "must be a torch.nn.Module", None),
    }

    @pytest.mark.parametrize("case", cases)
    def test_each_is_told_and_repaired(self, case):
        make, sentence, repair = self.cases[case]
        net = make()
        for call in (
            check_network,
            lambda net: sqs_pyro.compress(net, LOADER),
            sqs_pyro.BayesianNetwork,
            lambda net: train_baseline(net, LOADER, None, BaselineRecipe(epochs=1)),
        ):
            with pytest.raises(NetworkError) as raised:
                call(net)
            assert sentence in str(raised.value) and "\n" not in str(raised.value)
        if repair is not None:
            repaired = repair(net)
            check_network(repaired)
            copy.deepcopy(repaired)

    @pytest.mark.parametrize("case", ["lazy", "partly on meta", "a class"])
    def test_what_cannot_run_cannot_be_evaluated(self, case):
        make, sentence, _ = self.cases[case]
        with pytest.raises(NetworkError) as raised:
            evaluate(make(), LOADER)
        assert sentence in str(raised.value)

    @pytest.mark.parametrize("make", [lambda: nn.DataParallel(plain()), lambda: torch.jit.script(plain())])
    def test_what_runs_is_evaluated(self, make):
        assert evaluate(make(), LOADER).num_examples == 8


def test_packed_networks_are_evaluated_but_not_compressed_again():
    packed = sqs_pyro.compress(plain(), LOADER, {"epochs": 1, "num_components": 4}).network
    assert evaluate(packed, LOADER).num_examples == 8
    with pytest.raises(NetworkError, match="compressed already: give the network in floating point"):
        sqs_pyro.compress(packed, LOADER)


@pytest.mark.parametrize(
    "net", [plain(), new_weight_norm(nn.Linear(3, 3)), torch.compile(plain(), backend="eager")]
)
def test_others_pass(net):
    check_network(net)
