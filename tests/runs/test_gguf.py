"""Language models in GGUF files: the same run as of the checkpoint with the same weights."""

import sys

import pytest

from sqs_pyro.errors import MissingPackageError, NetworkError, RecipeError
from sqs_pyro.integrations.pretrained import find_pretrained
from sqs_pyro.integrations.pretrained_recipe import PretrainedRecipe
from sqs_pyro.recipes import parse
from sqs_pyro.runs.files import evaluate_file, inspect_file
from sqs_pyro.runs.front.asked import asked_recipe
from sqs_pyro.runs.kinds import kind_of
from sqs_pyro.runs.recipe import Goal


@pytest.fixture(scope="module")
def gguf_file(tiny_language_recipe, tmp_path_factory):
    pytest.importorskip("gguf")
    import transformers
    from kits.gguf_file import write_gguf

    net = transformers.AutoModelForCausalLM.from_pretrained(tiny_language_recipe.network.path)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", net)


def test_a_path_may_be_a_file():
    for path in ("models/tiny.gguf", "models/tiny.GGUF"):
        recipe = parse(PretrainedRecipe, {"path": path})
        assert (recipe.path, recipe.gguf_file) == ("models", path.partition("/")[2])
        assert parse(PretrainedRecipe, recipe.model_dump(mode="json")) == recipe
    recipe = asked_recipe("tiny.gguf", None, Goal(bits=3.0))
    assert (recipe.network.path, recipe.network.gguf_file, recipe.blockwise.bits) == (".", "tiny.gguf", 3.0)
    with pytest.raises(RecipeError, match=r"--task is for other networks"):
        asked_recipe("tiny.gguf", None, Goal(bits=3.0), task="regression")
    with pytest.raises(RecipeError, match=r"in the GGUF file 'tiny\.gguf'"):
        kind_of(recipe).plan(recipe)


def test_the_package_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(MissingPackageError, match=r"GGUF files need the package 'gguf', .*sqs-pyro\[gguf\]"):
        find_pretrained(PretrainedRecipe(path=str(tmp_path / "tiny.gguf")))
    with pytest.raises(NetworkError, match=r"GGUF file 'other\.gguf' is not in"):
        find_pretrained(PretrainedRecipe(path=str(tmp_path / "other.gguf")))


@pytest.mark.usefixtures("blank_pictures")
def test_a_run_is_that_of_the_checkpoint(gguf_file, tiny_language_recipe, tiny_language_run, tmp_path):
    values = {**tiny_language_recipe.model_dump(mode="json"), "network": {"path": str(gguf_file)}}
    recipe = parse(type(tiny_language_recipe), values)
    metrics = kind_of(recipe).run(recipe, tmp_path / "run")
    of_checkpoint = evaluate_file(tiny_language_run)["perplexity"]
    for name, expected in of_checkpoint.items():
        assert metrics["compressed"][name]["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    kept = gguf_file.rename(tmp_path / "away.gguf")  # what the run has written stands alone
    try:
        beside = tmp_path / "run" / "hugging_face"
        assert evaluate_file(beside)["perplexity"] == metrics["compressed"]
        inside, file = (inspect_file(path)["size"]["num_weights"] for path in (beside, tmp_path / "run"))
        assert inside == file
    finally:
        kept.rename(gguf_file)
    assert evaluate_file(tmp_path / "run")["perplexity"] == metrics["compressed"]


def test_what_cannot_be_read_is_one_sentence(gguf_file, tiny_language_recipe, tmp_path):
    import transformers
    from kits.gguf_file import write_gguf

    net = transformers.AutoModelForCausalLM.from_pretrained(tiny_language_recipe.network.path)
    write_gguf(tmp_path / "odd.gguf", net, architecture="unheard")
    (tmp_path / "cut.gguf").write_bytes(gguf_file.read_bytes()[:5000])
    (tmp_path / "no.gguf").write_bytes(b"nothing of the kind")
    for name in ("odd", "cut", "no"):
        with pytest.raises(NetworkError, match=rf"configuration of '{name}\.gguf' in .* cannot be loaded \(.+\)"):
            find_pretrained(PretrainedRecipe(path=str(tmp_path / f"{name}.gguf")))
