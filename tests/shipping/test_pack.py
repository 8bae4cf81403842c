"""From guide to hard network: batch norms folded and re-estimated, leftovers rounded, packing."""

import copy

import pytest
import torch
from torch import nn

from sqs_pyro import load, pack, pack_ensemble, save, size_report
from sqs_pyro.errors import NetworkError
from sqs_pyro.evaluation.averaging import averaged_network
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.models import BayesianNetwork
from sqs_pyro.networks.registry import build_network
from sqs_pyro.shipping.pack import (
    fold_batch_norm,
    hard_network,
    reestimate_batch_norm,
    round_leftovers,
)


def randomise(net: nn.Module) -> nn.Module:
    """Batch norms as after a long training: nothing is 0 or 1."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.affine:
                    module.weight.normal_()
                    module.bias.normal_()
                if module.track_running_stats:
                    module.running_mean.normal_(0, 3)
                    module.running_var.uniform_(0.01, 5)
    return net


NETS = {
    "1d": (lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)), (9, 5)),
    "2d": (lambda: nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()), (4, 2, 6, 6)),
    "3d": (lambda: nn.Sequential(nn.Conv3d(1, 3, 2), nn.BatchNorm3d(3, eps=1e-2)), (2, 1, 4, 4, 4)),
    "not affine": (lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7, affine=False)), (9, 5)),
    "no statistics": (lambda: nn.Sequential(nn.BatchNorm1d(5, track_running_stats=False)), (9, 5)),
    "digits": (lambda: build_network("digits_net", width=4), (3, 1, 8, 8)),
}


@pytest.mark.parametrize("name", NETS)
def test_folding_keeps_the_outputs_in_evaluation(name):
    build, shape = NETS[name]
    net, x = randomise(build()).eval(), torch.randn(shape)
    expected = net(x)
    fold_batch_norm(net)
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)
    fold_batch_norm(net)  # twice is once
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)


def test_folded_statistics_are_constants():
    net = randomise(NETS["2d"][0]())
    fold_batch_norm(net)
    assert torch.equal(net[1].running_mean, torch.zeros(6)) and torch.equal(net[1].running_var, torch.ones(6))


def test_reestimated_statistics_are_those_of_the_data():
    net = randomise(NETS["1d"][0]())
    x = torch.randn(4, 50, 5)
    reestimate_batch_norm(net, [(batch, None) for batch in x], 4)
    seen = net[0](x)
    torch.testing.assert_close(net[1].running_mean, seen.mean((0, 1)))
    torch.testing.assert_close(net[1].running_var, seen.var(1).mean(0))
    assert net[1].momentum == 0.1


def test_reestimation_takes_as_many_minibatches_as_asked():
    net, x = NETS["1d"][0](), torch.randn(4, 50, 5)
    reestimate_batch_norm(net, [(batch, None) for batch in x], 2)
    torch.testing.assert_close(net[1].running_mean, net[0](x[:2]).mean((0, 1)))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, a, b):
        return self.norm(a + 2 * b)


@pytest.mark.parametrize("wrap", [lambda a, b: (a, b), lambda a, b: {"b": b, "a": a}], ids=["tuple", "mapping"])
def test_reestimation_of_networks_with_several_inputs(wrap):
    net, a, b = TwoInputs(), torch.randn(3, 20, 5), torch.randn(3, 20, 5)
    reestimate_batch_norm(net, [(wrap(a[i], b[i]), None) for i in range(3)], 3)
    torch.testing.assert_close(net.norm.running_mean, (a + 2 * b).mean((0, 1)))


@pytest.mark.parametrize("training", [True, False])
def test_reestimation_sees_what_evaluation_sees_and_leaves_modes_alone(training):
    net = nn.Sequential(
        nn.Dropout(0.5), nn.BatchNorm1d(5, momentum=0.3), nn.BatchNorm1d(5, track_running_stats=False)
    )
    net.train(training)
    net[0].train(not training)
    x = torch.randn(200, 5) + 1
    reestimate_batch_norm(net, [(x, None)], 1)
    torch.testing.assert_close(net[1].running_mean, x.mean(0))  # dropout off
    assert net.training == net[1].training == training and net[0].training != training
    assert net[1].momentum == 0.3 and net[1].running_mean.requires_grad is False


def test_reestimation_without_batch_norms_is_nothing():
    net = nn.Sequential(nn.Linear(5, 3))
    before = copy.deepcopy(net.state_dict())
    reestimate_batch_norm(net, [(torch.randn(2, 5), None)], 1)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def made(groups="layer"):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    model = BayesianNetwork(randomise(net), num_data=10)
    guide = SpikeGMMGuide(model, 4, groups=groups, estimator="straight_through")
    guide.prune({name: torch.rand(value.shape) < 0.5 for name, value in model.site_values().items()})
    return model, guide


def test_hard_network_is_a_copy_with_the_coded_values():
    model, guide = made()
    before = copy.deepcopy(model.net.state_dict())
    coded = guide.harden()
    hard = hard_network(model.net, coded)
    for name, value in hard.state_dict().items():
        assert torch.equal(value, coded[name].dense() if name in coded else before[name])
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())


def test_hard_network_of_tied_weights():
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False))
    net[2].weight = net[0].weight
    guide = SpikeGMMGuide(BayesianNetwork(net), 3, estimator="straight_through")
    hard = hard_network(net, guide.harden())
    assert hard[0].weight is hard[2].weight
    assert len(hard[0].weight.unique()) <= 3


def test_parameters_are_rounded_where_they_survive_it():
    model, guide = made()
    coded = guide.harden()
    hard = hard_network(model.net, coded)
    with torch.no_grad():
        hard[1].bias[0] = 1e9  # beyond float16: the tensor stays as it is
    before = copy.deepcopy(hard.state_dict())
    round_leftovers(hard, coded, "float16")
    for name, value in hard.state_dict().items():
        if name in coded or name == "1.bias" or name not in dict(hard.named_parameters()):
            assert torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name].half().float())


class TestPack:
    @pytest.mark.parametrize("layout", ["auto", "dense", "bitmap", "entropy"])
    @pytest.mark.parametrize("groups", ["layer", "channel"])
    def test_packed_guide_computes_its_hard_network(self, layout, groups, tmp_path):
        model, guide = made(groups)
        x = torch.randn(5, 1, 6, 6)
        packed = pack(guide, layout=layout, leftover_dtype="float32")
        expected = hard_network(model.net, guide.harden()).eval()(x)
        torch.testing.assert_close(packed(x), expected, rtol=1e-5, atol=1e-5)
        save(packed, tmp_path / "net.safetensors")
        loaded = load(tmp_path / "net.safetensors", copy.deepcopy(model.net))
        torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-5)

    def test_metadata_and_network_spec(self):
        net = build_network("digits_net", width=4)
        guide = SpikeGMMGuide(BayesianNetwork(net, num_data=10), 4, estimator="straight_through")
        packed = pack(guide, metadata={"note": "mine"})
        assert packed(torch.randn(2, 1, 8, 8)).shape == (2, 10)
        named = pack(
            SpikeGMMGuide(BayesianNetwork(net), 4, estimator="straight_through"), metadata={"note": 1}
        ).packed_metadata
        assert (named["network"], named["note"]) == (net.network_spec, 1)
        nameless = pack(
            SpikeGMMGuide(BayesianNetwork(nn.Linear(4, 4)), 4, estimator="straight_through")
        ).packed_metadata
        assert nameless["network"] is None

    def test_rebuilt_from_the_file_alone(self, tmp_path):
        guide = SpikeGMMGuide(
            BayesianNetwork(build_network("digits_net", width=4), num_data=10), 4, estimator="straight_through"
        )
        packed, x = pack(guide), torch.randn(2, 1, 8, 8)
        save(packed, tmp_path / "net.safetensors")
        torch.testing.assert_close(load(tmp_path / "net.safetensors")(x), packed(x))

    def test_what_cannot_be_packed(self):
        with pytest.raises(
            NetworkError, match="pack was given a Linear, but packs a SpikeGMMGuide or a Compression"
        ):
            pack(nn.Linear(2, 2))
        plain = SpikeGMMGuide(lambda: None, 2, init={"w": torch.randn(5)}, estimator="straight_through")
        with pytest.raises(
            NetworkError, match=r"model is a function without a network 'net' to pack: use guide.hard"
        ):
            pack(plain)
        model = BayesianNetwork(nn.Sequential(nn.Linear(4, 4)))
        with pytest.raises(NetworkError, match="still in its dense stage"):
            pack(SpikeGMMGuide(model, 2, stage="dense", estimator="straight_through"))


class TestEnsemble:
    def made(self):
        model = BayesianNetwork(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), num_data=10)
        return model, SpikeGMMGuide(model, 4, initial_gate=0.5, estimator="straight_through")

    def test_packs_the_draws_of_the_guide(self):
        model, guide = self.made()
        torch.manual_seed(3)
        packed = pack_ensemble(guide, 5, temperature=2.0, leftover_dtype="float32")
        torch.manual_seed(3)
        average = averaged_network(model.net, guide, 5, temperature=2.0)
        x = torch.randn(20, 6)
        torch.testing.assert_close(
            packed(x), average(x), atol=1e-3, rtol=0
        )  # codebooks are float16 in one of them
        assert packed.num_draws == 5

    def test_gates_can_have_a_temperature_of_their_own(self):
        _, guide = self.made()
        warm, cold = (pack_ensemble(guide, 9, temperature=1e-3, gate_temperature=s) for s in (1.0, 1e-3))
        assert size_report(cold).nonzero_rate == 1.0  # gates are 0.62
        assert size_report(warm).nonzero_rate < 0.8

    def test_what_has_no_posterior(self):
        with pytest.raises(NetworkError, match="pack_ensemble was given a Linear, but draws from a SpikeGMMGuide"):
            pack_ensemble(nn.Linear(2, 2))
