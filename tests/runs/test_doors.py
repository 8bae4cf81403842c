"""From a user's network and data to a file, and back from the file, by the commands: every task there is."""

import numpy as np
import pytest
import torch

from sqs_pyro.errors import DataError, NetworkError, PackedFileError, RecipeError
from sqs_pyro.recipes import parse
from sqs_pyro.reporting.tables import evaluation_tables, run_tables
from sqs_pyro.runs.export import export_file
from sqs_pyro.runs.files import evaluate_file, file_network, inspect_file, uncertainty_file
from sqs_pyro.runs.images import run
from sqs_pyro.runs.recipe import AveragingRecipe, RunRecipe
from sqs_pyro.runs.report.pages import report_of

pytestmark = pytest.mark.usefixtures("blank_pictures")

NETS = """
from torch import nn

def rows(inputs=6, num_classes=3):
    return nn.Sequential(nn.Linear(inputs, 24), nn.ReLU(), nn.Linear(24, num_classes))

def pixels(num_classes=2):
    return nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, num_classes, 3, padding=1))

def worst_class(outputs, labels):
    right = outputs.argmax(1) == labels
    return min(float(right[labels == k].float().mean()) for k in labels.unique())

def largest_error(outputs, values):
    return (outputs - values).abs().max()

largest_error.higher_is_better = False
"""
N = 240


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a user's networks and data."""
    directory = tmp_path_factory.mktemp("doors")
    (directory / "nets.py").write_text(NETS)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 6)).astype("float32")
    score = x @ rng.normal(size=(6, 4))
    np.savez(directory / "classification.npz", x=x, y=score[:, :3].argmax(1))
    np.savez(directory / "multilabel.npz", x=x, y=(score > 0.5).astype(int))
    header = [*"abcdef", "value"]
    lines = np.column_stack([x, 50 + 20 * score[:, 0]])
    np.savetxt(directory / "regression.csv", lines, delimiter=",", header=",".join(header), comments="")
    images, labels = rng.normal(size=(N, 1, 8, 8)).astype("float32"), np.zeros((N, 8, 8), int)
    images[:, :, 2:6, 2:6] += 3
    labels[:, 2:6, 2:6], labels[:, 0, 0] = 1, 255
    np.savez(directory / "segmentation.npz", x=images, y=labels)
    return directory


FIGURES = {
    "classification": "accuracy",
    "multilabel": "average_precision",
    "regression": "r2",
    "segmentation": "mean_iou",
}


def recipe(task, place, **sections):
    name = "pixels" if task == "segmentation" else "rows"
    ending = "csv" if task == "regression" else "npz"
    values = {
        "network": {"name": f"{place}/nets.py:{name}"},
        "data": {
            "name": f"{task}.{ending}",
            "root": str(place),
            "task": task,
            "batch_size": 32,
            "ignore_index": 255,
        },
        "baseline": {"epochs": 12, "learning_rate": 0.05, "warmup": 0},
        "compression": {"epochs": 6, "num_components": 4, "learning_rate": 0.02, "nonzero_rate": 0.6},
        "bounds": False,
    }
    return parse(RunRecipe, {**values, **sections})


@pytest.mark.parametrize(
    "task",
    [
        "classification",
        *(pytest.param(task, marks=pytest.mark.slow) for task in FIGURES if task != "classification"),
    ],
)
def test_from_network_and_data_to_a_file_and_back(task, place, tmp_path):
    of = recipe(task, place)
    metrics = run(of, tmp_path / "run")
    figure = FIGURES[task]
    assert metrics["baseline"][figure] > 0.6 and metrics["compressed"][figure] > 0.5
    assert metrics[f"{figure}_drop"] == metrics["baseline"][figure] - metrics["compressed"][figure]
    # From the file: by whoever names the code, and by nobody else.
    evaluation = evaluate_file(tmp_path / "run", network=of.network.name)
    assert {key: evaluation[key] for key in metrics["compressed"]} == pytest.approx(metrics["compressed"])
    with pytest.raises(PackedFileError, match="built by code of its user"):
        evaluate_file(tmp_path / "run")
    kept = inspect_file(tmp_path / "run", runtime=True, network=of.network.name)
    assert kept["metadata"]["data"]["inputs"] == ([*"abcdef"] if task == "regression" else ["x"])
    assert len(kept["runtime"]["weights"]) == 2
    exported = export_file(
        tmp_path / "run/packed.safetensors", "dense", tmp_path / "dense.safetensors", network=of.network.name
    )
    assert exported["max_difference"] < 1e-5 and exported["example"] == "first test examples"


