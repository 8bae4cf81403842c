"""Whole numbers times a step: the best step by brute force, how far they reach, and networks of nothing else."""

import math

import pytest
import torch
from compression.blockwise.test_sequential_coding import layer
from kits.tiny_transformers import tiny

from sqs_pyro import compress_transformer, load, save
from sqs_pyro.compression.blockwise.codebooks import UniformCodebook
from sqs_pyro.compression.blockwise.coded_weight import coded_weight
from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.compression.blockwise.sequential_coding import fit
from sqs_pyro.errors import RecipeError
from sqs_pyro.packing.stored import stored_weights


@pytest.mark.parametrize(("k", "places"), [(1, [-1]), (2, [-1, 1]), (3, [-2, -1, 1]), (15, None), (255, None)])
def test_places(k, places):
    found = UniformCodebook(k).places.tolist()
    assert found == (places or [n for n in range(-(k + 1) // 2, k // 2 + 1) if n])


class TestMStep:
    def test_no_other_step_is_more_likely(self):
        own, grid = layer(rows=8, inputs=12), UniformCodebook(7)
        codewords, _ = grid.start(own, 0.5)
        symbols = torch.randint(0, 8, own.mean.shape, generator=torch.Generator().manual_seed(3)).to(torch.uint8)
        found = grid.best(own, symbols, codewords)
        assert torch.allclose(found / found[-1], grid.places / grid.places[-1].double())
        n = torch.cat([torch.zeros(1), grid.places])[symbols.long()].double()
        step = float(found[-1] / grid.places[-1])
        least = own.excess(step * n)
        assert all(own.excess(other * step * n) > least for other in (0.98, 0.999, 1.001, 1.02))

    def test_scales_are_the_best_of_each_row(self):
        own, grid = layer(rows=5, inputs=12), UniformCodebook(15)
        coding = fit(own, beta=0.5, max_components=15, uniform=True)
        scales = grid.row_scales(own, coding.symbols, torch.full((5,), 7.0))
        n = torch.cat([torch.zeros(1), grid.places])[coding.symbols.long()].double()
        for i in range(5):
            row = torch.zeros(5, 1, dtype=torch.float64)
            row[i] = 1
            # About the best, a parabola: its vertex is where either side loses as much.
            costs = [own.excess(torch.where(row > 0, s * scales[i] * n, own.mean)) for s in (0.99, 1.0, 1.01)]
            assert costs[1] < min(costs[0], costs[2])

    def test_rows_that_say_nothing(self):
        own, grid = layer(rows=3), UniformCodebook(3)
        symbols = torch.zeros(own.mean.shape, dtype=torch.uint8)
        assert grid.row_scales(own, symbols, torch.full((3,), 0.5)).tolist() == [0.5] * 3
        codewords = torch.tensor([-1.0, -0.5, 0.5], dtype=torch.float64)
        assert torch.equal(grid.best(own, symbols, codewords), codewords)


class TestStart:
    def test_step_follows_from_beta_where_values_reach(self):
        own = layer(rows=200)
        codewords, rates = UniformCodebook(255).start(own, 0.01)
        assert float(codewords.diff()[0]) == pytest.approx(math.sqrt(12 * 0.01 / own.mean_precision))
        assert float(rates.neg().exp().sum()) == pytest.approx(1)

    @pytest.mark.parametrize("k", [3, 7, 15])
    def test_few_values_reach_as_far_as_is_best(self, k):
        own = layer(rows=200, inputs=32, correlated=False)
        codewords, _ = UniformCodebook(k).start(own, 1e-9)

        def error(step):
            low, high = -((k + 1) // 2), k // 2
            rounded = (own.mean / step).round().clamp(low, high) * step
            return float((own.importance[:, None] * (own.mean - rounded) ** 2).sum())

        best = min(error(step) for step in torch.linspace(0.01, 4, 400).tolist())
        assert error(float(codewords[-1]) / (k // 2)) < 1.02 * best

    def test_a_layer_of_zeros(self):
        own = layer()
        codewords, rates = UniformCodebook(7).start(type(own)(0 * own.mean, own.curvature, own.importance), 1.0)
        assert codewords.isfinite().all() and rates.isfinite().all()


@pytest.mark.parametrize("k", [3, 15, 255])
def test_a_weight_at_so_many_bits(k):
    own, bits = layer(rows=96, inputs=128, tokens=600), min(2.0, math.log2(1 + k) - 0.5)
    recipe = BlockwiseRecipe(grid="uniform", num_components=k, bits=bits)
    coded, figures = coded_weight(own, torch.ones(96), recipe, bits=bits, beta=None)
    assert figures["bits"] == pytest.approx(bits, abs=0.05)
    assert torch.equal(coded.codebook[0], UniformCodebook(k).places.float())
    # Steps of rows are no worse than one for all, and neither is worse than rounding at as many bits.
    coding = fit(own, bits=bits - 16 / 128, max_components=k, uniform=True)
    assert own.excess(coded.dense()) <= own.excess(coding.dense()) * 1.001
    free = fit(own, bits=bits, max_components=k)
    assert own.excess(free.dense()) < own.excess(coded.dense())


@pytest.mark.parametrize(
    "keys",
    [
        {"settle_steps": 8, "finish_steps": 12},
        *(pytest.param(keys, marks=pytest.mark.slow) for keys in ({}, {"num_components": 7, "bits": 2.5})),
    ],
)
def test_every_codeword_of_a_network_is_a_whole_number(keys, tmp_path):
    torch.manual_seed(0)
    net = tiny("llama")
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    sequences = torch.randint(3, 64, (64, 12), generator=torch.Generator().manual_seed(0))
    recipe = {"bits": 3.5, "batch_size": 16, "importance_sequences": 8, "grid": "uniform", **keys}
    result = compress_transformer(net, sequences, recipe, directory=tmp_path / "blocks")
    save(result.network, tmp_path / "packed")
    loaded = load(tmp_path / "packed", net)
    for weight in stored_weights(loaded).values():
        coded = weight.coded()
        assert torch.equal(coded.codebook, coded.codebook.round())
        assert coded.scales is not None
    assert torch.equal(loaded(sequences).logits, result.network(sequences).logits)


@pytest.mark.parametrize(
    "keys", [{"bits": 0.5, "allocation": "even"}, {"bits": 3.0, "layers": {"*.0.*q_proj": {"bits": 0.4}}}]
)
def test_scales_that_leave_nothing_are_told_before_the_network_runs(keys):
    net = tiny("llama")
    net.forward = None  # never called
    sequences = torch.randint(3, 64, (8, 12), generator=torch.Generator().manual_seed(0))
    sentence = (
        r"scales of layer '.*q_proj' take 0\.5 bits a weight, as it has 32 inputs, but 0\.[45] are asked for"
    )
    with pytest.raises(RecipeError, match=sentence):
        compress_transformer(net, sequences, {"grid": "uniform", "batch_size": 4, "num_components": 7, **keys})
