"""Every kind of runs keeps the contract of :mod:`sqs_pyro.testing.run_kinds`; a new one is found by its key."""

import shutil

import pytest
from kits import forks

from sqs_pyro.errors import RecipeError
from sqs_pyro.networks.registry import build_network
from sqs_pyro.runs import kinds
from sqs_pyro.runs.images import Images
from sqs_pyro.testing.run_kinds import RunKindContract


class TestImages(RunKindContract):
    kind = Images

    @pytest.fixture(scope="class")
    @classmethod
    def finished(cls, small_recipe, small_run):
        return small_recipe, small_run

    @classmethod
    def options(cls, directory):
        return {"baselines_dir": directory.parent / "baselines"}

    def constructed(self, recipe):
        return build_network(recipe.network.name, **recipe.network.options)


@pytest.mark.slow
class TestSearches(TestImages):
    stage, checkpoint = "try 2", "blocks/attempt-2.pt"

    @pytest.fixture(scope="class")
    @classmethod
    def finished(cls, small_recipe, small_run, tmp_path_factory):
        values = small_recipe.model_dump(mode="json")
        values["search"] = {"points": 20, "first_ratio": 8, "attempts": 2}
        values["compression"] |= {"layout": "auto", "target_ratio": None}
        recipe = small_recipe.model_validate(values)
        out = tmp_path_factory.mktemp("search") / "run"
        Images().run(recipe, out, baselines_dir=small_run.parent / "baselines")
        shutil.copytree(small_run.parent / "baselines", out.parent / "baselines")
        return recipe, out


class TestLanguageModels(RunKindContract):
    @property
    def kind(self):
        return pytest.importorskip("sqs_pyro.runs.language_model").LanguageModels

    @pytest.fixture(scope="class")
    @classmethod
    def finished(cls, tiny_language_recipe, tiny_language_run):
        return tiny_language_recipe, tiny_language_run

    def constructed(self, recipe):
        transformers = pytest.importorskip("transformers")
        return transformers.AutoModelForCausalLM.from_pretrained(recipe.network.path)

    def figures(self, document):
        return {f"{text} {key}": value for text, each in document.items() for key, value in each.items()}


@pytest.mark.slow
class TestBitSearches(TestLanguageModels):
    stage = "try 2"

    @pytest.fixture(scope="class")
    @classmethod
    def finished(cls, tiny_language_recipe, tmp_path_factory):
        values = tiny_language_recipe.model_dump(mode="json")
        values["search"] = {"points": 2, "attempts": 2}
        values["evaluation"] |= {"tokens": 200}
        recipe = type(tiny_language_recipe).model_validate(values)
        out = tmp_path_factory.mktemp("bits") / "run"
        cls.kind.fget(cls)().run(recipe, out)
        return recipe, out


class TestTasks(RunKindContract):
    @property
    def kind(self):
        return pytest.importorskip("sqs_pyro.runs.task").Tasks

    @pytest.fixture(scope="class")
    @classmethod
    def finished(cls, tiny_task_recipe, tiny_task_run):
        return tiny_task_recipe, tiny_task_run

    @classmethod
    def options(cls, directory):
        return {"baselines_dir": directory.parent / "baselines"}

    def constructed(self, recipe):
        transformers = pytest.importorskip("transformers")
        from sqs_pyro.networks.task_networks import task_network

        net = transformers.AutoModelForSequenceClassification.from_pretrained(recipe.network.path, num_labels=2)
        return task_network(net, recipe.task)


_OWN = """
from sqs_pyro.runs import kinds


class Graphs(kinds.RunKind):
    recipe = kinds.WholeRecipe
    said = "a recipe of a graph"

    def run(self, recipe, out_dir, **options): ...
    def evaluate(self, file, **options): ...
    def example(self, net, file): ...
    def input_form(self, net, file, image_shape, lengths): ...


kinds.register_kind("graph", "own_kind:Graphs")
"""


def test_a_kind_of_ones_own_is_one_file_and_one_registration(tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_kind.py").write_text(_OWN)
    import own_kind

    assert type(kinds.kind_of({"graph": 1})) is own_kind.Graphs and len(kinds.kinds()) == 4
    kinds.register_kind("graph", "own_kind:Graphs")
    with pytest.raises(RecipeError, match=r"the key 'graph' are of the kind own_kind:Graphs: choose another key"):
        kinds.register_kind("graph", "another:Graphs")
    with pytest.raises(
        RecipeError, match="but this is a recipe of a graph: give a recipe with the key 'blockwise'"
    ):
        kinds.kind_of({"graph": 1}).plan(None)


def test_a_kind_is_imported_when_it_is_met():
    command = "import sys, sqs_pyro.runs.kinds as kinds; kinds.kind_of({'network': 1}); "
    check = "assert not {'sqs_pyro.runs.task', 'sqs_pyro.runs.language_model', 'transformers'} & set(sys.modules)"
    assert forks.run(command + check).returncode == 0


@pytest.mark.parametrize("document", [None, 3, "text", ["blockwise"], {}])
def test_what_is_no_recipe_is_told_as_one_of_images(document):
    with pytest.raises(RecipeError, match=r"must be a mapping|'network' is missing"):
        kinds.parse_any_recipe(document)
