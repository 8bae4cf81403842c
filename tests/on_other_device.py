"""Every path with a network on a device that refuses to mix; run by ``test_devices.py`` in a process of its own.

The first user with a GPU meets no "expected all tensors to be on the same device": see :mod:`kits.other_device`.
"""

import copy

import pyro
import pytest
import torch
from kits.other_device import other_device
from kits.tiny_transformers import tiny
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sqs_pyro
from sqs_pyro import bench
from sqs_pyro.bench.model import bench_model
from sqs_pyro.bench.networks import bench_networks
from sqs_pyro.compression.baseline import BaselineRecipe, train_baseline
from sqs_pyro.evaluation.averaging import average_of_packed, averaged_network, mean_network
from sqs_pyro.evaluation.classification import evaluate
from sqs_pyro.evaluation.peers.ensemble import deep_ensemble
from sqs_pyro.evaluation.predictive.classes import evaluate_uncertainty
from sqs_pyro.kernels import dense_state
from sqs_pyro.runs import export, images, kinds, language_model, task
from sqs_pyro.runs.export import export_file
from sqs_pyro.runs.files import evaluate_file, inspect_file
from sqs_pyro.runs.kinds import kind_of

X = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LOADER = DataLoader(TensorDataset(X, torch.arange(40) % 3), 10)
SCHEDULE = {"epochs": 2, "num_components": 4, "nonzero_rate": 0.5}
LEARNED = {"prior": {"kind": "learned"}, "allocation": "rate_distortion"}
RATE_DISTORTION = {"epochs": 2, "num_components": 4, "target_ratio": 4, **LEARNED}


@pytest.fixture(scope="module")
def device():
    with other_device() as found:
        yield found


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))


@pytest.fixture(scope="module")
def net(plain, device):
    return copy.deepcopy(plain).to(device)


@pytest.fixture(scope="module")
def compressed(net):
    return sqs_pyro.compress(net, LOADER, SCHEDULE, validation=LOADER)


def places(module):
    return {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}


def test_the_device_refuses_to_mix(device):
    here = torch.ones(3, device=device)
    assert here.device == device and (here * 2 + 1).sum().item() == 9 and here.cpu().tolist() == [1, 1, 1]
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        here + torch.ones(3)
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.randn(3, device=device, generator=torch.Generator())


def test_arithmetic_is_that_of_the_cpu(plain, net):
    assert evaluate(net, LOADER) == evaluate(plain, LOADER)


RECIPES = {
    "schedule": SCHEDULE,
    "rate and distortion": RATE_DISTORTION,
    "structured": {**RATE_DISTORTION, "prior": {"kind": "learned", "scope": "structured"}},
    "channels, a tail, a teacher": {
        **SCHEDULE,
        "groups": "channel",
        "windows": {"kind": "outlier_aware"},
        "distillation": {"weight": 0.5},
        "prior": {"kind": "hierarchical"},
        "pruning": {"saliency": "activation"},
    },
    "soft": {**SCHEDULE, "estimator": "soft"},
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@torch.no_grad()
def test_compress_save_and_load(recipe, plain, net, device, tmp_path):
    with torch.enable_grad():
        result = sqs_pyro.compress(net, LOADER, recipe, validation=LOADER)
    assert places(result.network) == places(result.hard) == {device.type}
    sqs_pyro.save(result.network, tmp_path / "packed.safetensors")
    on_cpu = sqs_pyro.load(tmp_path / "packed.safetensors", plain)
    there = sqs_pyro.load(tmp_path / "packed.safetensors", net)  # where the network is
    assert places(on_cpu) == {"cpu"} and places(there) == {device.type}
    for packed in (result.network, there, copy.deepcopy(on_cpu).to(device)):
        assert torch.allclose(packed(X[:4].to(device)).cpu(), on_cpu(X[:4]), atol=1e-5)
    assert evaluate(there, LOADER).accuracy == evaluate(on_cpu, LOADER).accuracy
    assert {value.device.type for value in dense_state(there).values()} == {device.type}


def test_training_is_taken_up_again(net, tmp_path):
    for _ in range(2):
        trained = copy.deepcopy(net)
        train_baseline(trained, LOADER, LOADER, BaselineRecipe(epochs=1), checkpoint=tmp_path / "baseline.pt")
        sqs_pyro.compress(trained, LOADER, SCHEDULE, checkpoint=tmp_path / "kept.pt", validation=LOADER)


def test_averages(compressed, net, tmp_path):
    average = averaged_network(compressed.hard, compressed.guide, 2, seed=0)
    assert evaluate_uncertainty(average, LOADER, {"same": LOADER}).entropy_auroc["same"] == 0.5
    evaluate(mean_network(compressed.hard, compressed.guide), LOADER)
    evaluate(deep_ensemble(lambda seed: net, 1), LOADER)
    sqs_pyro.save(sqs_pyro.pack_ensemble(compressed, 2), tmp_path / "ensemble.safetensors")
    evaluate(sqs_pyro.load(tmp_path / "ensemble.safetensors", net), LOADER)
    learned = sqs_pyro.compress(net, LOADER, RATE_DISTORTION)
    sqs_pyro.save(learned.network, tmp_path / "packed.safetensors")
    evaluate(average_of_packed(sqs_pyro.load(tmp_path / "packed.safetensors", net), 2), LOADER)


def test_reports(compressed, device):
    x, y = next(iter(LOADER))
    sqs_pyro.elbo_report(compressed.model, compressed.guide, x.to(device), y.to(device))
    assert all(finding.sentence for finding in sqs_pyro.diagnose(compressed.model, compressed.guide))


@pytest.mark.filterwarnings("ignore:.*batch norm")
def test_svi_and_predictive(plain, device):
    model = sqs_pyro.BayesianNetwork(copy.deepcopy(plain).to(device), num_data=40)
    guide = sqs_pyro.SpikeGMMGuide(model, 4, estimator="pathwise")
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=sqs_pyro.SQSELBO())
    x, y = next(iter(LOADER))
    assert svi.step(x.to(device), y.to(device)) > 0
    drawn = pyro.infer.Predictive(model, guide=guide, num_samples=2)(x.to(device))["obs"]
    assert drawn.shape == (2, 10) and drawn.device == device


