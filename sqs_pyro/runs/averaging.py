"""The posterior's other two predictors beside the packed network: its mean, and its average over draws."""

from dataclasses import asdict
from typing import Any

import torch

from sqs_pyro.compression import CompressionResult
from sqs_pyro.data import Data
from sqs_pyro.inference.averaging import averaged_network, choose_temperature, mean_network
from sqs_pyro.inference.evaluate import evaluate
from sqs_pyro.runs.recipe import AveragingRecipe


def run_averaging(recipe: AveragingRecipe, result: CompressionResult, data: Data, seed: int) -> dict[str, Any]:
    """Evaluate both on the test data, with the shipped network's norms and biases.

    Returns:
        ``posterior_mean`` and ``averaged``: evaluations; the latter with ``temperature`` and ``samples``.
    """
    net, guide, gate_temperature = result.hard, result.guide, recipe.gate_temperature
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        temperature = recipe.temperature or choose_temperature(
            net, guide, data.validation, recipe.candidates, gate_temperature=gate_temperature
        )
        average = averaged_network(
            net, guide, recipe.samples, temperature=temperature, gate_temperature=gate_temperature
        )
    mean = mean_network(net, guide, temperature=temperature, gate_temperature=gate_temperature)
    about = {"temperature": temperature, "samples": recipe.samples}
    return {
        "posterior_mean": asdict(evaluate(mean, data.test)),
        "averaged": {**asdict(evaluate(average, data.test)), **about},
    }
