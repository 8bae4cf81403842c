"""`compress` in one call: what it promises about the result, its inputs, and interruption."""

import copy

import pytest
import torch
from torch import nn

from sqs_pyro import CompressionResult, compress, load, pack, save, size_report
from sqs_pyro.compression.baseline import BaselineRecipe, train_baseline
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.data import ArrayLoader, load_data
from sqs_pyro.data.recipe import DataRecipe
from sqs_pyro.errors import DataError, DivergenceError, NetworkError, RecipeError
from sqs_pyro.evaluation.classification import evaluate
from sqs_pyro.models.likelihoods import categorical
from sqs_pyro.networks.registry import build_network

RECIPE = {"epochs": 6, "nonzero_rate": 0.25, "num_components": 8}


@pytest.fixture(scope="module")
def digits():
    return load_data(DataRecipe(name="digits"))


@pytest.fixture(scope="module")
def trained(digits):
    """A small network that knows its digits."""
    torch.manual_seed(0)
    net = build_network("digits_net", width=8)
    train_baseline(net, digits.train, None, BaselineRecipe(epochs=12))
    return net.eval()


@pytest.fixture(scope="module")
def result(digits, trained):
    """One compression that several tests look at."""
    before = copy.deepcopy(trained.state_dict())
    flags = [p.requires_grad for p in trained.parameters()]
    result = compress(trained, digits.train, RECIPE, validation=digits.validation)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert [p.requires_grad for p in trained.parameters()] == flags and not trained.training
    return result


def images(loader) -> torch.Tensor:
    return torch.cat([x for x, _ in loader])


class TestResult:
    """DESIGN: the network that is trained is the network that is shipped."""

    def test_hard_packed_and_loaded_networks_agree_on_all_test_images(self, digits, result, tmp_path):
        x = images(digits.test)
        save(result.network, tmp_path / "packed.safetensors")
        from_metadata = load(tmp_path / "packed.safetensors")
        into_a_network = load(tmp_path / "packed.safetensors", build_network("digits_net", width=8))
        with torch.no_grad():
            expected = result.hard(x)
            for net in (result.network, from_metadata, into_a_network, pack(result)):
                torch.testing.assert_close(net.eval()(x), expected, rtol=1e-5, atol=1e-5)

    def test_hard_network_is_the_guides(self, digits, result):
        coded = result.guide.harden()
        for name, tensor in coded.items():
            assert torch.equal(result.hard.get_parameter(name).detach(), tensor.dense())

    def test_nonzero_count_is_exact_everywhere(self, result, tmp_path):
        sites = result.model.site_values()
        total = sum(value.numel() for value in sites.values())
        expected = round(0.25 * total)
        assert sum(int((result.hard.get_parameter(n) != 0).sum()) for n in sites) == expected
        assert sum(tensor.nonzeros for tensor in result.guide.harden().values()) == expected
        save(result.network, tmp_path / "packed.safetensors")
        assert size_report(tmp_path / "packed.safetensors").nonzeros == expected
        assert result.history[-1].nonzero_rate == expected / total

    def test_every_weight_is_zero_or_one_of_k_values(self, result):
        for name in result.model.site_values():
            values = result.hard.get_parameter(name).detach().unique()
            assert len(values[values != 0]) <= 8

    def test_size_report_is_the_files_size(self, result, tmp_path):
        path = tmp_path / "packed.safetensors"
        save(result.network, path)
        for source in (result.network, path, str(path)):
            report = size_report(source)
            assert report.total == sum(report.parts.values()) == path.stat().st_size
        parameters = sum(p.numel() for p in result.hard.parameters())
        buffers = sum(b.numel() for b in result.hard.buffers() if b.is_floating_point())
        assert report.fp32_bytes == 4 * (parameters + buffers)

    def test_it_still_knows_its_digits(self, digits, trained, result):
        before, after = evaluate(trained, digits.test), evaluate(result.network, digits.test)
        assert before.accuracy > 0.9
        assert after.accuracy > before.accuracy - 0.1  # the recipes' own figures are measured elsewhere

    def test_history(self, result):
        assert isinstance(result, CompressionResult) and isinstance(result.recipe, CompressionRecipe)
        assert {record.stage for record in result.history} == {"dense", "coded", "frozen"}
        assert [r.score for r in result.history if r.score is not None][-1] > 0.7
        assert result.seconds > 0
        assert not result.hard.training and not result.network.training