@torch.no_grad()
def test_blockwise(device, tmp_path):
    plain = tiny("llama")
    net, sequences = copy.deepcopy(plain).to(device), torch.randint(3, 60, (6, 12))
    with torch.enable_grad():
        recipe = {
            "bits": 3.0,
            "num_components": 8,
            "allocation": "importance",
            "settle_steps": 2,
            "finish_steps": 2,
        }
        result = sqs_pyro.compress_transformer(net, sequences, recipe)
    sqs_pyro.save(result.network, tmp_path / "packed.safetensors")
    there, here = (sqs_pyro.load(tmp_path / "packed.safetensors", each) for each in (net, plain))
    expected = here(sequences[:2]).logits
    for packed in (result.network, there):
        assert torch.allclose(packed(sequences[:2].to(device)).logits.cpu(), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["small", "tiny_language", "tiny_task"])
@pytest.mark.usefixtures("blank_pictures")
def test_runs(kind, device, request, monkeypatch, tmp_path):
    recipe = request.getfixturevalue(f"{kind}_recipe")
    for module in (images.pipeline, language_model, task):
        monkeypatch.setattr(module, "chosen_device", lambda name: device)
    metrics = kind_of(recipe).run(recipe, tmp_path / "run")
    # The file does not know where it was made: on the CPU it says the same.
    evaluation = evaluate_file(tmp_path / "run")
    found = evaluation.get("perplexity", evaluation)
    measured = metrics["compressed"]
    for key in measured:
        if isinstance(measured[key], dict):
            assert found[key]["perplexity"] == pytest.approx(measured[key]["perplexity"], rel=1e-4)
        else:
            assert found[key] == pytest.approx(measured[key], rel=1e-3, abs=1e-4), key


@pytest.mark.usefixtures("blank_pictures")
def test_commands_on_files(device, small_run, monkeypatch, tmp_path):
    for module in (bench.model, export, kinds):
        monkeypatch.setattr(
            module, "chosen_device", lambda name: device if name == "cuda" else torch.device("cpu")
        )
    file = small_run / "packed.safetensors"
    weights = inspect_file(file, runtime=True, device="cuda")["runtime"]["weights"]
    assert weights and all(f"on {device.type}" in weight["reason"] for weight in weights)
    assert evaluate_file(file, device="cuda")["accuracy"] == evaluate_file(file)["accuracy"]
    made = [export_file(file, "dense", tmp_path / name, device=name) for name in ("cuda", "cpu")]
    assert made[0]["total_bytes"] == made[1]["total_bytes"] and made[0]["max_difference"] < 1e-4
    # Another dtype set into a tensor of this device would not reach what is inside: parameters are made anew.
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    networks = bench_networks(str(file), (4,), None, (4,))
    document = bench_model(networks, (2,), rounds=2, compiled=False, device="cuda")
    assert document["device"] == str(device)
    assert {row["method"] for row in document["rows"]} >= {"float32", "packed, float32", "packed, bfloat16"}
    assert all(row["relative_error"] < 0.25 for row in document["rows"])
