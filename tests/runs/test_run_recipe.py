"""Recipes of runs: read, changed, checked, written back whole."""

import pytest
import torch
import yaml

from sqs_pyro.errors import RecipeError
from sqs_pyro.recipes import parse
from sqs_pyro.runs.bookkeeping import chosen_device
from sqs_pyro.runs.recipe import RunRecipe, load_recipe

SMALL = "network: {name: digits_net}\ndata: {name: digits}\n"


@pytest.fixture
def recipe_file(tmp_path):
    def write(text=SMALL):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_written_back_whole_it_is_the_same_recipe(recipe_file):
    recipe = load_recipe(recipe_file(SMALL + "seed: 3\ncompression: {nonzero_rate: 0.1}\n"))
    text = recipe.as_yaml()
    assert parse(RunRecipe, yaml.safe_load(text)) == recipe
    assert "num_components: 16" in text  # a default that the file does not mention


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("compression.nonzero_rate=0.125", 0.125),
        ("compression.nonzero_rate=1e-1", 0.1),
        ("compression.exclude=['^fc']", ("^fc",)),
        ("compression.windows.kind=outlier_aware", "outlier_aware"),
        ("network.options.width=8", 8),
        ("averaging={}", 20),
    ],
)
def test_one_key_can_be_changed(recipe_file, change, value):
    recipe = load_recipe(recipe_file(), [change])
    found = {
        "compression.nonzero_rate": recipe.compression.nonzero_rate,
        "compression.exclude": recipe.compression.exclude,
        "compression.windows.kind": recipe.compression.windows.kind,
        "network.options.width": recipe.network.options.get("width"),
        "averaging": recipe.averaging and recipe.averaging.samples,
    }
    assert found[change.partition("=")[0]] == value


def test_the_baseline_has_the_seed_of_the_run_unless_it_is_fixed(recipe_file):
    assert load_recipe(recipe_file(), ["seed=7"]).baseline.seed == 7
    assert load_recipe(recipe_file(), ["seed=7", "baseline.seed=1"]).baseline.seed == 1
    assert load_recipe(recipe_file(), ["baseline.epochs=2"]).baseline.seed == 0


def test_the_baseline_key_changes_with_what_the_baseline_depends_on(recipe_file):
    path = recipe_file()
    key = load_recipe(path).baseline_key
    for change in ("baseline.lr=0.05", "data.batch_size=32", "network.options.width=8", "seed=1"):
        assert load_recipe(path, [change]).baseline_key != key, change
    for change in ("compression.nonzero_rate=0.5", "name=other", "averaging={}"):
        assert load_recipe(path, [change]).baseline_key == key, change
    assert load_recipe(path, ["seed=1", "baseline.seed=0"]).baseline_key == key


def test_parts_of_keys_with_dots_are_in_quotes(recipe_file):
    text = SMALL + 'compression: {layers: {"layer3.*": {num_components: 4}, fc: {skip: true}}}\n'
    changes = ['compression.layers."layer3.*".nonzero_rate=0.5', 'compression.layers."*.a=b"={skip: true}']
    layers = load_recipe(recipe_file(text), changes).compression.layers
    assert {pattern: own.given for pattern, own in layers.items()} == {
        "layer3.*": {"num_components": 4, "nonzero_rate": 0.5},
        "fc": {"skip": True},
        "*.a=b": {"skip": True},
    }


@pytest.mark.parametrize(
    ("text", "changes", "sentence"),
    [
        ("network: {name: a\n", [], r"Recipe '.*recipe.yaml' is no valid YAML"),
        ("- 1\n", [], r"the recipe must be a mapping of keys to values, but \[1\] was given"),
        (SMALL + "seed: 1\nseed: 2\n", [], "Recipe key 'seed' is given twice, again in line 4: keep one"),
        (SMALL + "compression: 3\n", [], "Recipe key 'compression' is 3"),
        (SMALL + "baseline: 3\n", [], "Recipe key 'baseline' is 3"),
        ("data: {name: digits}\n", [], "Recipe key 'network' is missing: add it"),
        (SMALL, ["seed"], "Change 'seed' should be KEY=VALUE"),
        (SMALL, ["compression..kl=1"], "Change 'compression..kl=1' should be KEY=VALUE"),
        (SMALL, ["seed=[1"], "has a value that is no valid YAML"),
        (SMALL, ["sed=1"], "Recipe key 'sed' is unknown: .*; did you mean 'seed'?"),
        (
            SMALL,
            ["data.name=digit"],
            "'data.name' is 'digit', but should be one of digits, .*; did you mean 'digits'",
        ),
    ],
)
def test_a_wrong_recipe_is_one_sentence(recipe_file, text, changes, sentence):
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(recipe_file(text), changes)


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"Recipe .*nothing.yaml. is not there"):
        load_recipe(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("name", ["cuda:99", "mps"])
def test_a_device_has_to_be_there(name):
    assert chosen_device("cpu") == torch.device("cpu")
    assert chosen_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "mps" and torch.backends.mps.is_available():
        return
    with pytest.raises(RecipeError, match=rf"'device' is '{name}', but torch .* here: give 'auto' or 'cpu'"):
        chosen_device(name)


def test_a_device_is_named_as_torch_does(recipe_file):
    assert load_recipe(recipe_file(SMALL), ["device=cuda:1"]).device == "cuda:1"
    with pytest.raises(RecipeError, match="'device' is 'gpu', but should"):
        load_recipe(recipe_file(SMALL), ["device=gpu"])
