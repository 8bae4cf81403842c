"""Round to nearest, GPTQ and AWQ: against plain loops and the papers' rules on small examples."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from compression.blockwise.test_sequential_coding import layer
from kits import architectures
from kits.tiny_transformers import tiny

from sqs_pyro import compress_transformer, load, save
from sqs_pyro.compression.blockwise.activation_scales import activation_moments, fold, input_scales, scales_at
from sqs_pyro.compression.blockwise.block_layers import BlockLayers
from sqs_pyro.compression.blockwise.laplace import LayerLikelihood
from sqs_pyro.compression.blockwise.machines import MACHINES
from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.compression.blockwise.rounding import clipped_scales, largest_scales, rounded, rounded_weight
from sqs_pyro.compression.blockwise.shares import Shares
from sqs_pyro.compression.blockwise.time_plan import plan_time
from sqs_pyro.errors import NetworkError, RecipeError
from sqs_pyro.networks import architectures as known
from sqs_pyro.packing.stored import stored_weights
from sqs_pyro.recipes import parse
from sqs_pyro.runs.language_model_recipe import LanguageModelRecipe

GROUP = 4  # of 12 inputs; recipes allow multiples of 32 alone


def by_loops(weight, k, size):
    """Each weight on its own: the grid is K steps between minus and plus the largest weight of its group."""
    found = torch.empty_like(weight)
    for i, row in enumerate(weight.tolist()):
        for j, value in enumerate(row):
            start = j // size * size
            largest = max(map(abs, row[start : start + size]))
            step = float(torch.tensor(2 * largest / k).half())
            numbers = range(-math.ceil(k / 2), k // 2 + 1)
            found[i, j] = step * min(numbers, key=lambda n, w=value, s=step: abs(w - s * n))
    return found


def by_the_paper(weight, curvature, k, size):
    """Algorithm 1 of Frantar et al. 2023 without its blocks of columns, inputs by falling curvature."""
    order = curvature.diagonal().argsort(descending=True, stable=True)
    steps = (2 * weight.view(len(weight), -1, size).abs().amax(2) / k).half().double().repeat_interleave(size, 1)
    left, steps = weight[:, order].clone(), steps[:, order]
    inverse = torch.linalg.cholesky(torch.linalg.inv(curvature[order][:, order])).T  # upper
    rounded = torch.empty_like(left)
    for j in range(len(order)):
        number = (left[:, j] / steps[:, j]).round().clamp(-math.ceil(k / 2), k // 2)
        rounded[:, j] = steps[:, j] * number
        error = (left[:, j] - rounded[:, j]) / inverse[j, j]
        left[:, j:] -= error[:, None] * inverse[j, j:]
    return rounded[:, order.argsort()]


@pytest.mark.parametrize(("k", "size"), [(15, 12), (7, GROUP), (3, 6), (4, GROUP)])
class TestRounding:
    def test_nearest_is_that_of_a_loop(self, k, size):
        own = replace(layer(rows=6, inputs=12), rows=Shares(6, 4))
        coded, figures = rounded_weight(own, "rtn", k, size)
        torch.testing.assert_close(coded.dense().double(), by_loops(own.mean, k, size))
        torch.testing.assert_close(rounded(own, k, size), coded.dense().double())
        assert coded.codebook.tolist() == [[n for n in range(-math.ceil(k / 2), k // 2 + 1) if n]]
        assert figures["error"] == pytest.approx(own.relative_error(coded.dense().double()), rel=1e-6)

    def test_gptq_is_the_papers_algorithm(self, k, size):
        own = layer(rows=6, inputs=12, seed=k)
        coded, _ = rounded_weight(own, "gptq", k, size)
        torch.testing.assert_close(coded.dense().double(), by_the_paper(own.mean, own.curvature, k, size))
        assert own.excess(coded.dense().double()) < own.excess(rounded(own, k, size))

    def test_gptq_of_inputs_without_correlation_is_nearest(self, k, size):
        own = layer(rows=6, inputs=12)
        own = replace(own, curvature=own.curvature.diagonal().diag())
        first, second = (rounded_weight(own, method, k, size)[0] for method in ("gptq", "rtn"))
        assert torch.equal(first.dense(), second.dense())

    def test_clipping_is_the_best_of_ten(self, k, size):
        own = replace(layer(rows=6, inputs=12), rows=Shares(6, 4))
        found = clipped_scales(own, k, size).reshape(6, -1)
        for i in range(6):
            for b in range(12 // size):
                part = slice(b * size, (b + 1) * size)
                weight, curvature = own.mean[i, part], own.curvature[part, part]
                lost = {}
                for n in range(10):
                    step = (2 * float(weight.abs().max()) / k * torch.tensor(1 - n / 20)).half().double()
                    error = step * (weight / step).round().clamp(-math.ceil(k / 2), k // 2) - weight
                    lost[float(step)] = float(error @ curvature @ error)
                assert lost[float(found[i, b])] == pytest.approx(min(lost.values()))


def test_zeros_and_sizes_beyond_float16():
    weight = torch.cat([torch.zeros(1, 8), torch.full((1, 8), 1e-9), torch.full((1, 8), 1e9)])
    own = LayerLikelihood(weight, torch.eye(8), torch.ones(3))
    assert largest_scales(own, 15).tolist() == [1.0, 2**-14, 65504.0]
    assert not rounded_weight(own, "rtn", 15)[0].dense()[:2].any()


class TestInputScales:
    def activations(self):
        generator = torch.Generator().manual_seed(3)
        sizes = torch.randn(12, generator=generator, dtype=torch.float64).exp()
        return torch.randn(40, 12, generator=generator, dtype=torch.float64) * sizes

    def test_moments_are_those_of_all_inputs(self):
        x = self.activations().float()
        sizes, moment = activation_moments(x.view(8, 5, 12), Shares(8, 3))
        torch.testing.assert_close(sizes, x.abs().mean(0))
        torch.testing.assert_close(moment, x.T @ x)

    @pytest.mark.parametrize("seed", range(4))
    def test_alpha_is_that_of_brute_force(self, seed):
        x, size = self.activations(), 6
        owns = [replace(layer(rows=5, inputs=12, seed=seed + i), curvature=x.T @ x) for i in (0, 10)]
        owns = [replace(own, importance=torch.ones(5).double()) for own in owns]
        found = input_scales(x.abs().mean(0), [(owns[0], 7), (owns[1], 3)], size)
        lost = {}
        for i in range(20):
            scales = x.abs().mean(0) ** (i / 20)
            scales = scales / (scales.max() * scales.min()).sqrt()
            lost[i] = sum(
                float(((x / scales) @ by_loops(own.mean * scales, k, size).T - x @ own.mean.T).square().sum())
                for own, k in zip(owns, (7, 3), strict=True)
            )
        best = min(lost, key=lost.__getitem__)
        torch.testing.assert_close(found, scales_at(x.abs().mean(0), best / 20))
        assert lost[best] < lost[0]
        assert torch.equal(scales_at(x.abs().mean(0), 0.0), torch.ones(12).double())  # which is plain rounding

    @pytest.mark.parametrize(
        ("case", "groups"), [("llama", 3), ("mistral", 3), ("qwen2", 3), ("phi3", 2), ("qwen3", 3)]
    )
    @torch.no_grad()
    def test_a_folded_network_says_the_same(self, case, groups):
        net = architectures.make(case)
        before = architectures.outputs(net)["logits"]
        assert self.folded(net) == groups * len(known.blocks(net))
        torch.testing.assert_close(architectures.outputs(net)["logits"], before, rtol=1e-5, atol=1e-5)

    def folded(self, net) -> int:
        """Fold scales of inputs into what is before each group, in place; return how many there were."""
        table, count = known.architecture_of(net), 0
        blocks, paths = known.blocks(net), known.block_paths(net)
        layers = BlockLayers(
            blocks, paths, partial(known.layer_groups, architecture=table), BlockwiseRecipe(), table.preceded
        )
        for i, block in enumerate(blocks):
            for before, group, names in layers.preceded(i, block):
                scales = 0.5 + torch.rand(group[names[0]].in_features)
                fold(scales, block.get_submodule(before), group.values())
                count += 1
        return count

    @torch.no_grad()
    def test_outputs_are_folded_into_values_where_each_has_its_own(self):
        net = tiny("llama", num_key_value_heads=4)
        ids = sequences()
        before = net(ids).logits
        assert self.folded(net) == 8
        torch.testing.assert_close(net(ids).logits, before, rtol=1e-5, atol=1e-5)


def sequences():
    return torch.randint(3, 64, (8, 10), generator=torch.Generator().manual_seed(1))


def network(layers=1):
    torch.manual_seed(0)
    return tiny("llama", num_hidden_layers=layers, hidden_size=64, intermediate_size=96)


def error(net, packed):
    with torch.no_grad():
        before, after = net(sequences()).logits, packed(sequences()).logits
    return float((after - before).square().sum() / before.square().sum())


RECIPE = {"num_components": 7, "group_size": 32, "batch_size": 4}


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_network_of_whole_numbers(method, tmp_path):
    net = network(2)
    recipe = {**RECIPE, "method": method, "layout": "dense"}
    result = compress_transformer(net, sequences(), recipe, directory=tmp_path / "blocks")
    save(result.network, tmp_path / "first")
    loaded = load(tmp_path / "first", net)
    found = stored_weights(loaded)
    assert len(found) == 14
    for name, weight in found.items():
        numbers, scales = weight.coded().whole_numbers()
        assert scales.shape == (weight.shape[0], weight.shape[1] // 32)
        assert int(numbers.min()) >= -4 and int(numbers.max()) <= 3
        if method == "rtn":
            expected = by_loops(net.get_parameter(name).detach(), 7, 32)
            torch.testing.assert_close(weight.coded().dense(), expected)
    with torch.no_grad():
        assert torch.equal(loaded(sequences()).logits, result.network(sequences()).logits)
    assert error(net, loaded) < 0.1
    # What ships in the norms is what scales of inputs were folded into.
    norms = [value for name, value in loaded.named_parameters() if "layers" in name and "norm" in name]
    original = [value for name, value in net.named_parameters() if "layers" in name and "norm" in name]
    same = [torch.equal(a, b.half().float()) for a, b in zip(norms, original, strict=True)]
    assert same == [method != "awq"] * 4

    (tmp_path / "blocks/block-001.pt").unlink()
    again = compress_transformer(net, sequences(), recipe, directory=tmp_path / "blocks")
    save(again.network, tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_each_loses_less_than_the_one_before():
    net = network()
    lost = [
        error(net, compress_transformer(net, sequences(), {**RECIPE, "method": method}).network)
        for method in ("rtn", "awq", "gptq")
    ]
    assert lost[0] > lost[1] > lost[2]


def test_embedding_and_head_are_rounded_where_asked():
    net = network()
    recipe = {"method": "gptq", "num_components": 15, "batch_size": 4, "embedding": True, "head": True}
    found = stored_weights(compress_transformer(net, sequences(), recipe).network)
    assert {"model.embed_tokens.weight", "lm_head.weight"} < found.keys()
    assert all(weight.coded().scales.shape == (weight.shape[0],) for weight in found.values())


def test_plans_count_what_each_does():
    sqs = {"grid": "uniform", "allocation": "even", "embedding": False, "head": False}
    recipes = [{"method": "rtn"}, {"method": "gptq"}, {"method": "awq"}, sqs]
    plans = [plan_time(network(), 8, 10, recipe, MACHINES["cpu"], streamed=False) for recipe in recipes]
    assert [plan.steps > 0 for plan in plans] == [plan.factors > 0 for plan in plans] == [False, True, False, True]
    assert plans[0].coding < plans[1].coding < min(plans[2].coding, plans[3].coding)
    assert plans[0].calibration == plans[1].calibration < plans[2].calibration


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("keys", "sentence"),
        [
            ({"bits": 3.2}, "bits: left out beside method: rtn, .* but it is 3.2: leave it out"),
            ({"megabytes": 1.0}, "megabytes: left out"),
            ({"grid": "free"}, "grid: left out"),
            ({"allocation": "importance"}, "allocation: left out"),
            ({"settle_steps": 2}, "settle_steps: left out"),
            ({"adapt_inputs": True}, "adapt_inputs: left out"),
            ({"layers": {"*.q_proj": {"bits": 4}}}, r"layers\.\*\.q_proj\.bits: left out"),
            ({"num_components": 1}, "num_components: at least 2 beside method: rtn"),
            ({"method": "nearest"}, "method"),
        ],
    )
    def test_keys_without_a_meaning(self, keys, sentence):
        with pytest.raises(RecipeError, match=sentence):
            compress_transformer(network(), sequences(), {"method": "rtn", **keys})

    def test_a_search(self):
        recipe = {"network": {"path": "there"}, "blockwise": {"method": "rtn"}, "search": {"points": 1}}
        with pytest.raises(RecipeError, match=r"no search beside blockwise\.method: rtn"):
            parse(LanguageModelRecipe, recipe)

    def test_what_is_left_out_is_decided(self):
        recipe = BlockwiseRecipe(method="gptq", runtime_bits=3, group_size=32)
        assert (recipe.num_components, recipe.bits, recipe.grid, recipe.embedding) == (7, 3.5, "uniform", False)
        assert BlockwiseRecipe(**recipe.model_dump(exclude_defaults=True)) == recipe
        assert BlockwiseRecipe(method="rtn").bits == 4.0

    def test_awq_where_nothing_is_known_to_take_the_scales(self):
        with pytest.raises(RecipeError, match="of BertForMaskedLM it is not known what stands before its layers"):
            compress_transformer(tiny("bert_tied"), sequences(), {"method": "awq", "batch_size": 4})

    def test_what_is_not_preceding(self, monkeypatch):
        wrong = replace(known.architecture_of(network()), preceding={"gate": "input_layernorm"})
        monkeypatch.setitem(known._architectures, "llama", wrong)
        with pytest.raises(NetworkError, match=r"Block 'model\.layers\.0' does not say the same with scales"):
            compress_transformer(network(), sequences(), {"method": "awq", "batch_size": 4})
