"""Hugging Face directories on the command line: classifiers of images as networks, and as what commands read."""

import json
import shutil

import pytest
import torch
import yaml
from kits.image_directory import COLOURS, write_directory, write_photos
from kits.pictures import unpainted
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sqs_pyro.cli import app
from sqs_pyro.errors import NetworkError
from sqs_pyro.runs.front.asked import asked_recipe
from sqs_pyro.runs.images import run
from sqs_pyro.runs.recipe import Goal

QUICK = ["compression.epochs=2", "bounds=false", "data.batch_size=8", "data.num_workers=0", "data.augment=false"]


def sqs(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A network's directory, and images."""
    root = tmp_path_factory.mktemp("directories")
    write_directory(root / "net")
    write_photos(root / "photos")
    return root


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """A run's directory, of the command."""
    out = tmp_path_factory.mktemp("finished") / "run"
    changes = [word for change in QUICK for word in ("--set", change)]
    with unpainted():
        result = sqs("compress", place / "net", place / "photos", "--ratio", 3, "--out", out, *changes)
    assert result.exit_code == 0, result.output
    return out


def test_a_directory_and_images_are_enough(place):
    recipe = asked_recipe(str(place / "net"), str(place / "photos"), Goal(ratio=5))
    assert recipe.network.name == str(place / "net") and recipe.baseline.trained
    assert (recipe.data.image_size, recipe.data.mean, recipe.data.std) == (16, (0.5,) * 3, (0.25,) * 3)
    assert recipe.compression.target_ratio == 5


@pytest.mark.parametrize(
    "change", ["network.options.num_classes=7", "baseline.epochs=3", "baseline.trained=false"]
)
def test_who_says_something_of_training_gets_it(change, place):
    recipe = asked_recipe(str(place / "net"), str(place / "photos"), Goal(ratio=5), changes=[change])
    assert not recipe.baseline.trained


def test_what_is_said_of_images_counts(place):
    changes = ["data.image_size=24", "data.mean=[0.1]"]
    recipe = asked_recipe(str(place / "net"), str(place / "photos"), Goal(ratio=5), changes=changes)
    assert (recipe.data.image_size, recipe.data.mean, recipe.data.std) == (24, (0.1,), (0.25,) * 3)
    assert asked_recipe(str(place / "net"), "digits", Goal(ratio=5)).data.mean is None


@torch.no_grad()
def test_the_run_begins_with_the_directory_s_weights(place, finished):
    from torchvision import transforms
    from torchvision.datasets import ImageFolder
    from transformers import ViTForImageClassification

    steps = [transforms.Resize(round(16 * 256 / 224)), transforms.CenterCrop(16), transforms.ToTensor()]
    normalise = transforms.Normalize([0.5] * 3, [0.25] * 3)
    test = ImageFolder(place / "photos/val", transforms.Compose([*steps, normalise]))
    images, labels = torch.stack([x for x, _ in test]), torch.tensor(test.targets)
    logits = ViTForImageClassification.from_pretrained(place / "net").eval()(images).logits
    metrics = json.loads((finished / "metrics.json").read_text())
    expected = torch.nn.functional.cross_entropy(logits.double(), labels)
    assert metrics["baseline"]["nll"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.usefixtures("blank_pictures")
def test_every_command_takes_the_run_without_the_directory(place, finished, tmp_path):
    run_directory = shutil.copytree(finished, tmp_path / "run")
    (place / "net").rename(place / "away")
    try:
        found = sqs("evaluate", run_directory, "--json")
        metrics = json.loads((finished / "metrics.json").read_text())
        assert json.loads(found.stdout)["nll"] == pytest.approx(metrics["compressed"]["nll"])
        about = json.loads(sqs("inspect", run_directory, "--json").stdout)["metadata"]["data"]
        assert about == {"classes": ["blue", "green", "red"], "input_mean": [0.5] * 3, "input_std": [0.25] * 3}
        for arguments in (
            ["inspect", run_directory, "--runtime"],
            ["export", run_directory, "--format", "dense", "--out", tmp_path / "dense.safetensors"],
            ["bench", "model", run_directory, "--rounds", 1, "--batch", 1, "--eager"],
            ["report", run_directory],
        ):
            result = sqs(*arguments)
            assert result.exit_code == 0, result.output
    finally:
        (place / "away").rename(place / "net")


def recipe_of(place, tmp_path, *changes):
    return asked_recipe(
        str(tmp_path / "net"),
        str(place / "photos"),
        Goal(ratio=3),
        changes=["baseline.epochs=1", *QUICK, *changes],
    )


@pytest.mark.slow
@pytest.mark.usefixtures("blank_pictures")
def test_training_begins_anew_from_other_weights(place, tmp_path):
    shutil.copytree(place / "net", tmp_path / "net")
    run(recipe_of(place, tmp_path), tmp_path / "run")
    state = load_file(tmp_path / "net/model.safetensors")
    state["classifier.bias"] += 1
    save_file(state, tmp_path / "net/model.safetensors", {"format": "pt"})
    run(recipe_of(place, tmp_path), tmp_path / "again")
    assert len(list((tmp_path / "baselines").glob("*.pt"))) == 2
    first, second = ((tmp_path / name / "fingerprint.json").read_text() for name in ("run", "again"))
    assert "directory digest" in first and first != second
    recipe = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert recipe["network"]["name"] == str(tmp_path / "net")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["network.options.num_classes=9", "baseline.trained=true"], "The head of .* is new"),
        (["network.options.num_classes=9"], r"gives outputs of shape \(9,\), but the data has 3 classes"),
        (["data.image_size=20"], r"does not take inputs of shape \(3, 20, 20\)"),
        (["network.name=photos/"], "has no config.json: give the Hugging Face directory of a classifier"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything(changes, sentence, place, tmp_path, monkeypatch):
    shutil.copytree(place / "net", tmp_path / "net")
    monkeypatch.chdir(place)
    with pytest.raises(NetworkError, match=sentence) as refused:
        run(recipe_of(place, tmp_path, *changes), tmp_path / "run")
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_classes_in_another_order_are_refused(place, tmp_path):
    write_directory(tmp_path / "net", id2label={0: "red", 1: "green", 2: "blue"})
    recipe = asked_recipe(str(tmp_path / "net"), str(place / "photos"), Goal(ratio=3), changes=QUICK)
    with pytest.raises(NetworkError, match="Class 'blue' is number 0 in the data, but 2 in"):
        run(recipe, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.usefixtures("blank_pictures")
def test_a_copy_of_the_hub_s_is_data_for_it(place, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"pic": datasets.Image(), "label": datasets.ClassLabel(names=sorted(COLOURS))})
    splits = {}
    for part in ("train", "val"):
        files = sorted((place / "photos" / part).rglob("*.png"))
        columns = {"pic": [str(file) for file in files], "label": [file.parent.name for file in files]}
        splits[part] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "set"))
    recipe = asked_recipe(str(place / "net"), str(tmp_path / "set"), Goal(ratio=3), changes=QUICK)
    assert (recipe.data.name, recipe.data.mean, recipe.data.image_size) == (str(tmp_path / "set"), (0.5,) * 3, 16)
    metrics = run(recipe, tmp_path / "run")
    folder = asked_recipe(str(place / "net"), str(place / "photos"), Goal(ratio=3), changes=QUICK)
    of_folder = run(folder, tmp_path / "of_folder")
    assert metrics["baseline"] == of_folder["baseline"]  # the same images, prepared alike
    found = json.loads(sqs("evaluate", tmp_path / "run", "--json").stdout)
    assert found["nll"] == pytest.approx(metrics["compressed"]["nll"])
