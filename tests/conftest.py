import os
import random

import hypothesis
import numpy as np
import pyro
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is no directory is refused at once, not looked for
pytest.register_assert_rewrite("kits")  # what only these tests share lives in tests/kits: `kits.<name>`

# The same cases on every machine: a failure found once can be found again.
hypothesis.settings.register_profile("sqs", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("few", parent=hypothesis.settings.get_profile("sqs"), max_examples=40)
hypothesis.settings.load_profile("sqs")


#: They compile, or wait for what does: begun last, they would run alone.
_FIRST = ("test_native.py::test_other_instruction_sets", "test_fuzz.py", "test_blocks_on_ranks.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not any(name in item.nodeid for name in _FIRST))


@pytest.fixture(autouse=True)
def clean_pyro():
    """Each test starts from an empty parameter store and the same seed, with every validation on."""
    pyro.clear_param_store()
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  as pyro.set_rng_seed does
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():  # torch.manual_seed would note where it was called from, which takes longer
        torch.cuda.manual_seed_all(0)
    pyro.enable_validation(True)
    yield
    pyro.clear_param_store()


@pytest.fixture
def blank_pictures():
    from kits.pictures import blank

    with blank():
        yield


SMALL_RECIPE = {
    "name": "small",
    "network": {"name": "digits_net", "options": {"width": 8}},
    "data": {"name": "digits"},
    "baseline": {"epochs": 3},
    "compression": {"epochs": 3, "nonzero_rate": 0.3, "num_components": 4, "batch_norm_batches": 4},
    "averaging": {"samples": 3, "pack": True},
}


@pytest.fixture(scope="session")
def small_recipe():
    """A whole run in seconds: it learns little, but takes every step of a long one."""
    from sqs_pyro.recipes import parse
    from sqs_pyro.runs.recipe import RunRecipe

    return parse(RunRecipe, SMALL_RECIPE)


@pytest.fixture(scope="session")
def small_run(small_recipe, tmp_path_factory):
    """Directory of a finished run of `small_recipe`; its baseline is kept in `baselines` beside it."""
    from kits.pictures import unpainted

    from sqs_pyro.runs.images import run

    directory = tmp_path_factory.mktemp("small") / "run"
    with unpainted():
        run(small_recipe, directory)
    return directory


@pytest.fixture(scope="session")
def tiny_language_recipe(tmp_path_factory):
    """A run of a language model in seconds, with its checkpoint, tokenizer and texts on disk."""
    from kits.language_checkpoint import recipe_values

    from sqs_pyro.recipes import parse
    from sqs_pyro.runs.language_model_recipe import LanguageModelRecipe

    return parse(LanguageModelRecipe, recipe_values(tmp_path_factory.mktemp("language")))


@pytest.fixture(scope="session")
def tiny_language_run(tiny_language_recipe, tmp_path_factory):
    """Directory of a finished run of `tiny_language_recipe`."""
    from kits.pictures import unpainted

    from sqs_pyro.runs.language_model import run

    directory = tmp_path_factory.mktemp("language_run") / "run"
    with unpainted():
        run(tiny_language_recipe, directory)
    return directory


@pytest.fixture(scope="session")
def tiny_task_recipe(tmp_path_factory):
    """A run on a task in seconds, with its checkpoint, tokenizer and texts on disk."""
    from kits.task_checkpoint import classification_values

    from sqs_pyro.runs.kinds import parse_any_recipe

    values = classification_values(tmp_path_factory.mktemp("task"), rows=64)
    values["baseline"]["epochs"] = 1
    return parse_any_recipe(values)


@pytest.fixture(scope="session")
def tiny_task_run(tiny_task_recipe, tmp_path_factory):
    """Directory of a finished run of `tiny_task_recipe`; its fine-tuned network is in `baselines` beside it."""
    from kits.pictures import unpainted

    from sqs_pyro.runs.task import run

    directory = tmp_path_factory.mktemp("task_run") / "run"
    with unpainted():
        run(tiny_task_recipe, directory)
    return directory
