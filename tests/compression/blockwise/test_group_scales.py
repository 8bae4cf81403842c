"""Scales of groups of inputs: against plain loops, exact least squares and scales of whole outputs."""

import math
from dataclasses import replace

import pytest
import torch
from compression.blockwise.test_sequential_coding import layer, prior
from kits.tiny_transformers import tiny

from sqs_pyro import compress_transformer, load, save
from sqs_pyro.compression.blockwise.channel_scales import in_units_of, scale_bits, size_scales
from sqs_pyro.compression.blockwise.codebooks import UniformCodebook, best_codewords, best_parts
from sqs_pyro.compression.blockwise.coded_weight import coded_weight
from sqs_pyro.compression.blockwise.first_codewords import with_zero
from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.compression.blockwise.sequential_coding import code_sequentially, fit, improve
from sqs_pyro.compression.blockwise.shares import Shares
from sqs_pyro.errors import RecipeError
from sqs_pyro.kernels.runtime import runtime_weights
from sqs_pyro.packing.stored import stored_weights


def scales_for(own, parts, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return (
        (0.3 + 2 * torch.rand(own.shares.count, parts, generator=generator, dtype=torch.float64)).half().double()
    )


def weights(own, symbols, codewords, scales):
    size = own.mean.shape[1] // scales.shape[1]
    return with_zero(codewords)[symbols.long()] * scales.repeat_interleave(size, 1)


class TestSteps:
    def test_parts_that_are_alike_are_scales_of_outputs(self):
        own, (codewords, rates) = layer(rows=7, inputs=12), prior(4)
        of_rows = scales_for(own, 1)[:, 0]
        by_row, by_part = own.in_units_of(of_rows), own.in_units_of(of_rows[:, None].repeat(1, 3))
        first, _ = code_sequentially(by_row, codewords, rates, 1.5)
        for step in (code_sequentially, lambda own, *prior: improve(own, first, *prior)):
            chosen, means = step(by_row, codewords, rates, 1.5)
            found, others = step(by_part, codewords, rates, 1.5)
            assert torch.equal(found, chosen)
            torch.testing.assert_close(others, means * of_rows[:, None])
        assert by_part.reach == pytest.approx(by_row.reach)
        assert by_part.mean_precision == pytest.approx(by_row.mean_precision)
        torch.testing.assert_close(by_part.histogram.mass, by_row.histogram.mass)
        expected = best_codewords(by_row, chosen, codewords)
        torch.testing.assert_close(best_codewords(by_part, chosen, codewords), expected)

    def test_no_single_change_of_a_symbol_helps(self):
        own, (codewords, rates) = layer(rows=3, inputs=8), prior(3)
        scales = scales_for(own, 2)
        grouped = own.in_units_of(scales)

        def objective(symbols):
            return own.excess(weights(own, symbols, codewords, scales)) + 0.7 * float(rates[symbols.long()].sum())

        symbols, _ = code_sequentially(grouped, codewords, rates, 0.7)
        before = objective(symbols)
        for _ in range(30):
            symbols, _ = improve(grouped, symbols, codewords, rates, 0.7)
            assert objective(symbols) <= before + 1e-9
            before = objective(symbols)
        for i in range(3):
            for j in range(8):
                for z in range(4):
                    other = symbols.clone()
                    other[i, j] = z
                    assert objective(other) >= before - 1e-9

    def test_codewords_are_the_least_squares_solution(self):
        own, (codewords, _) = layer(rows=5, inputs=8), prior(3)
        scales = scales_for(own, 4)
        symbols = torch.randint(0, 4, own.mean.shape, generator=torch.Generator().manual_seed(2)).to(torch.uint8)
        found = best_codewords(own.in_units_of(scales), symbols, codewords)
        root = torch.linalg.cholesky(own.curvature)
        g = own.importance.sqrt()[:, None, None]
        design = torch.stack([weights(own, symbols, torch.eye(3).double()[k], scales) for k in range(3)], -1)
        # [n, M, K] through the root of H, rows by the root of g
        left = (g * torch.einsum("nmk,mj->njk", design, root)).reshape(-1, 3)
        right = (g[..., 0] * (own.mean @ root)).reshape(-1, 1)
        torch.testing.assert_close(found, torch.linalg.lstsq(left, right).solution[:, 0], rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("units", [1, 3])
    def test_scales_come_near_the_exact_ones(self, units):
        own, (codewords, _) = layer(rows=6, inputs=12, correlated=False), prior(5)
        own = replace(own, rows=Shares(6, units))
        scales = scales_for(own, 3)
        grouped = own.in_units_of(scales)
        symbols, _ = code_sequentially(grouped, codewords, torch.zeros(6).double(), 1.0)
        found = best_parts(grouped, symbols, codewords)
        assert torch.equal(found, found.half().double())
        n = with_zero(codewords)[symbols.long()].view(6, 3, 4)
        for i in range(6):
            parts = torch.block_diag(*n[i][:, None, :].unbind(0))  # [3, 12]: codewords of each part
            exact = torch.linalg.solve(parts @ own.curvature @ parts.T, parts @ own.curvature @ own.mean[i])

            def lost(s, i=i, parts=parts):
                return float((s @ parts - own.mean[i]) @ own.curvature @ (s @ parts - own.mean[i]))

            assert lost(exact) <= lost(found[i]) <= lost(exact) + 0.1 * (lost(scales[i]) - lost(exact)) + 1e-2

    def test_parts_of_zeros_stay_as_they_are(self):
        own, (codewords, _) = layer(rows=4, inputs=9), prior(2)
        scales = scales_for(own, 3)
        symbols = torch.zeros(own.mean.shape, dtype=torch.uint8)
        assert torch.equal(best_parts(own.in_units_of(scales), symbols, codewords), scales)


def test_sizes_are_root_mean_squares_by_precision():
    weight, precisions = torch.randn(5, 12), torch.rand(12) + 0.1
    found = size_scales(weight, 4, precisions)
    expected = torch.tensor(
        [
            [math.sqrt(sum(precisions[3 * b + k] * weight[i, 3 * b + k] ** 2 for k in range(3))
                       / sum(precisions[3 * b : 3 * b + 3])) for b in range(4)]
            for i in range(5)
        ]
    )  # fmt: skip
    torch.testing.assert_close(found / found[0, 0], expected / expected[0, 0], rtol=2e-3, atol=0)
    assert float(found.log().mean()) == pytest.approx(0, abs=1e-3)
    assert size_scales(weight).shape == (5,)
    assert scale_bits(found, 12) == 16 / 3
    torch.testing.assert_close(in_units_of(found, weight), weight / found.repeat_interleave(3, 1))


class TestFit:
    def groups_of_other_sizes(self):
        own = layer(rows=48, inputs=128, tokens=500)
        generator = torch.Generator().manual_seed(4)
        sizes = torch.randn(48, 4, generator=generator, dtype=torch.float64).exp()
        return replace(own, mean=own.mean * sizes.repeat_interleave(32, 1))

    def test_they_lose_less_at_equal_bits_of_a_code(self):
        own = self.groups_of_other_sizes()
        lost = {}
        for parts in (1, 4):
            scales = size_scales(own.mean, parts, own.factors.precisions)
            coding = fit(own.in_units_of(scales), beta=1e-9, max_components=7)
            lost[parts] = own.relative_error(coding.coded(scales).dense().double())
        assert lost[4] < 0.6 * lost[1]

    @pytest.mark.parametrize("grid", ["free", "uniform"])
    def test_a_weight_at_so_many_bits(self, grid):
        own = self.groups_of_other_sizes()
        recipe = BlockwiseRecipe(grid=grid, num_components=15, bits=3.5, group_size=32)
        scales = size_scales(own.mean, 4, own.factors.precisions)
        coded, figures = coded_weight(own, scales, recipe, bits=3.5, beta=None)
        assert figures["bits"] == pytest.approx(3.5, abs=0.05)  # half a bit of them for scales
        assert coded.scales.shape == (48, 4)
        assert figures["error"] == pytest.approx(own.relative_error(coded.dense().double()), rel=1e-6)
        if grid == "uniform":
            assert torch.equal(coded.codebook[0], UniformCodebook(15).places.float())


RECIPE = {
    "bits": 3.25,
    "runtime_bits": 3,
    "group_size": 32,
    "importance_sequences": 2,
    "batch_size": 4,
    "rounds": 1,
    "embedding": False,
    "head": False,
}


def sequences():
    return torch.randint(3, 64, (8, 10), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "keys",
    [{}, {"grid": "uniform", "allocation": "even"}, {"moving_steps": 3, "settle_steps": 2, "finish_steps": 2}],
    ids=lambda keys: "-".join(keys) or "plain",
)
def test_a_network_has_them_in_file_and_memory(keys, tmp_path):
    net = tiny("llama", num_hidden_layers=1, hidden_size=64, intermediate_size=96)
    packed = compress_transformer(net, sequences(), {**RECIPE, **keys}).network
    found = stored_weights(packed)
    assert len(found) == 7
    for weight in found.values():
        assert weight.coded().scales.shape == (weight.shape[0], weight.shape[1] // 32)
    save(packed, tmp_path / "net.safetensors")
    loaded = load(tmp_path / "net.safetensors", net)
    with torch.no_grad():
        first, second, original = (each(input_ids=sequences())[0] for each in (packed, loaded, net))
    assert torch.equal(first, second)
    assert float((first - original).square().sum() / original.square().sum()) < 0.5
    if all(weight.form == "rows" for weight in runtime_weights(loaded)):  # a compiler is there
        # Five chunks of 32 codes of 3 bits in a word, and 16 bits for each scale; the table of eight beside.
        for weight in runtime_weights(loaded):
            chunks = math.prod(weight.shape) // 32
            assert weight.packed_bytes == 64 * -(-chunks // 5) + 2 * chunks + 32


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("keys", "sentence"),
        [
            ({"group_size": 64}, "group_size 64 does not divide the 96 inputs of layer .*mlp.down_proj'"),
            (
                {"layers": {"*.q_proj": {"bits": 0.5}}},
                "With blockwise.group_size 32 the scales of layer .*q_proj' take 0.5 bits a .* take larger",
            ),
            ({"bits": 3.6}, "bits: at most 3.50, which zero and num_components: 7 values and scales of 32"),
            ({"group_size": 48}, "group_size"),
        ],
    )  # fmt: skip
    def test_before_work(self, keys, sentence):
        net = tiny("llama", num_hidden_layers=1, hidden_size=64, intermediate_size=96)
        with pytest.raises(RecipeError, match=sentence):
            compress_transformer(net, sequences(), {**RECIPE, **keys})

    def test_bits_that_are_left_out_have_room_for_scales(self):
        assert BlockwiseRecipe(runtime_bits=3, group_size=64).bits == 3.0
        assert BlockwiseRecipe(num_components=7, group_size=32).bits == 3.2
