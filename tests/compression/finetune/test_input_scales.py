"""How large inputs are, against dense references; and that saliency which knows them prunes better."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sqs_pyro import BayesianNetwork, SpikeGMMGuide
from sqs_pyro.compression.finetune.input_scales import InputScales
from sqs_pyro.errors import NetworkError, RecipeError
from sqs_pyro.inference.pruning import PruningSchedule


def watched(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The scale of a layer's weight after one minibatch."""
    scales = InputScales(nn.Sequential(layer).train(), ["0.weight"])
    layer(x)
    return scales.scales()["0.weight"]


@pytest.mark.parametrize("shape", [(7, 5), (5,), (2, 3, 5), (2, 3, 4, 5)])
def test_linear(shape):
    x = torch.randn(shape)
    expected = x.reshape(-1, 5).square().mean(0).sqrt()
    torch.testing.assert_close(watched(nn.Linear(5, 4), x), expected[None])


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("batched", [True, False])
def test_convolution(groups, batched):
    layer = nn.Conv2d(6, 12, 3, groups=groups, bias=False)
    x = torch.randn(6, 8, 9) * torch.arange(1.0, 7)[:, None, None]
    scale = watched(layer, x[None] if batched else x).expand_as(layer.weight)
    # The weight of output o and its i-th input multiplies the channel that the group of o begins at, plus i.
    for o in range(12):
        for i in range(6 // groups):
            channel = (o // (12 // groups)) * (6 // groups) + i
            torch.testing.assert_close(scale[o, i], x[channel].square().mean().sqrt().expand(3, 3))


def test_what_is_lost_with_a_weight_is_its_saliency():
    """Root mean square of the change of a linear layer's output when one weight is zeroed."""
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3, bias=False), torch.randn(200, 5) * torch.tensor([0.1, 1.0, 3.0, 0.5, 9.0])
    found = layer.weight.abs() * watched(layer, x)
    for i in range(3):
        for j in range(5):
            without = layer.weight.detach().clone()
            without[i, j] = 0
            lost = (layer(x) - F.linear(x, without)).square().mean(0)[i].sqrt()
            torch.testing.assert_close(found[i, j], lost, rtol=1e-4, atol=1e-6)


def test_running_mean_evaluation_and_the_end():
    layer = nn.Linear(2, 2).train()
    scales = InputScales(nn.Sequential(layer), ["0.weight"])
    assert bool((scales.scales()["0.weight"] == 1).all())  # nothing seen
    layer(torch.full((4, 2), 1.0))
    layer(torch.full((4, 2), 3.0))
    expected = torch.full((1, 2), 0.95 + 0.05 * 9).sqrt()
    torch.testing.assert_close(scales.scales()["0.weight"], expected)
    layer.eval()(torch.full((4, 2), 100.0))
    scales.close()
    layer.train()(torch.full((4, 2), 100.0))
    torch.testing.assert_close(scales.scales()["0.weight"], expected)
    again = InputScales(nn.Sequential(layer), ["0.weight"])
    again.load_state_dict(scales.state_dict())
    torch.testing.assert_close(again.scales()["0.weight"], expected)


def test_unlike_inputs_are_pruned_better_than_by_magnitude():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 30, bias=False))
    x = torch.randn(500, 40) * torch.logspace(-1, 1, 40)
    model = BayesianNetwork(net.train(), likelihood="categorical", num_data=500)
    guide = SpikeGMMGuide(model, num_components=4, stage="dense", estimator="straight_through")
    scales = InputScales(model.net, list(guide.site_guides()))
    model.net(x)
    lost = {}
    for kind in ("magnitude", "activation"):
        mask = PruningSchedule(0.5, 10).masks(guide.saliencies(kind, scales.scales()), 10)["0.weight"]
        assert int(mask.sum()) == 600
        lost[kind] = float((net(x) - F.linear(x, net[0].weight * mask)).square().sum())
    assert lost["activation"] < 0.2 * lost["magnitude"]


def test_errors():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

    with pytest.raises(NetworkError, match="belongs to a Own, but saliency 'activation' knows"):
        InputScales(nn.Sequential(Own()), ["0.weight"])
    guide = SpikeGMMGuide(
        BayesianNetwork(nn.Sequential(nn.Linear(8, 8))), num_components=4, estimator="straight_through"
    )
    with pytest.raises(RecipeError, match="needs input_scales"):
        guide.saliencies("activation")