@torch.no_grad()
def test_the_file_tells_how_to_use_the_network_elsewhere(place, tmp_path):
    of = recipe("regression", place)
    metrics = run(of, tmp_path / "run")
    about = inspect_file(tmp_path / "run")["metadata"]["data"]
    net = file_network(tmp_path / "run", of.network.name)
    lines = np.loadtxt(place / "regression.csv", delimiter=",", skiprows=1)
    x = (torch.tensor(lines[:, :6]) - torch.tensor(about["input_mean"])) / torch.tensor(about["input_std"])
    found = net(x.float())[:, 0].double() * about["target_std"][0] + about["target_mean"][0]
    error = (found - torch.tensor(lines[:, 6])).square().mean().sqrt()
    assert float(error) == pytest.approx(metrics["compressed"]["rmse"], rel=0.3)  # of all examples, not the test's
    assert float(error) < 0.6 * lines[:, 6].std()


def test_classes_are_counted_where_the_recipe_does_not_say_them(place, tmp_path):
    run(recipe("multilabel", place), tmp_path / "run")
    spec = inspect_file(tmp_path / "run")["metadata"]["network"]
    assert spec["options"] == {"num_classes": 4}


@pytest.mark.parametrize(
    ("task", "sections", "error", "sentence"),
    [
        (
            "regression",
            {"averaging": {}},
            RecipeError,
            "'averaging' is for classes, but the data's task is regression",
        ),
        (
            "classification",
            {"compression": {"target_ratio": 30}},
            RecipeError,
            "target_ratio=30 asks for a file of .* go to what is not compressed",
        ),
        ("classification", {"network": {"name": "nowhere.py:net"}}, RecipeError, "'nowhere.py' is not there"),
        (
            "classification",
            {"network": {"name": "digits_net"}},
            NetworkError,
            r"does not take inputs of shape \(6,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_training(task, sections, error, sentence, place, tmp_path):
    with pytest.raises(error, match=sentence):
        run(recipe(task, place, **sections), tmp_path / "run")
    assert not (tmp_path / "run").exists() and not (tmp_path / "baselines").exists()


def test_uncertainty_is_told_of_classifiers(place, tmp_path):
    of = recipe("regression", place)
    run(of, tmp_path / "run")
    with pytest.raises(DataError, match="is of regression, but uncertainty is told of classifiers"):
        uncertainty_file(tmp_path / "run", network=of.network.name)


def with_metric(task, place, metric):
    of = recipe(task, place)
    return of.model_copy(update={"data": of.data.model_copy(update={"metric": f"{place}/nets.py:{metric}"})})


OWN = [("classification", "worst_class", "accuracy"), ("regression", "largest_error", "r2")]


@pytest.mark.parametrize(("task", "metric", "usual"), OWN)
def test_a_metric_is_told_beside_the_task_s_figures(task, metric, usual, place, tmp_path):
    of = with_metric(task, place, metric)
    name = of.data.metric
    metrics = run(of, tmp_path / "run")
    before, after = metrics["baseline"][name], metrics["compressed"][name]
    lost = before - after if task == "classification" else after - before  # of an error less is better
    assert metrics[f"{name}_drop"] == pytest.approx(lost)
    assert metrics[f"{usual}_drop"] == metrics["baseline"][usual] - metrics["compressed"][usual]

    told = report_of([tmp_path / "run"])
    text = told.tables.text(160)
    for said in (text, told.page):
        assert metric in said and f"{before:.4f}" in said and f"{after:.4f}" in said
    assert f"{before:.4f} → {after:.4f}" in told.page
    compared = report_of([tmp_path / "run", tmp_path / "run/../run"])
    assert metric in compared.page and metric in compared.tables.text(160)

    # Its code is only run where a user names it: in a recipe, not in the file.
    with pytest.raises(RecipeError, match=r"judged by code of its user, .*: give --data with a recipe"):
        evaluate_file(tmp_path / "run", network=of.network.name)
    found = evaluate_file(tmp_path / "run", network=of.network.name, data_from=tmp_path / "run/recipe.yaml")
    assert found[name] == pytest.approx(after) and found["metric"]["name"] == name
    assert metric in evaluation_tables(found).text(160)


def test_a_metric_that_is_none_is_told_before_training(place, tmp_path):
    with pytest.raises(RecipeError, match=r"Metric .* is not there: .* has no 'best_class'; did you mean"):
        run(with_metric("classification", place, "best_class"), tmp_path / "run")
    assert not (tmp_path / "run").exists() and not (tmp_path / "baselines").exists()


def test_averages_stand_beside_a_metric(place, tmp_path):
    of = with_metric("classification", place, "worst_class")
    averaged = of.model_copy(update={"averaging": AveragingRecipe(samples=2)})
    metrics = run(averaged, tmp_path / "run")
    row = next(line for line in run_tables(metrics).text(160).splitlines() if line.startswith("worst_class"))
    assert row.split()[-1] == "-" and "worst_class" in report_of([tmp_path / "run"]).page
