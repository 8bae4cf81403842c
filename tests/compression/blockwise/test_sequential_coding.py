"""Sequential coding against explicit Gaussian conditioning, exhaustive search and least squares."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqs_pyro.compression.blockwise import sequential_coding
from sqs_pyro.compression.blockwise.codebooks import best_codewords
from sqs_pyro.compression.blockwise.first_codewords import grid
from sqs_pyro.compression.blockwise.laplace import LayerLikelihood
from sqs_pyro.compression.blockwise.sequential_coding import code_sequentially, fit, improve
from sqs_pyro.compression.blockwise.shares import Shares
from sqs_pyro.compression.finetune.rate_distortion import fit_symbol_prior, posterior
from sqs_pyro.errors import RecipeError
from sqs_pyro.kernels.coding import chain_coding, conditional_coding
from sqs_pyro.packing import pack_tensor


def layer(rows=6, inputs=9, tokens=60, seed=0, correlated=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)
    if correlated:
        x = x + 2 * torch.randn(tokens, 1, generator=generator, dtype=torch.float64)
    mean = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    importance = 0.5 + torch.rand(rows, generator=generator, dtype=torch.float64)
    return LayerLikelihood(mean, x.T @ x, importance)


def prior(k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codewords = torch.randn(k, generator=generator, dtype=torch.float64).sort().values
    return codewords, fit_symbol_prior(torch.randint(1, 50, (1, k + 1), generator=generator)).rates[0]


def explicit(own: LayerLikelihood, codewords, rates, beta):
    """One weight after the other, each conditional law by solving with the precision of what is left."""
    values = [0.0, *codewords.tolist()]
    order = own.curvature.diagonal().argsort(descending=True, stable=True).tolist()
    symbols = torch.empty(own.mean.shape, dtype=torch.uint8)
    for i, mean in enumerate(own.mean):
        precision = own.importance[i] * own.curvature
        known: dict[int, float] = {}
        for position, j in enumerate(order):
            left, done = order[position:], order[:position]
            shift = torch.tensor([known[k] - mean[k] for k in done], dtype=torch.float64)
            own_precision = precision[left][:, left]
            conditional = mean[left] - torch.linalg.solve(own_precision, precision[left][:, done] @ shift)
            variance = torch.linalg.inv(own_precision)[0, 0]
            costs = [
                float((conditional[0] - value) ** 2 / (2 * variance) + beta * rate)
                for value, rate in zip(values, rates, strict=True)
            ]
            symbols[i, j] = costs.index(min(costs))
            known[j] = values[int(symbols[i, j])]
    return symbols


class TestEStep:
    @settings(max_examples=30)
    @given(st.integers(0, 1000), st.integers(1, 5), st.floats(0, 20))
    def test_is_the_chain_rule_of_gaussians(self, seed, k, beta):
        own, (codewords, rates) = layer(seed=seed), prior(k, seed)
        symbols, means = code_sequentially(own, codewords, rates, beta)
        assert torch.equal(symbols, explicit(own, codewords, rates, beta))
        assert means.shape == own.mean.shape

    def test_the_objective_is_the_sum_over_the_chain(self):
        own, (codewords, rates) = layer(), prior(3)
        symbols, means = code_sequentially(own, codewords, rates, 1.0)
        values = torch.cat([codewords.new_zeros(1), codewords])[symbols.long()]
        order, upper = own.conditioning
        variance = torch.empty(len(order), dtype=torch.float64)
        variance[order] = upper.diagonal().square()
        chain = 0.5 * ((values - means).square() / variance * own.importance[:, None]).sum()
        assert own.excess(values) == pytest.approx(float(chain), rel=1e-9)

    def test_inputs_without_correlation_are_coded_independently(self):
        own, (codewords, rates) = layer(correlated=False), prior(4)
        own = LayerLikelihood(own.mean, 3.0 * torch.eye(9, dtype=torch.float64), torch.ones(6).double())
        symbols, means = code_sequentially(own, codewords, rates, 2.0)
        codes, log_odds = posterior(own.mean.reshape(1, -1), codewords[None], rates, 2.0 / 3.0)
        expected = torch.where(log_odds > 0, codes + 1, 0).view(own.mean.shape)
        assert torch.equal(symbols.long(), expected)
        torch.testing.assert_close(means, own.mean)

    def test_panels_make_no_difference(self):
        """More inputs than one panel holds, against the same chain without panels."""
        own, (codewords, rates) = layer(rows=2, inputs=70, tokens=300), prior(3)
        assert torch.equal(code_sequentially(own, codewords, rates, 1.0)[0], explicit(own, codewords, rates, 1.0))

    def test_is_better_than_rounding_each_weight(self):
        own, (codewords, _) = layer(rows=40), prior(6)
        rates = torch.zeros(7, dtype=torch.float64)
        symbols, _ = code_sequentially(own, codewords, rates, 1.0)
        values = torch.cat([codewords.new_zeros(1), codewords])
        nearest = values[(own.mean[..., None] - values).abs().argmin(-1)]
        assert own.excess(values[symbols.long()]) < 0.7 * own.excess(nearest)


@pytest.mark.parametrize("uniform", [False, True])
def test_a_compiler_makes_no_difference(monkeypatch, uniform):
    """Symbols and codewords of a layer in float32, of several panels and units."""
    own = layer(rows=50, inputs=150, tokens=400)
    own = LayerLikelihood(own.mean.float(), own.curvature.float(), own.importance.float(), Shares(50, 8))
    given = {"bits": 3.0, "max_components": 16, "uniform": uniform}
    found = fit(own, **given)
    for op in (chain_coding, conditional_coding):
        monkeypatch.setattr(sequential_coding, op._name, op._init_fn)
    expected = fit(own, **given)
    assert torch.equal(found.symbols, expected.symbols) and torch.equal(found.codewords, expected.codewords)


def objective(own, symbols, codewords, rates, beta):
    values = torch.cat([codewords.new_zeros(1), codewords])
    return own.excess(values[symbols.long()]) + beta * float(rates[symbols.long()].sum())


class TestImprovement:
    @settings(max_examples=30)
    @given(st.integers(0, 1000), st.integers(1, 5), st.floats(0, 20))
    def test_never_makes_it_worse_and_ends_where_no_single_change_helps(self, seed, k, beta):
        own, (codewords, rates) = layer(seed=seed), prior(k, seed)
        symbols, _ = code_sequentially(own, codewords, rates, beta)
        before = objective(own, symbols, codewords, rates, beta)
        for _ in range(50):
            improved, _ = improve(own, symbols, codewords, rates, beta)
            after = objective(own, improved, codewords, rates, beta)
            assert after <= before + 1e-9 * abs(before)
            if torch.equal(improved, symbols):
                break
            symbols, before = improved, after
        else:
            pytest.fail("a descent over finitely many choices does not end")
        for i, j, z in itertools.product(range(2), range(9), range(k + 1)):
            other = symbols.clone()
            other[i, j] = z
            assert objective(own, other, codewords, rates, beta) >= before - 1e-9 * abs(before)

    def test_panels_make_no_difference(self):
        own, (codewords, rates) = layer(rows=3, inputs=70, tokens=300), prior(3)
        symbols, _ = code_sequentially(own, codewords, rates, 1.0)
        improved, means = improve(own, symbols, codewords, rates, 1.0)
        values, expected = torch.cat([codewords.new_zeros(1), codewords]), symbols.clone()
        for j in own.conditioning[0].tolist():
            difference = values[expected.long()] - own.mean
            mean = values[expected[:, j].long()] - difference @ own.curvature[:, j] / own.curvature[j, j]
            costs = own.importance[:, None] * own.curvature[j, j] / 2 * (mean[:, None] - values) ** 2 + rates
            expected[:, j] = costs.argmin(1).to(torch.uint8)
            torch.testing.assert_close(means[:, j], mean)
        assert torch.equal(improved, expected)

    def test_comes_near_the_best_there_is(self):
        own, (codewords, rates) = layer(rows=4, inputs=6), prior(4)
        symbols, _ = code_sequentially(own, codewords, rates, 1.0)
        for _ in range(5):
            symbols, _ = improve(own, symbols, codewords, rates, 1.0)
        every = torch.tensor(list(itertools.product(range(5), repeat=6)))
        for i in range(4):
            row = LayerLikelihood(own.mean[i : i + 1], own.curvature, own.importance[i : i + 1])
            residual = torch.cat([codewords.new_zeros(1), codewords])[every] - row.mean
            costs = 0.5 * own.importance[i] * ((residual @ own.curvature) * residual).sum(1) + rates[every].sum(1)
            found = objective(row, symbols[i : i + 1], codewords, rates, 1.0)
            assert float(costs.min()) - 1e-9 <= found < 1.6 * float(costs.min())


class TestMStep:
    def test_codewords_solve_the_least_squares_problem(self):
        own, (codewords, rates) = layer(), prior(4)
        symbols, _ = code_sequentially(own, codewords, rates, 0.1)
        found = best_codewords(own, symbols, codewords)
        root = torch.linalg.cholesky(own.curvature)
        scale = own.importance.sqrt()[:, None]
        used = [k for k in range(1, 5) if (symbols == k).any()]
        design = torch.stack([(scale * ((symbols == k).double() @ root)).reshape(-1) for k in used], 1)
        target = (scale * (own.mean @ root)).reshape(-1)
        solution = torch.linalg.lstsq(design, target).solution
        torch.testing.assert_close(found[[k - 1 for k in used]], solution, rtol=1e-4, atol=1e-6)

    def test_unused_codewords_stay(self):
        own, _ = layer(), None
        symbols = torch.ones(own.mean.shape, dtype=torch.uint8)
        found = best_codewords(own, symbols, torch.tensor([0.5, 7.0], dtype=torch.float64))
        assert found[1] == 7.0 and found[0] != 0.5
        nothing = torch.zeros(own.mean.shape, dtype=torch.uint8)
        assert torch.equal(best_codewords(own, nothing, found), found)


class TestGrid:
    def test_step_follows_from_beta(self):
        own = layer(rows=200)
        _, upper = own.conditioning
        precision = float(own.importance.mean() * upper.diagonal().pow(-2).mean())
        codewords, rates = grid(own, beta=0.01)
        step = math.sqrt(12 * 0.01 / precision)
        assert float(codewords.diff().median()) == pytest.approx(step, rel=0.05)
        assert len(rates) == 1 + len(codewords)
        assert float(rates.neg().exp().sum()) == pytest.approx(1)

    def test_only_outer_points_are_merged(self):
        own = layer(rows=200)
        fine, _ = grid(own, 0.01)
        coarse, rates = grid(own, 0.01, max_components=len(fine) - 6)
        assert len(coarse) == len(fine) - 6
        inner = fine[fine.abs() < 0.5 * fine.abs().max()]
        assert len(inner) > 10
        assert all(float((coarse - value).abs().min()) < 1e-9 for value in inner)
        assert float(rates.neg().exp().sum()) == pytest.approx(1)

    def test_the_pair_that_adds_least_error_is_merged_first(self):
        own = layer(rows=200)
        fine, _ = grid(own, 0.01)
        step, finest = math.sqrt(12 * 0.01 / own.mean_precision), own.reach / 2000
        places = ((own.mean / finest).round() * finest / step).round().reshape(-1)
        _, upper = own.conditioning
        variances = torch.empty(9, dtype=torch.float64).index_copy_(0, own.conditioning[0], upper.diagonal() ** 2)
        precisions = (own.importance[:, None] / variances).reshape(-1)
        values = places.unique().tolist()
        left = [(step * place, float(precisions[places == place].sum())) for place in values if place]
        assert len(left) == len(fine)
        while len(left) > len(fine) // 3:  # looking at all pairs each time
            added = [n * m / (n + m) * (y - x) ** 2 for (x, n), (y, m) in itertools.pairwise(left)]
            i = added.index(min(added))
            (x, n), (y, m) = left[i : i + 2]
            left[i : i + 2] = [((n * x + m * y) / (n + m), n + m)]
        coarse, _ = grid(own, 0.01, max_components=len(left))
        assert coarse.tolist() == pytest.approx([x for x, _ in left], rel=1e-5)


class TestFit:
    @pytest.mark.parametrize("bits", [1.0, 2.0, 3.0])
    def test_meets_the_size_in_the_file(self, bits):
        own = layer(rows=128, inputs=96, tokens=500)
        coding = fit(own, bits=bits)
        packed = pack_tensor(coding.coded(), "entropy")
        assert coding.bits_per_weight == pytest.approx(bits, abs=0.05)
        assert 8 * packed.num_bytes / packed.numel == pytest.approx(coding.bits_per_weight, abs=0.01)
        half = coding.coded().dense()
        torch.testing.assert_close(half, coding.dense().float(), rtol=1e-3, atol=1e-6)

    def test_more_bits_lose_less(self):
        own = layer(rows=64, inputs=64, tokens=300)
        errors = [own.relative_error(fit(own, bits=bits).dense()) for bits in (1.0, 2.0, 3.0, 4.0)]
        assert all(b < 0.5 * a for a, b in itertools.pairwise(errors))

    def test_beats_an_even_grid_with_plain_rounding_at_equal_entropy(self):
        own = layer(rows=128, inputs=64, tokens=300)
        coding = fit(own, bits=2.0)
        low, high = 0.01, 10.0
        while high - low > 1e-4:
            step = 0.5 * (low + high)
            counts = (own.mean / step).round().unique(return_counts=True)[1].double()
            entropy = float(torch.special.entr(counts / counts.sum()).sum()) / math.log(2)
            low, high = (step, high) if entropy > 2.0 else (low, step)
        plain = (own.mean / high).round() * high
        assert own.excess(coding.dense()) < 0.5 * own.excess(plain)

    def test_few_components_are_kept_to(self):
        own = layer(rows=64, inputs=64, tokens=300)
        assert len(fit(own, bits=2.5, max_components=7).codewords) <= 7

    def test_codewords_ascend_and_symbols_follow(self):
        own = layer(rows=64, inputs=64, tokens=300)
        coding = fit(own, beta=0.5)
        assert (coding.codewords.diff() >= 0).all()
        assert int(coding.counts.sum()) == own.mean.numel()
        assert own.relative_error(coding.dense()) < 0.5

    @pytest.mark.parametrize(
        ("asked", "sentence"),
        [
            ({}, "either bits or beta"),
            ({"bits": 2.0, "beta": 1.0}, "either bits or beta"),
            ({"bits": 0.0}, "bits is 0.0"),
            ({"beta": math.inf}, "beta is inf"),
            ({"beta": 1.0, "max_components": 256}, "max_components is 256"),
            ({"beta": 1.0, "rounds": 0}, "rounds is 0"),
        ],
    )
    def test_says_what_is_wrong(self, asked, sentence):
        with pytest.raises(RecipeError, match=sentence):
            fit(layer(), **asked)
