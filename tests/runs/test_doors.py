"""From a user's network and data to a file, and back from the file, by the commands: every task there is."""

import numpy as np
import pytest
import torch

from sqs_pyro.errors import DataError, NetworkError, PackedFileError, RecipeError
from sqs_pyro.recipes import parse
from sqs_pyro.runs.export import export_file
from sqs_pyro.runs.files import evaluate_file, file_network, inspect_file, uncertainty_file
from sqs_pyro.runs.images import run
from sqs_pyro.runs.recipe import RunRecipe

pytestmark = pytest.mark.usefixtures("blank_pictures")

NETS = """
from torch import nn

def rows(inputs=6, num_classes=3):
    return nn.Sequential(nn.Linear(inputs, 24), nn.ReLU(), nn.Linear(24, num_classes))

def pixels(num_classes=2):
    return nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, num_classes, 3, padding=1))
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


@pytest.mark.parametrize("task", FIGURES)
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
