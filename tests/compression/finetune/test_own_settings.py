"""`compress` with settings of single layers: each has exactly what was asked, the size is that of the whole."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sqs_pyro import SpikeGMMGuide, compress, size_report
from sqs_pyro.compression.finetune.rate_distortion import fit_symbol_prior
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.errors import ArgumentError, RecipeError
from sqs_pyro.models import BayesianNetwork
from sqs_pyro.recipes import parse
from sqs_pyro.reporting.own_settings import own_settings
from sqs_pyro.reporting.page.glance import asked
from sqs_pyro.reporting.tables import inspection_tables
from sqs_pyro.runs.measured import check_compressible

QUICK = {"epochs": 2, "num_components": 4, "nonzero_rate": 0.5}
LEARNED = {**QUICK, "allocation": "rate_distortion", "prior": {"kind": "learned"}}
STRUCTURED = {**LEARNED, "prior": {"kind": "learned", "scope": "structured"}}
X = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LOADER = DataLoader(TensorDataset(X, torch.arange(40) % 3), 10)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)

    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 24))


def ratios(result):
    return {row.name: (row.components, row.nonzeros) for row in size_report(result.network).tensors}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(value.dense(), other[name].dense()) for name, value in one.items())


def test_each_layer_has_what_was_asked(net):
    own = {"0": {"skip": True}, "2": {"num_components": 2}, "4": {"nonzero_rate": 0.25}}
    result = compress(net, LOADER, {**QUICK, "layers": own})
    found = ratios(result)
    assert found == {"2.weight": (2, 288), "4.weight": (4, 768)}  # half of 576, a quarter of 3072
    assert len(result.hard[0].weight.unique()) > 60
    metadata, size = result.network.packed_metadata, size_report(result.network).to_dict()
    shown = str(inspection_tables({"file": "file", "size": size, "metadata": metadata}))
    assert "asked of layers 0: left uncompressed" in shown and "asked of layers 4: nonzero_rate 0.25" in shown
    page = str(asked({"size": size, "seed": 0}, {"compression": metadata["recipe"]}))
    assert "layers 2" in page and "num_components 2" in page
    assert own_settings(metadata["recipe"]) == {
        "0": "left uncompressed",
        "2": "num_components 2",
        "4": "nonzero_rate 0.25",
    }


def test_one_rate_for_all_is_pruning_by_layer(net):
    """Each by itself, at the same rate: what `pruning.scope: layer` is."""
    by_pattern = compress(net, LOADER, {**QUICK, "nonzero_rate": 1, "layers": {"*": {"nonzero_rate": 0.3}}})
    by_scope = compress(net, LOADER, {**QUICK, "nonzero_rate": 0.3, "pruning": {"scope": "layer"}})
    assert same(by_pattern.guide.harden(), by_scope.guide.harden())


@pytest.mark.parametrize("recipe", [LEARNED, STRUCTURED], ids=["learned", "structured"])
def test_one_k_for_all_is_the_recipes(net, recipe):
    recipe = {**recipe, "kl_weight": 1e-4}
    by_pattern = compress(net, LOADER, {**recipe, "layers": {"*": {"num_components": 3}}})
    assert same(by_pattern.guide.harden(), compress(net, LOADER, {**recipe, "num_components": 3}).guide.harden())


@pytest.mark.parametrize("recipe", [LEARNED, STRUCTURED], ids=["learned", "structured"])
def test_layers_of_different_k_share_a_target(net, recipe):
    own = {"2": {"num_components": 1}, "4": {"num_components": 7}}
    result = compress(net, LOADER, {**recipe, "target_ratio": 10, "layers": own})
    assert [site.num_components for site in result.guide.site_guides().values()] == [4, 1, 7]
    values = {name: len(tensor.dense().unique()) for name, tensor in result.guide.harden().items()}
    assert values["2.weight"] <= 2 and values["0.weight"] <= 5 and values["4.weight"] <= 8
    assert size_report(result.network).ratio == pytest.approx(10, rel=0.1)


def test_a_target_is_of_the_whole_file(net):
    result = compress(net, LOADER, {**QUICK, "target_ratio": 10, "layers": {"2": {"nonzero_rate": 0.75}}})
    assert ratios(result)["2.weight"][1] == 432
    assert size_report(result.network).ratio == pytest.approx(10, rel=0.1)


def test_codes_that_a_site_lacks_have_no_prior():
    counts = torch.tensor([[5, 3, 2, 0, 0], [1, 4, 2, 0, 3]])
    possible = torch.tensor([[True, True, False, False], [True] * 4])
    together = fit_symbol_prior(counts, possible=possible)
    for i, (k, row) in enumerate(zip((2, 4), counts, strict=True)):
        alone = fit_symbol_prior(row[None, : 1 + k])
        torch.testing.assert_close(together.rates[i, : 1 + k], alone.rates[0])
        assert together.rates[i, 1 + k :].isinf().all()
    assert torch.equal(together.possible, possible)


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ({"layers": {"*": {"nonzero_rate": 0.2}}, "target_ratio": 5}, "every layer has a nonzero_rate"),
        (
            {"layers": {"4": {"nonzero_rate": 1}}, "target_ratio": 12},
            "leaves .* bytes to weights, but the layers with",
        ),
        ({"layers": {"9": {"skip": True}}}, r"the pattern '9', which no layer .*\(they are 0, 2, 4\)"),
    ],
)
def test_what_cannot_be_is_refused_before_training(net, recipe, sentence):
    def told(record):
        raise AssertionError("training began")

    with pytest.raises(RecipeError, match=sentence):
        compress(net, LOADER, {**QUICK, **recipe}, progress=told)
    if "leaves" not in sentence:  # by weights as they are, which before a run's training are not there
        with pytest.raises(RecipeError, match=sentence):
            check_compressible(net, parse(CompressionRecipe, {**QUICK, **recipe}))


def test_another_order_of_patterns_is_another_checkpoint(net, tmp_path):
    own = {"2": {"nonzero_rate": 0.5}, "[24]": {"nonzero_rate": 0.25}}
    turned = {"[24]": {"nonzero_rate": 0.25}, "2": {"nonzero_rate": 0.5}}
    with pytest.raises(RecipeError, match="has no effect"):
        compress(net, LOADER, {**QUICK, "layers": own})
    own = {"[02]": {"nonzero_rate": 0.5}, "[24]": {"nonzero_rate": 0.25}}
    turned = dict(reversed(own.items()))
    compress(net, LOADER, {**QUICK, "layers": own}, checkpoint=tmp_path / "kept.pt")
    with pytest.raises(RecipeError, match="patterns"):
        compress(net, LOADER, {**QUICK, "layers": turned}, checkpoint=tmp_path / "kept.pt")


def test_a_guide_takes_k_by_site(net):
    model = BayesianNetwork(copy.deepcopy(net))
    guide = SpikeGMMGuide(model, {"0.weight": 3, "2.weight": 5, "4.weight": 1}, estimator="straight_through")
    assert {name: site.loc.shape[1] for name, site in guide.site_guides().items()} == guide.num_components
    for wrong, sentence in (
        ({"0.weight": 3}, "no number for '2.weight'"),
        ({**guide.num_components, "x": 1}, "a number for what is no site, 'x'"),
        ({**guide.num_components, "4.weight": 0}, "num_components of '4.weight' is 0"),
    ):
        with pytest.raises(ArgumentError, match=sentence):
            SpikeGMMGuide(BayesianNetwork(copy.deepcopy(net)), wrong)
