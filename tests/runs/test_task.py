"""Runs on tasks: networks of three architectures learn, are compressed, and are what their files say."""

import json
from functools import partial

import pytest
import torch
import yaml
from kits import task_checkpoint as kit
from kits.pictures import blank

from sqs_pyro import load
from sqs_pyro.errors import NetworkError, RecipeError
from sqs_pyro.integrations import save_pretrained
from sqs_pyro.networks.task_networks import AUTO_CLASSES, task_network, transformer_in
from sqs_pyro.recipes import parse
from sqs_pyro.runs.export import export_file
from sqs_pyro.runs.files import evaluate_file
from sqs_pyro.runs.kinds import load_any_recipe, parse_any_recipe
from sqs_pyro.runs.task import run, task_text
from sqs_pyro.runs.task_recipe import TASK_RECIPES

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("blank_pictures")

FILES = {
    "packed.safetensors",
    "metrics.json",
    "recipe.yaml",
    "history.csv",
    "bits.png",
    "curves.png",
    "layers.json",
    "layers.png",
    "report.html",
    "SHA256SUMS",
}
MAKERS = {
    "bert on classes": kit.classification_values,
    "llama on classes": partial(kit.classification_values, kind="llama"),
    "qwen2 on classes": partial(kit.classification_values, kind="qwen2"),
    "bert on questions": kit.question_values,
    "bert on sentences": kit.embedding_values,
}
slow = partial(pytest.param, marks=pytest.mark.slow)  # a case that goes the way of another one


@pytest.fixture(scope="module", params=["bert on classes", slow("llama on classes"), *map(slow, list(MAKERS)[2:])])
def finished(request, tmp_path_factory):
    """Recipe and directory of a finished run."""
    directory = tmp_path_factory.mktemp("task")
    recipe = parse_any_recipe(MAKERS[request.param](directory))
    with blank():
        run(recipe, directory / "run")
    return recipe, directory / "run"


def metrics_of(directory):
    return json.loads((directory / "metrics.json").read_text())


def test_it_learns_and_stays_good_at_half_of_the_weights(finished):
    recipe, directory = finished
    metrics = metrics_of(directory)
    headline = recipe.build().headline
    least = {"accuracy": 0.95, "f1": 0.9, "cosine": 0.98}[headline]  # chance: 0.5, about 0.3, and 0.9
    assert metrics["baseline"][headline] >= least and metrics["compressed"][headline] >= least
    size = metrics["size"]
    assert size["nonzeros"] == round(0.5 * size["num_weights"])
    assert metrics["max_logit_difference"] <= 1e-5


def test_the_directory_holds_everything_and_nothing_else(finished):
    recipe, directory = finished
    assert {path.name for path in directory.iterdir()} == FILES
    assert parse_any_recipe(yaml.safe_load((directory / "recipe.yaml").read_text())) == recipe


def test_the_file_alone_is_evaluated_to_the_same(finished):
    _, directory = finished
    found, expected = evaluate_file(directory / "packed.safetensors"), metrics_of(directory)["compressed"]
    assert {key: found[key] for key in expected} == pytest.approx(expected)


@torch.no_grad()
def test_the_file_becomes_a_checkpoint_of_transformers(finished, tmp_path):
    recipe, directory = finished
    packed = load(directory / "packed.safetensors")
    save_pretrained(transformer_in(packed), tmp_path / "checkpoint")
    auto_class = getattr(transformers, AUTO_CLASSES[recipe.task])
    again = task_network(auto_class.from_pretrained(tmp_path / "checkpoint"), recipe.task)
    x, _ = next(iter(task_text(recipe).loaders().test))
    first, second = packed(**x), again(**x)
    assert torch.equal(*(each if torch.is_tensor(each) else each.logits for each in (first, second)))


@pytest.mark.slow
@pytest.mark.parametrize("maker", ["bert on questions", "llama on classes", "bert on sentences"])
def test_interrupted_it_goes_on_and_ends_in_the_same_bytes(maker, tmp_path):
    values = MAKERS[maker](tmp_path, rows=48)  # it need not have learned anything
    if "baseline" in values:
        values["baseline"]["epochs"] = 1
    values["compression"]["epochs"] = 2
    recipe, steps = parse_any_recipe(values), []
    run(recipe, tmp_path / "whole")

    def stop(stage, *told):
        steps.append(stage)
        if stage == "compression" and steps.count(stage) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run", progress=stop)
    assert not (tmp_path / "run").exists()
    run(recipe, tmp_path / "run")
    found, expected = (tmp_path / name / "packed.safetensors" for name in ("run", "whole"))
    assert found.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"task": "translation"}, RecipeError, "'translation', but should be one of classification"),
        ({"data": {"max_length": 65}}, RecipeError, r"'data.max_length' is 65, but the network takes at most 64"),
        ({"network": {"path": "nowhere"}}, NetworkError, "nowhere"),
        ({"parts": ["limbs"]}, NetworkError, "limbs"),
        ({"device": "tpu"}, RecipeError, "device"),
    ],
)
def test_what_is_wrong_is_one_sentence_before_anything_is_trained(change, error, sentence, tmp_path):
    values = kit.classification_values(tmp_path)
    for key, value in change.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    with pytest.raises(error, match=sentence):
        run(parse_any_recipe(values), tmp_path / "run")
    assert not (tmp_path / "run").exists() and not (tmp_path / "baselines").exists()


@pytest.mark.parametrize("make", [kit.question_values, kit.embedding_values])
def test_distillation_is_for_classes(make, tmp_path):
    values = make(tmp_path)
    values["compression"]["distillation"] = {}
    with pytest.raises(RecipeError, match=r"no compression\.distillation"):
        parse_any_recipe(values)


@pytest.mark.slow
def test_distillation_of_classes(tmp_path):
    values = kit.classification_values(tmp_path)
    values["compression"] |= {"distillation": {"weight": 0.5}, "epochs": 2}
    metrics = run(parse_any_recipe(values), tmp_path / "run")
    assert metrics["compressed"]["accuracy"] >= 0.95


@pytest.mark.parametrize(("name", "task"), [("bert_squad", "question_answering"), ("llama_sst2", "classification"),
                                            ("qwen_sst2", "classification")])  # fmt: skip
def test_shipped_recipes_run_on_small_data_of_the_same_form(name, task, tmp_path, pytestconfig):
    """The paper's settings, with a tiny network and rows of the same columns in place of the hub's."""
    shipped = load_any_recipe(pytestconfig.rootpath / "recipes" / f"{name}.yaml")
    assert type(shipped) is TASK_RECIPES[task]
    if task == "question_answering":
        small = kit.question_values(tmp_path, rows=64)
    else:
        small = kit.classification_values(tmp_path, name.partition("_")[0].replace("qwen", "qwen2"), rows=64)
    if task == "question_answering":
        small["network"]["path"] = str(
            kit.write_network(tmp_path / "answers", "bert", AUTO_CLASSES[task], num_labels=2)
        )
    values = shipped.model_dump(mode="json")
    values |= {"network": small["network"], "data": small["data"], "device": "cpu"}
    values["compression"]["epochs"] = 1
    metrics = run(parse(TASK_RECIPES[task], values), tmp_path / "run")
    assert metrics["nonzero_rate"] == pytest.approx(shipped.compression.nonzero_rate, abs=1e-3)


def test_its_file_is_exported_with_rows_of_its_own(finished, tmp_path):
    document = export_file(finished[1] / "packed.safetensors", "dense", tmp_path / "dense")
    assert document["example"] == "first test examples" and document["max_difference"] < 1e-3
