"""Public calls with their usual arguments, another value for each, and what is seen of them.

The table is held against the signatures in ``test_arguments``, so that a new argument needs a line here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from kits import tiny_transformers
from kits.outcome import outcome
from pyro import poutine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sqs_pyro
from sqs_pyro import (
    SQSELBO,
    BayesianNetwork,
    CompressionResult,
    PruningSchedule,
    SpikeAndSlab,
    SpikeGMM,
    SpikeGMMGuide,
    compress,
    compress_transformer,
    diagnose,
    elbo_report,
    from_pretrained,
    load,
    pack,
    pack_ensemble,
    save,
    size_report,
)
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.inference.guides.windows import EqualMass
from sqs_pyro.integrations import save_pretrained
from sqs_pyro.models import normal_prior
from sqs_pyro.networks.residency import InMemory
from sqs_pyro.packing.stored import METADATA

RECIPE = {"epochs": 2, "num_components": 3, "nonzero_rate": 0.5, "batch_norm_batches": 2}
BLOCKWISE = {
    "bits": 4.0,
    "num_components": 31,
    "importance_sequences": 2,
    "batch_size": 2,
    "rounds": 1,
    "finish_steps": 1,
}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 2)).eval()


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.arange(24) % 2
    return torch.randn(24, 4, generator=torch.Generator().manual_seed(seed)) + 2 * y[:, None], y


def minibatches(seed: int = 0) -> DataLoader:
    return DataLoader(TensorDataset(*data(seed)), batch_size=8)


def posterior(seed: int = 0, **options: Any) -> SpikeGMMGuide:
    model = BayesianNetwork(network(seed), num_data=24)
    usual = {"initial_gate": 1.0, "temperature": 0.5, "estimator": "straight_through"}
    return SpikeGMMGuide(model, 3, **{**usual, **options}).eval()


@cache
def result(seed: int = 0) -> CompressionResult:
    return compress(network(seed), minibatches(seed), RECIPE)


@cache
def llama(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return tiny_transformers.tiny("llama", num_hidden_layers=1)


def flipped(output: torch.Tensor) -> dist.TorchDistribution:
    return dist.Categorical(logits=output.flip(-1))


class Recording(InMemory):
    """Residency that counts what it is asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def held(self, part, without=()):
        self.asked += 1
        return super().held(part, without)


class Told(list):
    """A callback that remembers how often it was called."""

    def __call__(self, *_: Any) -> None:
        self.append(1)


class Together(dict):
    """Arguments that can only be changed together."""


# What is seen of each call.


def run_compress(**arguments: Any) -> Any:
    made = compress(**arguments)
    return made.hard, getattr(made.network, METADATA), made.history, sides(arguments)


def run_compress_transformer(**arguments: Any) -> Any:
    made = compress_transformer(**arguments)
    return made.network, getattr(made.network, METADATA), sides(arguments)


def sides(arguments: dict[str, Any]) -> Any:
    """What a call did besides returning: files written, callbacks called."""
    paths = [value for value in arguments.values() if isinstance(value, Path)]
    files = [
        sorted(p.name for p in (path.rglob("*") if path.is_dir() else [path]) if p.exists()) for path in paths
    ]
    told = [len(value) for value in arguments.values() if isinstance(value, Told)]
    return files, told, [value.asked for value in arguments.values() if isinstance(value, Recording)]


def run_elbo_report(args: tuple = (), kwargs: dict | None = None, **arguments: Any) -> Any:
    report = elbo_report(arguments.pop("model"), arguments.pop("guide"), *args, **arguments, **(kwargs or {}))
    return report, sides(arguments)


def run_from_pretrained(options: dict, **arguments: Any) -> Any:
    net = from_pretrained(**arguments, **options)
    return net, str(net.dtype), hasattr(net, METADATA)


def run_pack(**arguments: Any) -> Any:
    packed = pack(**arguments)
    rows = [(row.layout, row.bytes) for row in size_report(packed).tensors]
    return packed, rows, getattr(packed, METADATA)


def run_pack_ensemble(**arguments: Any) -> Any:
    packed = pack_ensemble(**arguments)
    report = size_report(packed)
    return packed, report.draws, [row.layout for row in report.tensors], getattr(packed, METADATA)


def run_save(packed: nn.Module, path: Path) -> Any:
    save(packed, path)
    return path.name, path.read_bytes()


def run_elbo(options: dict, **arguments: Any) -> Any:
    loss = SQSELBO(**arguments, **options)
    guide = posterior(evaluation_temperature=2.0)
    return loss.loss(guide.model, guide, *data())


def run_model(net: nn.Module, likelihood: Any, **arguments: Any) -> Any:
    model = BayesianNetwork(net, likelihood=likelihood, **arguments)
    trace = poutine.trace(model).get_trace(*data())
    return repr(model), list(model.site_values().values()), trace.log_prob_sum()