class TestOneSiteOrAnother:
    @pytest.mark.parametrize(
        "recipe",
        [
            {"groups": "channel", "num_components": 2, "layout": "bitmap"},
            {"groups": 8, "num_components": 3, "layout": "dense"},
            {"exclude": [r"^features\.0"], "layout": "entropy", "leftover_dtype": "float32"},
            {"include": [r"fc\.weight"], "codebook_dtype": "float32", "leftover_dtype": "float32"},
            {"estimator": "soft", "windows": {"kind": "outlier_aware", "count": 16}, "kl": "dominant"},
            {"batch_norm_batches": 0, "kl_weight": 0.0, "nonzero_rate": 1.0},
            {"prior": {"inclusion": 0.1, "slab_scale": 0.05}, "gate_learning_rate": 0.01, "kl": "monte_carlo"},
        ],
        ids=lambda recipe: ",".join(recipe),
    )
    def test_the_path_holds_for_every_recipe(self, digits, trained, recipe, tmp_path):
        chosen = CompressionRecipe(**{**RECIPE, "epochs": 1, "num_components": 4, **recipe})
        result = compress(trained, digits.train, chosen)
        save(result.network, tmp_path / "packed.safetensors")
        x = images(digits.test)[:100]
        with torch.no_grad():
            expected = result.hard(x)
            torch.testing.assert_close(result.network(x), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(load(tmp_path / "packed.safetensors")(x), expected, rtol=1e-5, atol=1e-5)
        assert size_report(result.network).total == (tmp_path / "packed.safetensors").stat().st_size
        total = sum(value.numel() for value in result.model.site_values().values())
        assert result.history[-1].nonzero_rate == round(chosen.nonzero_rate * total) / total


def separable(n: int = 60, batch: int = 12):
    """Tabular data for networks with 1-D batch norm; a torch DataLoader, as users have."""
    y = torch.arange(n) % 2
    x = torch.randn(n, 6) + 3 * y[:, None]
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=batch)


def tabular() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))


