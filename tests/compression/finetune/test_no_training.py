"""Without epochs: magnitude pruning and K-means, against NumPy."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sqs_pyro import compress
from sqs_pyro.errors import RecipeError


def test_the_largest_weights_are_kept_and_k_means_codes_them():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 10))
    data = DataLoader(TensorDataset(torch.randn(8, 30), torch.arange(8)), 4)
    recipe = {"epochs": 0, "nonzero_rate": 0.3, "num_components": 4, "codebook_dtype": "float32"}
    result = compress(net, data, recipe, validation=data)
    before = {name: net.get_parameter(name).detach().numpy() for name in ("0.weight", "2.weight")}
    after = {name: result.hard.get_parameter(name).detach().numpy() for name in before}
    sizes = np.concatenate([abs(weight).ravel() for weight in before.values()])
    limit = np.sort(sizes)[-round(0.3 * sizes.size)]  # one threshold for all layers
    for name, weight in before.items():
        kept = abs(weight) >= limit
        assert ((after[name] != 0) == kept).all()
        codewords = np.unique(after[name][kept])
        assert len(codewords) == 4
        distance = abs(weight[kept][:, None] - codewords)
        # Lloyd's fixed point: each codeword is the mean of its weights, which are nearest to it, but that mixing
        # weights may move a boundary.
        assert (codewords[distance.argmin(1)] == after[name][kept]).mean() > 0.9
        for codeword in codewords:
            assert weight[kept & (after[name] == codeword)].mean() == pytest.approx(codeword, abs=0.02)
    assert result.history == [] and torch.equal(result.hard[0].bias, net[0].bias.half().float())


@pytest.mark.parametrize(
    "more", [{"gate_learning_rate": 0.1}, {"distillation": {}}, {"pruning": {"saliency": "activation"}}]
)
def test_what_learns_from_data_needs_epochs(more):
    net = nn.Linear(4, 2)
    data = DataLoader(TensorDataset(torch.randn(4, 4), torch.arange(4) % 2), 2)
    with pytest.raises(RecipeError, match="at least 1 epoch"):
        compress(net, data, {"epochs": 0, "num_components": 2, **more})