def run_schedule(**arguments: Any) -> Any:
    schedule = PruningSchedule(**arguments)
    saliencies = {"a": torch.arange(12.0), "b": 3 * torch.arange(8.0)}
    steps = range(arguments["total_steps"])
    return [(schedule.rate(step), schedule.due(step), schedule.masks(saliencies, step)) for step in steps]


def run_law(law: type, **arguments: Any) -> Any:
    made = law(**arguments)
    values = torch.tensor([0.0, 0.3, float("nan")])[:, None]
    pyro.set_rng_seed(0)
    draws = made.rsample((3,)) if made.has_rsample else made.sample((3,))
    return [outcome(made.log_prob, value=value) for value in values], draws


def run_guide(**arguments: Any) -> Any:
    guide = SpikeGMMGuide(**arguments)
    seen: list[Any] = [guide.codebook(name) for name in guide.site_guides()]
    for training in (True, False):
        guide.train(training)
        seen += [guide.distribution(site).log_prob(torch.zeros(())) for site in guide.site_guides().values()]
        for _ in range(3):
            seen.append(guide())
            for site in guide.site_guides().values():
                site.latent_unconstrained.data.mul_(-0.7)  # as an optimiser moves it: codes go along, or wait
    inferring = SpikeGMMGuide(**{**arguments, "estimator": "local", "stage": "dense"})
    return seen, outcome(guide.harden), inferring()


@dataclass(frozen=True)
class Call:
    """A public call: what is seen of it, its usual arguments, and another value for each."""

    observe: Callable[..., Any]
    usual: Callable[[Path], dict[str, Any]]
    other: Callable[[Path], dict[str, Any]]