class TestUsersNetworks:
    def test_a_network_and_a_loader_that_are_not_ours(self, tmp_path):
        net, loader = tabular(), separable()
        result = compress(
            net, loader, {"epochs": 8, "num_components": 4, "nonzero_rate": 0.5, "learning_rate": 0.05}
        )
        assert evaluate(result.network, loader).accuracy > 0.95
        save(result.network, tmp_path / "net.safetensors")
        x = loader.dataset.tensors[0]
        torch.testing.assert_close(
            load(tmp_path / "net.safetensors", tabular)(x), result.hard(x), rtol=1e-5, atol=1e-5
        )

    def test_regression(self):
        x = torch.randn(64, 6)
        target = x @ torch.randn(6, 2)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, target), batch_size=16)
        net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))
        recipe = {"epochs": 30, "num_components": 8, "nonzero_rate": 0.5, "learning_rate": 0.05}
        result = compress(net, loader, recipe, likelihood="gaussian")
        error = (result.network(x) - target).square().mean()
        assert error < 0.3 * target.square().mean()

    def test_tied_weights_without_anything_left_over(self, tmp_path):
        def tied():
            net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False))
            net[2].weight = net[0].weight
            return net

        result = compress(tied(), separable(), {"epochs": 2, "num_components": 4, "nonzero_rate": 0.5})
        assert list(result.model.site_values()) == ["0.weight"]
        save(result.network, tmp_path / "net.safetensors")
        x = torch.randn(7, 6)
        for net in (result.network, load(tmp_path / "net.safetensors", tied)):
            torch.testing.assert_close(net(x), result.hard(x), rtol=1e-5, atol=1e-5)
        assert size_report(result.network).nonzeros == 18

    def test_a_transformer_with_mapping_inputs(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=8,
            num_labels=2,
        )

        class Loader(list):
            dataset = range(40)

        ids = torch.randint(20, (4, 10, 5))
        batch = [({"input_ids": i, "attention_mask": torch.ones_like(i)}, (i[:, 0] > 9).long()) for i in ids]
        net = transformers.BertForSequenceClassification(config)
        result = compress(net, Loader(batch), {"epochs": 2, "num_components": 4, "leftover_dtype": "float32"})
        save(result.network, tmp_path / "net.safetensors")
        loaded = load(tmp_path / "net.safetensors", lambda: transformers.BertForSequenceClassification(config))
        with torch.no_grad():
            expected = result.hard(**batch[0][0]).logits
            for packed in (result.network, loaded):
                torch.testing.assert_close(packed(**batch[0][0]).logits, expected, rtol=1e-5, atol=1e-5)
        assert evaluate(result.network, batch).num_examples == 40

    def test_distillation_observes_the_network_itself(self, digits, trained, tmp_path):
        recipe = {**RECIPE, "epochs": 3, "distillation": {"weight": 1.0, "temperature": 2.0}}
        result = compress(trained, digits.train, recipe, checkpoint=tmp_path / "state.pt")
        x = images(digits.test)
        with torch.no_grad():
            agreement = (result.network(x).argmax(-1) == trained(x).argmax(-1)).float().mean()
        assert agreement > 0.9  # no label had any weight
        assert result.model.likelihood is categorical  # again: labels, not opinions, are observed

    def test_distillation_is_for_classifiers(self, digits, trained):
        with pytest.raises(RecipeError, match="needs the likelihood 'categorical'"):
            compress(trained, digits.train, {**RECIPE, "distillation": {}}, likelihood="gaussian")

    def test_metadata_is_in_the_file(self, tmp_path):
        from sqs_pyro.packing.file import read_packed

        result = compress(tabular(), separable(), {"epochs": 1, "num_components": 4}, metadata={"note": "mine"})
        save(result.network, tmp_path / "net.safetensors")
        metadata = read_packed(tmp_path / "net.safetensors").metadata
        assert metadata["note"] == "mine" and metadata["recipe"] == {"epochs": 1, "num_components": 4}


class TestSeeds:
    def test_same_seed_same_network_and_the_callers_random_numbers_are_untouched(self):
        net = tabular()
        loader = separable()
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        one = compress(net, loader, {"epochs": 2, "num_components": 4}, seed=5)
        assert torch.equal(torch.rand(4), expected)
        two = compress(net, loader, {"epochs": 2, "num_components": 4}, seed=5)
        other = compress(net, loader, {"epochs": 2, "num_components": 4}, seed=6)
        state = one.hard.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in two.hard.state_dict().items())
        assert any(not torch.equal(value, state[name]) for name, value in other.hard.state_dict().items())


SHORT = {"epochs": 3, "num_components": 4, "nonzero_rate": 0.4, "batch_norm_batches": 3}


