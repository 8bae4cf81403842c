"""`sqs uncertainty`: its table and document are the figures of the packed file's draws, one by one."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from sqs_pyro import load
from sqs_pyro.cli import app
from sqs_pyro.data import ShiftedLoader, load_data, parse_shift
from sqs_pyro.evaluation.classification import predict
from sqs_pyro.recipes import parse
from sqs_pyro.runs.files import uncertainty_file
from sqs_pyro.runs.images import run
from sqs_pyro.runs.recipe import RunRecipe

pytestmark = pytest.mark.usefixtures("blank_pictures")


def _sqs(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def document(small_run):
    return uncertainty_file(small_run / "ensemble.safetensors", shifts=("noise:1", "uniform"))


def test_the_average_is_that_of_the_run(small_run, document):
    averaged = json.loads((small_run / "metrics.json").read_text())["averaged"]
    assert document["draws"] == averaged["samples"] == 3
    assert list(document["predictors"]) == ["one draw", "average of 3", "scaled"]
    found = document["predictors"]["average of 3"]
    for name in ("accuracy", "nll", "ece", "brier", "entropy"):
        assert found[name] == pytest.approx(averaged[name], abs=1e-6)


def test_entropies_tell_shifted_inputs_apart(small_run, small_recipe, document):
    net, test = load(small_run / "ensemble.safetensors"), load_data(small_recipe.data).test
    scores = []
    for loader in (test, ShiftedLoader(test, parse_shift("noise:1"))):
        p = torch.cat([net(x) for x, _ in loader]).detach().double().exp()
        scores.append(-(p * p.clamp(min=1e-300).log()).sum(-1).numpy())
    expected = roc_auc_score(np.repeat([0, 1], list(map(len, scores))), np.concatenate(scores))
    found = document["predictors"]["average of 3"]
    assert found["entropy_auroc"]["noise:1"] == pytest.approx(expected, abs=1e-5)
    assert set(found["information_auroc"]) == {"noise:1", "uniform"}
    assert document["predictors"]["scaled"]["information_auroc"] == {}


def test_shifted_figures_are_those_of_the_shifted_data(small_run, document):
    evaluation = json.loads(
        _sqs("evaluate", small_run / "ensemble.safetensors", "--shift", "noise:1", "--json").stdout
    )
    found = document["predictors"]["average of 3"]["shifted"]
    assert set(found) == {"noise:1"}  # nothing but noise has no label
    assert found["noise:1"] == pytest.approx({key: evaluation[key] for key in found["noise:1"]}, abs=1e-6)


def test_scaling_is_fitted_on_validation_data(small_run, small_recipe, document):
    net, data = load(small_run / "ensemble.safetensors"), load_data(small_recipe.data)
    log_p, y = predict(net, data.validation)

    def nll(temperature):
        return float(torch.nn.functional.cross_entropy(log_p / temperature, y))

    best = document["temperature"]
    assert nll(best) <= min(nll(0.97 * best), nll(1.03 * best))


def test_fewer_draws_and_a_single_file(small_run):
    two = uncertainty_file(small_run / "ensemble.safetensors", draws=2)
    assert two["draws"] == 2 and "average of 2" in two["predictors"]
    single = json.loads(_sqs("uncertainty", small_run / "packed.safetensors", "--json").stdout)
    assert list(single["predictors"]) == ["packed file", "scaled"]
    metrics = json.loads((small_run / "metrics.json").read_text())
    assert single["predictors"]["packed file"]["nll"] == pytest.approx(metrics["compressed"]["nll"], abs=1e-6)
    assert single["predictors"]["packed file"]["entropy_auroc"] == {}


@pytest.mark.slow
def test_a_file_with_widths_is_drawn_from(small_run, small_recipe, tmp_path):
    values = small_recipe.model_dump(mode="json", exclude_unset=True)
    values["compression"] |= {
        "allocation": "rate_distortion",
        "estimator": "one_hot",
        "gate_learning_rate": 0,
        "prior": {"kind": "learned"},
        "target_ratio": 12,
    }
    values["averaging"] = {"samples": 3, "temperature": 1.0}
    metrics = run(parse(RunRecipe, values), tmp_path / "run", baselines_dir=small_run.parent / "baselines")
    found = json.loads(_sqs("uncertainty", tmp_path / "run" / "packed.safetensors", "--draws", 3, "--json").stdout)
    assert list(found["predictors"]) == ["packed file", "average of 3", "scaled"]
    for name, measured in (("packed file", "compressed"), ("average of 3", "averaged")):
        assert found["predictors"][name]["nll"] == pytest.approx(metrics[measured]["nll"], abs=1e-6)
    assert metrics["averaged"]["nll"] != metrics["compressed"]["nll"]


def test_what_is_printed_and_written(small_run, tmp_path):
    out, shift = tmp_path / "uncertainty", ("--shift", "noise:1", "--shift", "uniform")
    result = _sqs("uncertainty", small_run / "ensemble.safetensors", *shift, "--out", out)
    assert result.exit_code == 0, result.output
    for row in ("risk-coverage area, %", "AUROC, noise:1", "by mutual information, uniform", "NLL, nats, noise:1"):
        assert row in result.stdout
    assert {path.name for path in out.iterdir()} == {"uncertainty.json", "reliability.png", "risk_coverage.png"}
    written = json.loads((out / "uncertainty.json").read_text())
    curves = written["curves"]["average of 3"]
    assert sum(curves["counts"]) == 500 and len(curves["risk"]) == 200 and curves["coverage"][-1] == 1
    figures = written["predictors"]["average of 3"]
    assert curves["risk"][-1] == pytest.approx(1 - figures["accuracy"])
    again = _sqs("uncertainty", small_run / "packed.safetensors", "--out", out, "--json")
    assert again.exit_code == 0
    assert json.loads((out / "uncertainty.json").read_text())["draws"] == json.loads(again.stdout)["draws"] == 1


def test_only_its_own_output_is_replaced(small_run, tmp_path):
    (tmp_path / "reliability.png").write_bytes(b"mine")
    result = _sqs("uncertainty", small_run / "packed.safetensors", "--out", tmp_path)
    assert result.exit_code == 2 and "reliability.png' was not written by this command" in result.stderr
    (tmp_path / "uncertainty.json").write_text("{}")
    result = _sqs("uncertainty", small_run / "packed.safetensors", "--out", tmp_path)
    assert result.exit_code == 2 and "uncertainty.json' was not written by this command" in result.stderr
    assert (tmp_path / "reliability.png").read_bytes() == b"mine"


def test_images_of_a_folder_are_foreign(small_run, tmp_path):
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(3):
                pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number}.png")
    section = {"name": "image_folder", "root": str(tmp_path), "image_size": 16, "batch_size": 2, "num_workers": 0}
    recipe = tmp_path / "foreign.yaml"
    recipe.write_text(yaml.safe_dump({"data": section}))
    found = uncertainty_file(small_run / "ensemble.safetensors", foreign=(str(recipe),))
    assert set(found["predictors"]["average of 3"]["entropy_auroc"]) == {str(recipe)}
    assert found["predictors"]["average of 3"]["shifted"] == {}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--foreign", "nowhere"], "neither a data set (digits, fashion_mnist, cifar10, cifar100)"),
        (["--foreign", "digits"], "is the data of the file itself"),
        (["--shift", "blur:1"], "Shift 'blur:1' is unknown"),
        (["--draws", "4"], "--draws 4 is impossible"),
        (["--root", "here"], "leave it out"),
    ],
)
def test_what_cannot_be_is_one_sentence(small_run, options, sentence):
    result = _sqs("uncertainty", small_run / "ensemble.safetensors", *options)
    assert result.exit_code == 2 and result.stdout == ""
    assert sentence in result.stderr and len(result.stderr.splitlines()) == 1


def test_language_models_are_no_classifiers(tiny_language_run):
    result = _sqs("uncertainty", tiny_language_run / "packed.safetensors")
    assert result.exit_code == 2 and "uncertainty is told of classifiers of images" in result.stderr
