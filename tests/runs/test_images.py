"""A run from recipe to evaluated file: what is written is what was measured, and it can be repeated."""

import csv
import json
import math

import pytest
import torch
import yaml
from safetensors.torch import save_file

from sqs_pyro import load
from sqs_pyro.data import load_data
from sqs_pyro.errors import NetworkError, RecipeError
from sqs_pyro.networks.registry import build_network
from sqs_pyro.recipes import parse
from sqs_pyro.runs.files import evaluate_file, inspect_file
from sqs_pyro.runs.images import check_fit, run
from sqs_pyro.runs.recipe import RunRecipe

pytestmark = pytest.mark.usefixtures("blank_pictures")

FILES = {"packed.safetensors", "ensemble.safetensors", "metrics.json", "bounds.json", "recipe.yaml", "history.csv"}
FILES |= {"fingerprint.json", "layers.json", "report.html", "SHA256SUMS"}
PICTURES = {"layers.png", "bits.png", "curves.png", "bounds.png"}


def _changed(recipe, **sections):
    values = recipe.model_dump(mode="json")
    for name, section in sections.items():
        values[name] = {**(values[name] or {}), **section} if isinstance(section, dict) else section
    return parse(RunRecipe, values)


def test_a_run_directory_holds_everything_and_nothing_else(small_run):
    assert {path.name for path in small_run.iterdir()} == FILES | PICTURES
    assert {path.name for path in small_run.parent.iterdir()} == {"run", "baselines"}


def test_the_recipe_as_used_is_the_recipe(small_run, small_recipe):
    assert parse(RunRecipe, yaml.safe_load((small_run / "recipe.yaml").read_text())) == small_recipe


def test_the_file_tells_the_recipe_in_the_fewest_words(small_run, small_recipe):
    told = load(small_run / "packed.safetensors").packed_metadata["recipe"]
    assert parse(RunRecipe, told).model_copy(update={"bounds": small_recipe.bounds}) == small_recipe
    assert told == parse(RunRecipe, told).model_dump(mode="json", exclude_defaults=True)