GATES, LOC, SCALE = torch.tensor([0.7]), torch.tensor([[-0.5, 0.4]]), torch.tensor([[0.2, 0.3]])
LOGITS = torch.tensor([[0.3, -0.2]])
CALLS = {
    "compress": Call(
        run_compress,
        lambda _: {
            "net": network(),
            "train_loader": minibatches(),
            "recipe": RECIPE,
            "validation": minibatches(2),
        },
        lambda path: {
            "net": network(1),
            "train_loader": minibatches(1),
            "recipe": {**RECIPE, "nonzero_rate": 0.25},
            "validation": None,
            "likelihood": flipped,
            "judge": lambda net, validation: 0.125,
            "seed": 1,
            "checkpoint": path / "compression.pt",
            "progress": Told(),
            "metadata": {"owner": "someone"},
            "branch": path / "branch.pt",
        },
    ),
    "compress_transformer": Call(
        run_compress_transformer,
        lambda _: {
            "net": llama(),
            "sequences": tiny_transformers.inputs(llama())["input_ids"],
            "recipe": BLOCKWISE,
        },
        lambda path: {
            "net": llama(1),
            "sequences": torch.arange(3, 17).view(2, 7),
            "recipe": {**BLOCKWISE, "bits": 2.0},
            "directory": path,
            "plan_directory": path,
            "residency": Recording(),
            "progress": Told(),
            "finishing": Told(),
            "metadata": {"owner": "someone"},
        },
    ),
    "diagnose": Call(
        diagnose,
        lambda _: {"model": posterior().model, "guide": posterior(temperature=1e-3, initial_gate=50.0)},
        lambda _: {
            "model": BayesianNetwork(network(), prior=normal_prior(), num_data=24),
            "guide": posterior(initial_gate=0.1),
            "averaging": False,
            "recipe": CompressionRecipe(),  # gates that a schedule decides are no finding
        },
    ),
    "elbo_report": Call(
        run_elbo_report,
        lambda _: {"model": posterior().model, "guide": posterior(), "args": data()},
        lambda _: {
            "model": BayesianNetwork(network(), num_data=100),
            "guide": posterior(initial_gate=3.0),
            "args": data(1),
            "temperatures": (0.1, 0.9),
            "num_samples": 4,
            "num_particles": 3,
            "standard_error": 1e9,  # reached at once
            "progress": Told(),
            "kwargs": Together(args=data()[:1], kwargs={"y": data()[1].flip(0)}),
        },
    ),
    "from_pretrained": Call(
        run_from_pretrained,
        lambda path: {"directory": checkpoint(path / "a"), "options": {}},
        lambda path: {
            "directory": checkpoint(path / "b", seed=1),
            "auto_class": "AutoModel",
            "dequantize": True,
            "options": {"dtype": torch.bfloat16},
        },
    ),
    "load": Call(
        load,
        lambda path: {"path": saved(path / "a.safetensors"), "net": network()},
        lambda path: {"path": saved(path / "b.safetensors", 1), "net": None},
    ),
    "pack": Call(
        run_pack,
        lambda _: {"source": posterior()},
        lambda _: {
            "source": posterior(1),
            "layout": "entropy",
            "leftover_dtype": "float32",
            "codebook_dtype": "float32",
            "metadata": {"owner": "someone"},
            "inputs": torch.randn(3, 5),  # one too many
        },
    ),
    "pack of a result": Call(
        run_pack,
        lambda _: {"source": result()},
        lambda _: {
            "source": result(1),
            "layout": "entropy",
            "leftover_dtype": "float32",
            "codebook_dtype": "float32",
            "metadata": {"owner": "someone"},
            "inputs": torch.randn(3, 5),  # one too many
        },
    ),
    "pack_ensemble": Call(
        run_pack_ensemble,
        lambda _: {"source": posterior(), "num_samples": 4},
        lambda _: {
            "source": posterior(1),
            "num_samples": 3,
            "temperature": 5.0,
            "gate_temperature": 5.0,
            "layout": "bitmap",
            "leftover_dtype": "float32",
            "codebook_dtype": "float32",
            "metadata": {"owner": "someone"},
            "seed": 5,
        },
    ),
    "save": Call(
        run_save,
        lambda path: {"packed": result().network, "path": path / "a.safetensors"},
        lambda path: {"packed": result(1).network, "path": path / "b.safetensors"},
    ),
    "size_report": Call(
        size_report,
        lambda _: {"packed": result().network},
        lambda _: {"packed": pack_ensemble(result())},
    ),
    "SQSELBO": Call(
        run_elbo,
        lambda _: {"options": {}},
        lambda _: {
            "kl": "monte_carlo",
            "kl_weight": 0.5,
            "num_particles": 3,
            "options": {"vectorize_particles": True},
        },
    ),
    "BayesianNetwork": Call(
        run_model,
        lambda _: {"net": network(), "likelihood": "categorical"},
        lambda _: {
            "net": network(1),
            "prior": dist.Laplace(0.0, 1.0),
            "likelihood": flipped,
            "num_data": 100,
            "include": ["4.weight"],
            "exclude": ["0.weight"],
        },
    ),
    "PruningSchedule": Call(
        run_schedule,
        lambda _: {"target": 0.25, "total_steps": 50, "every": 5},
        lambda _: {"target": 0.5, "total_steps": 30, "start": 0.3, "end": 0.9, "every": 7, "scope": "layer"},
    ),
    "SpikeAndSlab": Call(
        lambda **arguments: run_law(SpikeAndSlab, **arguments),
        lambda _: {"inclusion": 0.5, "slab": dist.Normal(torch.zeros(1), 1.0)},
        lambda _: {"inclusion": 0.2, "slab": dist.Laplace(torch.zeros(1), 1.0), "validate_args": False},
    ),
    "SpikeGMM": Call(
        lambda **arguments: run_law(SpikeGMM, **arguments),
        lambda _: {"gates": GATES, "loc": LOC, "scale": SCALE, "logits": LOGITS},
        lambda _: {
            "gates": 1 - GATES,
            "loc": 2 * LOC,
            "scale": 2 * SCALE,
            "responsibilities": Together(logits=None, responsibilities=torch.tensor([[0.9, 0.1]])),
            "logits": 2 * LOGITS,
            "temperature": 0.3,
            "estimator": "soft",
            "spike_scale": 0.1,
            "validate_args": False,
        },
    ),
    "SpikeGMMGuide": Call(
        run_guide,
        lambda _: {
            "model": posterior().model,
            "num_components": 3,
            "initial_gate": 1.0,
            "temperature": 0.5,
            "estimator": "straight_through",
        },
        lambda _: {
            "model": posterior(1).model,
            "num_components": 2,
            "windows": EqualMass(4),
            "temperature": 2.0,
            "evaluation_temperature": 4.0,
            "evaluation_gate_temperature": 9.0,
            "gate_temperature": 3.0,
            "estimator": "soft",
            "groups": "channel",
            "init": {name: 2 * value for name, value in posterior().model.site_values().items()},
            "coded": posterior(1).harden(),
            "grid": "uniform",
            "zero": "codeword",
            "initial_gate": 0.3,
            "init_scale": 0.5,
            "refresh_every": 2,
            "spike_scale": 0.01,
            "stage": "dense",
        },
    ),
}
SIGNATURE_OF = {"pack of a result": "pack"}


def saved(path: Path, seed: int = 0) -> Path:
    save(result(seed).network, path)
    return path


def checkpoint(directory: Path, seed: int = 0) -> Path:
    net = llama(seed)
    packed = sqs_pyro.kernels.packed_network(
        net, tiny_transformers.code_matrices(net, exclude=("embed", "lm_head"))
    )
    save_pretrained(packed, directory, model_card=False)
    return directory