class TestInterruption:
    def loader(self) -> ArrayLoader:
        generator = torch.Generator().manual_seed(0)
        return ArrayLoader(torch.randn(90, 1, 8, 8, generator=generator), torch.arange(90) % 10, 15, shuffle=True)

    def net(self) -> nn.Module:
        torch.manual_seed(0)
        return build_network("digits_net", width=4)

    @pytest.fixture(scope="class")
    @classmethod
    def expected(cls):
        return compress(cls().net(), cls().loader(), SHORT)

    @pytest.mark.parametrize("step", [2, 10, 18])
    def test_resumed_equals_uninterrupted_bit_for_bit(self, expected, step, tmp_path):
        checkpoint = tmp_path / "compression.pt"

        def interrupt(record):
            if record.step == step:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compress(self.net(), self.loader(), SHORT, checkpoint=checkpoint, progress=interrupt)
        assert checkpoint.exists()
        resumed = compress(self.net(), self.loader(), SHORT, checkpoint=checkpoint)
        again = compress(self.net(), self.loader(), SHORT, checkpoint=checkpoint)  # nothing left to train
        state = expected.hard.state_dict()
        for result in (resumed, again):
            assert all(torch.equal(value, state[name]) for name, value in result.hard.state_dict().items())
            assert result.history == expected.history

    def test_a_recipe_of_another_kind(self, tmp_path):
        checkpoint = tmp_path / "compression.pt"
        compress(self.net(), self.loader(), {**SHORT, "epochs": 1}, checkpoint=checkpoint)
        with pytest.raises(RecipeError, match=r"another recipe \(epochs: 1 -> "):
            compress(self.net(), self.loader(), SHORT, checkpoint=checkpoint)
        with pytest.raises(NetworkError, match="another network"):
            net = build_network("digits_net", width=5)
            compress(net, self.loader(), {**SHORT, "epochs": 1}, checkpoint=checkpoint)


STEEP = {"num_components": 4, "learning_rate": 10.0, "weight_decay": 1.0, "epochs": 20}


class TestBadInput:
    def test_nothing_to_train_on(self):
        empty = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.empty(0, 6), torch.empty(0)))
        with pytest.raises(DataError, match="no minibatch to train on: the training data is empty"):
            compress(tabular(), empty)

    def test_nan_in_the_data(self):
        loader = separable()
        loader.dataset.tensors[0][30, 2] = float("nan")
        with pytest.raises(DataError, match=r"minibatch 3 holds 1 values of 72 that are NaN or infinite"):
            compress(tabular(), loader, {"num_components": 4})

    def test_labels_out_of_range(self):
        loader = separable()
        loader.dataset.tensors[1][0] = 2
        with pytest.raises(DataError, match="labels in minibatch 1 run from 0 to 2"):
            compress(tabular(), loader, {"num_components": 4})

    def test_divergence(self):
        with pytest.raises(DivergenceError, match="lower learning_rate"):
            compress(tabular(), separable(), STEEP)

    def test_nan_in_the_weights(self):
        net = tabular()
        with torch.no_grad():
            net[4].weight[0, 0] = float("nan")
        with pytest.raises(NetworkError, match=r"'4.weight' has 1 values of 32 that are NaN"):
            compress(net, separable())

    def test_too_few_weights_for_a_codebook(self):
        with pytest.raises(
            NetworkError, match=r"'4.weight' has 32 weights a codebook, fewer than num_components=64"
        ):
            compress(tabular(), separable(), {"num_components": 64})

    @pytest.mark.parametrize(
        ("recipe", "sentence"),
        [
            ({"nonzero_rat": 0.1}, r"'compression.nonzero_rat' is unknown: .*did you mean 'nonzero_rate'"),
            ({"nonzero_rate": 1.5}, r"'compression.nonzero_rate' is 1.5"),
            ({"num_components": 0}, r"'compression.num_components' is 0"),
            ({"temperature": -1.0}, r"'compression.temperature' is -1.0"),
            ({"pruning": {"scop": "layer"}}, r"'compression.pruning.scop' is unknown"),
            ({"groups": "rows"}, r"'compression.groups"),
            ({"groups": 7}, r"groups=7 does not fit layer"),
        ],
    )
    def test_recipes(self, recipe, sentence):
        with pytest.raises(RecipeError, match=sentence):
            compress(tabular(), separable(), recipe)

    def test_a_recipe_of_the_wrong_kind(self):
        with pytest.raises(RecipeError, match="must be a mapping"):
            compress(tabular(), separable(), [("epochs", 3)])
