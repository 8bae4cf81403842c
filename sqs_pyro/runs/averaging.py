"""The posterior's other two predictors beside the packed network: its mean, and its average over draws."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sqs_pyro import load, pack_ensemble, save
from sqs_pyro.compression.finetune.call import CompressionResult
from sqs_pyro.data import Data
from sqs_pyro.evaluation.averaging import averaged_network, choose_temperature, mean_network
from sqs_pyro.evaluation.classification import evaluate
from sqs_pyro.runs.recipe import AveragingRecipe

ENSEMBLE = "ensemble.safetensors"


def run_averaging(
    recipe: AveragingRecipe, result: CompressionResult, data: Data, seed: int, directory: Path
) -> dict[str, Any]:
    """Evaluate both on the test data, with the shipped network's norms and biases.

    Draws have batch-norm statistics of their own where the recipe says so. Where it says so, they are written to
    ``ensemble.safetensors`` in ``directory``, and what is evaluated is that file.

    Returns:
        ``posterior_mean`` and ``averaged``: evaluations; the latter with ``temperature``, ``samples`` and
        ``file_bytes`` (None without a file).
    """
    guide, gate_temperature = result.guide, recipe.gate_temperature
    own: dict[str, Any] = {"batch_norm_batches": recipe.batch_norm_batches, "loader": data.train}
    net: Any = result.model.net if recipe.batch_norm_batches else result.hard  # the latter's norms are folded
    average: nn.Module
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        temperature = recipe.temperature or choose_temperature(
            net, guide, data.validation, recipe.candidates, gate_temperature=gate_temperature, **own
        )
        temperatures: dict[str, Any] = {"temperature": temperature, "gate_temperature": gate_temperature}
        if recipe.pack:
            save(pack_ensemble(result, recipe.samples, **temperatures), directory / ENSEMBLE)
            average = load(directory / ENSEMBLE, net)
        else:
            average = averaged_network(net, guide, recipe.samples, **temperatures, **own)
    mean = mean_network(result.hard, guide, **temperatures)
    file_bytes = (directory / ENSEMBLE).stat().st_size if recipe.pack else None
    about = {"temperature": temperature, "samples": recipe.samples, "file_bytes": file_bytes}
    return {
        "posterior_mean": asdict(evaluate(mean, data.test)),
        "averaged": {**asdict(evaluate(average, data.test)), **about},
    }
