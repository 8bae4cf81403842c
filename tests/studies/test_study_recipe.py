"""Studies are expanded into cells, and everything that is wrong with one is said before anything runs."""

from pathlib import Path

import pytest
import yaml

from sqs_pyro.errors import RecipeError
from sqs_pyro.recipes import parse
from sqs_pyro.runs.recipe import RunRecipe, load_recipe
from sqs_pyro.studies.recipe import StudyRecipe, cells, load_study, point_label

RECIPES = Path(__file__).parents[2] / "recipes"
BASE = {"network": {"name": "digits_net"}, "data": {"name": "digits"}, "compression": {"epochs": 2}}


def _study(**changes):
    return parse(StudyRecipe, {"name": "study", "base": BASE, **changes})


def test_cells_are_seeds_times_variants_times_points():
    study = _study(
        seeds=[0, 5],
        grid={"compression.nonzero_rate": [0.1, 0.2], "compression.num_components": [2, 4, 8]},
        variants={"a": {}, "b": {"set": {"compression.kl_weight": 0.5}}},
    )
    found = cells(study)
    assert len(found) == 2 * 2 * 2 * 3
    assert [cell.seed for cell in found] == [0] * 12 + [5] * 12
    assert {cell.recipe.compression.kl_weight for cell in found if cell.variant == "b"} == {0.5}
    for cell in found:
        assert cell.recipe.seed == cell.recipe.baseline.seed == cell.seed
        assert cell.recipe.compression.epochs == 2
        assert cell.recipe.compression.nonzero_rate == cell.values["compression.nonzero_rate"]
        assert cell.recipe.compression.num_components == cell.values["compression.num_components"]
    assert len({cell.directory for cell in found}) == len(found)


def test_without_variants_the_base_is_the_variant():
    (cell,) = cells(_study())
    assert (cell.variant, cell.values, cell.recipe.name) == ("study", {}, "study")
    assert cell.recipe.compression == parse(RunRecipe, BASE).compression


def test_a_variant_has_its_own_grid_or_none():
    study = _study(
        grid={"compression.num_components": [2, 4]},
        variants={"shared": {}, "own": {"grid": {"compression.kl_weight": [0.1]}}, "none": {"grid": {}}},
    )
    assert [(cell.variant, cell.values) for cell in cells(study)] == [
        ("shared", {"compression.num_components": 2}),
        ("shared", {"compression.num_components": 4}),
        ("own", {"compression.kl_weight": 0.1}),
        ("none", {}),
    ]


def test_names_of_layers_may_have_dots():
    key = 'compression.layers."layer3.*".num_components'
    found = cells(
        _study(
            grid={key: [2, 4]},
            variants={"a": {"set": {"compression": {"layers": {"layer1.0.conv1": {"skip": True}}}}}},
        )
    )
    for cell, components in zip(found, (2, 4), strict=True):
        given = {pattern: own.given for pattern, own in cell.recipe.compression.layers.items()}
        assert given == {"layer1.0.conv1": {"skip": True}, "layer3.*": {"num_components": components}}
        assert point_label(cell.values) == f"num_components={components}"


def test_dotted_and_nested_changes_are_the_same_and_keep_the_rest():
    dotted, nested = cells(
        _study(
            variants={
                "dotted": {"set": {"compression.prior.inclusion": 0.2, "compression.windows.count": 9}},
                "nested": {"set": {"compression": {"prior": {"inclusion": 0.2}, "windows": {"count": 9}}}},
            }
        )
    )
    assert dotted.recipe.compression == nested.recipe.compression
    assert nested.recipe.compression.epochs == 2
    assert nested.recipe.compression.prior.inclusion == 0.2


