"""Settings of single layers by pattern: which counts, and what is refused."""

import fnmatch

import pytest

from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.compression.layers import check_layers, of_layer
from sqs_pyro.errors import RecipeError
from sqs_pyro.recipes import parse

NAMES = ["conv1.weight", "layer1.0.conv1.weight", "layer3.0.conv1.weight", "layer3.1.conv2.weight", "fc.weight"]
SCHEDULE = {"allocation": "schedule"}
LEARNED = {"allocation": "rate_distortion", "prior": {"kind": "learned"}}


def layers(given):
    return CompressionRecipe(layers=given).layers


def test_of_each_setting_the_last_pattern_counts_that_matches():
    given = {
        "*": {"num_components": 8},
        "layer3.*": {"num_components": 4, "nonzero_rate": 0.5},
        "layer3.1.*": {"nonzero_rate": 0.25},
        "fc": {"skip": True},
        "conv1.weight": {"num_components": 2},
    }
    for name in NAMES:
        expected = {}
        for pattern, own in given.items():
            if any(fnmatch.filter([name, name.removesuffix(".weight")], pattern)):
                expected.update(own)
        assert of_layer(layers(given), name) == expected, name
    assert of_layer(layers(given), "layer3.1.conv2") == {"num_components": 4, "nonzero_rate": 0.25}
    check_layers(layers(given), NAMES, "compression.layers")


def test_what_is_skipped_can_be_taken_back():
    given = layers({"layer*": {"skip": True}, "layer3.*": {"skip": False}})
    check_layers(given, NAMES, "compression.layers")
    assert [of_layer(given, name).get("skip") for name in NAMES] == [None, True, False, False, None]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"conv9": {"skip": True}},
            r"'conv9', which no layer .* \(they are conv1, layer1.0.conv1, .*fc\): did you",
        ),
        ({"x.*": {"skip": True}}, r"the pattern 'x\.\*', which no layer .* matches .*: correct or remove it"),
        (
            {"fc": {"nonzero_rate": 0.2}, "*": {"nonzero_rate": 0.5}},
            "nonzero_rate for the pattern 'fc', which has no",
        ),
        (
            {"fc": {"num_components": 2}, "f?": {"skip": True}},
            "num_components for the pattern 'fc', which has no ef",
        ),
        ({"*": {"skip": True}}, "'compression.layers' leaves all layers uncompressed"),
    ],
)
def test_patterns_that_say_nothing_are_refused(given, sentence):
    with pytest.raises(RecipeError, match=sentence):
        check_layers(layers(given), NAMES, "compression.layers")


def test_of_many_layers_some_are_named():
    names = [f"blocks.{i}.mlp" for i in range(40)]
    with pytest.raises(RecipeError, match=r"\(they are blocks\.0\.mlp, .*blocks\.11\.mlp and 28 more\)"):
        check_layers(layers({"head": {"skip": True}}), names, "compression.layers")


@pytest.mark.parametrize(
    ("section", "given", "sentence"),
    [
        (SCHEDULE, {"fc": {}}, r"'compression.layers.fc' is \{\}, but should be at least one of skip, num_comp"),
        (SCHEDULE, {"fc": {"skip": True, "num_components": 2}}, "should be skip: true alone"),
        (SCHEDULE, {"fc": {"skp": True}}, "'compression.layers.fc.skp' is unknown.*did you mean 'skip'"),
        (SCHEDULE, {"fc": {"num_components": 300}}, "'compression.layers.fc.num_components' is 300"),
        (SCHEDULE, {"fc": {"bits": 3}}, "'compression.layers.fc.bits' is unknown"),
        (
            LEARNED,
            {"fc": {"nonzero_rate": 0.3}},
            r"no nonzero_rate in layers \('fc' has 0.3\) beside allocation 'ra",
        ),
        ({"layout": "dense"}, {"fc": {"num_components": 256}}, "at most 255 beside layout 'dense', not 256"),
    ],
)
def test_settings_that_do_not_apply_are_refused(section, given, sentence):
    with pytest.raises(RecipeError, match=sentence):
        parse(CompressionRecipe, {**section, "layers": given}, "compression")


def test_blocks_have_bits_and_no_components():
    recipe = parse(BlockwiseRecipe, {"layers": {"*.down_proj": {"bits": 4}, "model.layers.0.*": {"skip": True}}})
    assert (
        recipe.bits_of("model.layers.1.mlp.down_proj") == 4
        and recipe.bits_of("model.layers.1.mlp.up_proj") is None
    )
    assert recipe.skips("model.layers.0.mlp.down_proj") and not recipe.skips("model.layers.1.mlp.down_proj")
    with pytest.raises(RecipeError, match=r"'blockwise\.layers\.fc.num_components' is unknown"):
        parse(BlockwiseRecipe, {"layers": {"fc": {"num_components": 4}}}, "blockwise")