def test_metrics_are_those_of_the_file_on_disk(small_run, small_recipe):
    metrics = json.loads((small_run / "metrics.json").read_text())
    packed = small_run / "packed.safetensors"
    net = load(packed).eval()
    logits, labels = zip(*[(net(x), y) for x, y in load_data(small_recipe.data).test], strict=True)
    logits, labels = torch.cat(logits).detach().double(), torch.cat(labels)
    chosen = logits.log_softmax(1)[torch.arange(len(labels)), labels]
    assert metrics["compressed"]["accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert metrics["compressed"]["nll"] == pytest.approx(-chosen.mean().item(), rel=1e-4)
    assert metrics["size"]["file_bytes"] == packed.stat().st_size
    fp32 = sum(value.numel() * 4 for value in net_state(small_recipe) if value.is_floating_point())
    assert metrics["size"]["fp32_bytes"] == fp32
    assert metrics["size"]["ratio"] == pytest.approx(fp32 / packed.stat().st_size)


def net_state(recipe):
    return build_network(recipe.network.name, **recipe.network.options).state_dict().values()


def test_the_non_zero_rate_is_the_target_to_the_weight(small_run, small_recipe):
    size = json.loads((small_run / "metrics.json").read_text())["size"]
    assert size["nonzeros"] == round(small_recipe.compression.nonzero_rate * size["num_weights"])


def test_metrics_hold_what_the_documentation_promises(small_run, small_recipe):
    metrics = json.loads((small_run / "metrics.json").read_text())
    for name in ("baseline", "compressed", "posterior_mean", "averaged"):
        assert {"accuracy", "nll", "ece", "brier", "entropy"} <= set(metrics[name])
        assert 0 <= metrics[name]["accuracy"] <= 1
    assert metrics["averaged"]["temperature"] in small_recipe.averaging.candidates
    assert metrics["averaged"]["file_bytes"] == (small_run / "ensemble.safetensors").stat().st_size
    assert {"fp32_bytes", "file_bytes", "ratio", "bits_per_weight", "parts"} <= set(metrics["size"])
    assert {"nonzero_rate", "seconds", "seed", "versions", "stage_seconds", "accuracy_drop"} <= set(metrics)
    assert metrics["max_logit_difference"] <= 1e-5  # the file's network is the one that was trained


def test_bounds_are_of_the_trained_posterior(small_run, small_recipe):
    bounds = json.loads((small_run / "bounds.json").read_text())
    size = json.loads((small_run / "metrics.json").read_text())["size"]
    temperatures = [at["temperature"] for at in bounds["temperatures"]]
    assert temperatures[0] == pytest.approx(small_recipe.compression.final_temperature)
    assert len(temperatures) >= 3 and temperatures == sorted(temperatures)
    for at in bounds["temperatures"]:
        total = at["total"]
        assert total["num_weights"] == size["num_weights"]
        slack = 5 * total["monte_carlo_error"]
        assert total["lower"] - slack <= total["monte_carlo"] <= total["jensen"] + slack
        assert at["elbo_high"] - at["elbo_low"] == pytest.approx(total["width"])
    assert bounds["num_samples"] == 4  # a network this small need not save
    closed = 1 - size["nonzeros"] / size["num_weights"]
    prior = small_recipe.compression.prior.inclusion
    pruned = -closed * math.log(1 - prior) * size["num_weights"]
    assert bounds["temperatures"][0]["total"]["gate_kl"] > pruned > 0


def test_findings_are_kept_and_told_once(small_run, small_recipe, tmp_path):
    healthy = json.loads((small_run / "metrics.json").read_text())["findings"]
    assert {finding["kind"] for finding in healthy} <= {"inert_averaging"}  # at the temperature that it chose
    recipe = _changed(small_recipe, compression={"nonzero_rate": 0.002}, averaging={"temperature": 1e-4})
    metrics = run(recipe, tmp_path / "run", baselines_dir=small_run.parent / "baselines")
    kinds = [finding["kind"] for finding in metrics["findings"]]
    assert "starving_layer" in kinds and kinds[-1] == "inert_averaging"
    assert all(finding["measured"] < finding["threshold"] for finding in metrics["findings"])


def test_draws_may_have_norms_of_their_own(small_run, small_recipe, tmp_path):
    own = {"batch_norm_batches": 2, "pack": False, "temperature": 1.0, "samples": 2}
    with pytest.raises(RecipeError, match="a packed file's draws share their norms"):
        _changed(small_recipe, averaging={**own, "pack": True})
    found = {}
    for batches in (0, 2):
        recipe = _changed(
            small_recipe, compression={"epochs": 1}, averaging={**own, "batch_norm_batches": batches}
        )
        found[batches] = run(recipe, tmp_path / f"{batches}", baselines_dir=small_run.parent / "baselines")
    assert found[0]["compressed"] == found[2]["compressed"]
    assert found[0]["averaged"]["nll"] != found[2]["averaged"]["nll"]
    assert found[2]["averaged"]["file_bytes"] is None


def test_the_history_covers_the_whole_run(small_run):
    with (small_run / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(steps)
    assert steps[-1] == int(rows[-1]["total_steps"])
    assert float(rows[-1]["accuracy"]) > 0


def test_a_baseline_is_trained_once(small_run, small_recipe, tmp_path):
    stages = set()
    recipe = _changed(small_recipe, compression={"epochs": 1}, averaging=None)
    metrics = run(
        recipe,
        tmp_path / "run",
        baselines_dir=small_run.parent / "baselines",
        progress=lambda stage, done, total, text: stages.add(stage),
    )
    assert "baseline" not in stages
    assert metrics["baseline"] == json.loads((small_run / "metrics.json").read_text())["baseline"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_of_ones_own(small_run, small_recipe, tmp_path, suffix):
    (kept,) = (small_run.parent / "baselines").glob("*.pt")
    weights = torch.load(kept, weights_only=True)["network"]
    path = tmp_path / f"weights{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save({"state_dict": weights}, path)
    recipe = _changed(small_recipe, baseline={"checkpoint": str(path)}, compression={"epochs": 1}, averaging=None)
    metrics = run(recipe, tmp_path / "run")
    assert metrics["baseline"] == json.loads((small_run / "metrics.json").read_text())["baseline"]
    assert not (tmp_path / "baselines").exists()


def test_network_and_data_must_fit(small_recipe):
    data = load_data(small_recipe.data)
    with pytest.raises(NetworkError, match=r"outputs of shape \(7,\), but the data has 10 classes"):
        check_fit(build_network("digits_net", num_classes=7, width=4), data)
    with pytest.raises(NetworkError, match=r"does not take inputs of shape \(1, 8, 8\)"):
        check_fit(build_network("resnet20", in_channels=3), data)


def test_the_file_alone_can_be_evaluated_and_inspected(small_run):
    packed = small_run / "packed.safetensors"
    metrics = json.loads((small_run / "metrics.json").read_text())
    evaluation = evaluate_file(packed)
    assert {key: evaluation[key] for key in metrics["compressed"]} == metrics["compressed"]
    inspection = inspect_file(packed)
    assert sum(inspection["size"]["parts"].values()) == packed.stat().st_size
    assert inspection["metadata"]["network"]["name"] == "digits_net"