def test_labels_of_points_are_short_where_they_can_be():
    assert point_label({"compression.kl_weight": 0.1, "seedless.rate": 2}) == "kl_weight=0.1, rate=2"
    assert (
        point_label({"compression.epochs": 1, "baseline.epochs": 2}) == "compression.epochs=1, baseline.epochs=2"
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"varaints": {}}, "'varaints' is unknown: allowed here are .* did you mean 'variants'?"),
        ({"variants": {"a": {"sett": {}}}}, "'variants.a.sett' is unknown: .* did you mean 'set'?"),
        (
            {"variants": {"a": {"set": {"compression.kl_wait": 1}}}},
            "Variant 'a': Recipe key 'compression.kl_wait'",
        ),
        (
            {"variants": {"a": {"set": {"compression.kl_weight": -1}}}},
            "Variant 'a': .*'compression.kl_weight' is -1",
        ),
        ({"variants": {"a": {"set": {"compression": 3}}}}, "Variant 'a': Recipe key 'compression' is 3"),
        ({"variants": {"a": {"set": {"seed": 3}}}}, "changes 'seed', which is given in the study's `seeds`"),
        ({"grid": {"name": ["b"]}}, "changes 'name', which is given by the variants' labels"),
        ({"grid": {"compression.nonzero_rate": []}}, "'grid.compression.nonzero_rate' is empty: give a list"),
        ({"grid": {"compression.nonzero_rate": [0.1, 0.1]}}, "has the value 0.1 twice"),
        ({"grid": {"compression.nonzero_rate": 0.1}}, "'grid.compression.nonzero_rate' is 0.1, but should be a"),
        ({"grid": {"compression.nonzero_rate": [2]}}, r"Variant 'study \(nonzero_rate=2\)': .*but should be less"),
        (
            {"variants": {"a": {}, "b": {"set": {"compression.kl_weight": 2}}}, "reference": "c"},
            "'reference' is 'c', which is no variant: take one of a, b",
        ),
        ({"seeds": []}, "'seeds' is empty"),
        ({"seeds": [1, 1]}, "'seeds' has the value 1 twice"),
        ({"seeds": [-1]}, "'seeds.0' is -1"),
        ({"base": {**BASE, "compresion": {}}}, "'base.compresion' is unknown"),
        ({"base": {"data": {"name": "digits"}}}, "'base.network' is missing: add it"),
        ({"variants": {"K=4": {}, "k=4": {}}}, "would have the same directory 'k=4-seed0'"),
        (
            {"variants": {"a (b=1)": {}, "a": {"grid": {"network.options.b": [1]}}}},
            "would have the same directory",
        ),
        (
            {"grid": {"compression.kl_weight": [1]}, "variants": {"a": {"set": {"compression.kl_weight": 2}}}},
            "has 'compression.kl_weight' both in `set` and in its grid",
        ),
        ({"name": ""}, "'name' is '', but should"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(tmp_path, changes, sentence):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"name": "study", "base": BASE, "seeds": [0], **changes}))
    with pytest.raises(RecipeError, match=sentence):
        load_study(path)


def test_a_label_given_twice_is_an_error(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("name: s\nbase: {}\nvariants: {a: {}, a: {}}\n")
    with pytest.raises(RecipeError, match="'a' is given twice"):
        load_study(path)


def test_the_base_may_be_a_file_beside_the_study(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE))
    path = tmp_path / "study.yaml"
    path.write_text("name: study\nbase: run.yaml\nvariants: {a: {set: {compression.kl_weight: 0.5}}}\n")
    study = load_study(path, ["seeds=[3, 4]", "base.compression.epochs=7"])
    assert [cell.seed for cell in cells(study)] == [3, 4]
    assert {cell.recipe.compression.epochs for cell in cells(study)} == {7}
    path.write_text("name: study\nbase: other.yaml\n")
    with pytest.raises(RecipeError, match=r"other.yaml' is not there"):
        load_study(path)


def test_the_recipe_of_a_run_is_a_study_of_one_variant(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**BASE, "seed": 7}))
    (cell,) = cells(load_study(path))
    assert (cell.seed, cell.variant) == (7, "run")
    assert cell.recipe == load_recipe(path, ["name=run"])


def test_written_back_it_is_the_same_study(tmp_path):
    study = _study(seeds=[1, 2], grid={"compression.kl_weight": [0.1]}, variants={"a": {"grid": {}}, "b": {}})
    path = tmp_path / "study.yaml"
    path.write_text(study.as_yaml())
    assert load_study(path) == study


def _shipped():
    return [path for path in sorted(RECIPES.glob("*.yaml")) if "base" in yaml.safe_load(path.read_text())]


@pytest.mark.parametrize("path", _shipped(), ids=lambda path: path.name)
def test_shipped_studies_are_valid_and_share_baselines(path):
    study = load_study(path)
    assert study.name == path.stem
    found = cells(study)
    assert len({cell.recipe.baseline_key for cell in found}) <= len(study.seeds)
    recipes = [cell.recipe.model_dump_json(exclude={"name"}) for cell in found]
    assert len(set(recipes)) == len(recipes)  # no variant is another one under a second name


def test_studies_compare_accuracies():
    base = {**BASE, "network": {"name": "nets.py:net"}, "data": {"name": "a.csv", "task": "regression"}}
    study = StudyRecipe(name="study", base=base)
    with pytest.raises(RecipeError, match=r"'base.data.task' is regression, but studies compare accuracies"):
        cells(study)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ({"task": "embedding", "network": {"path": "net"}}, "is embedding, but studies compare accuracies"),
        (
            {"task": "classification", "network": {"path": "net"}, "data": {"glue": "stsb"}},
            "is classification of numbers, but studies compare accuracies",
        ),
    ],
)
def test_tasks_without_accuracy_are_refused(base, said):
    pytest.importorskip("transformers")
    with pytest.raises(RecipeError, match=said):
        cells(StudyRecipe(name="study", base=base))
