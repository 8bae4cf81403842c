"""What a posterior is worth beside the packed network: bounds on its KL, its mean, its average over draws."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro import load, pack_ensemble, save
from sqs_pyro.compression.finetune.call import CompressionResult
from sqs_pyro.data import Data
from sqs_pyro.evaluation.averaging import average_of_packed, averaged_network, choose_temperature, mean_network
from sqs_pyro.evaluation.classification import evaluate
from sqs_pyro.inference.elbo_report import elbo_report
from sqs_pyro.isolation import random_states_kept
from sqs_pyro.networks.calling import device_of, move_to, split_examples
from sqs_pyro.networks.minibatches import minibatches
from sqs_pyro.reporting.bounds_plot import write_bounds_picture
from sqs_pyro.runs.bookkeeping import Progress, silent
from sqs_pyro.runs.directory import BOUNDS, PACKED, write_json
from sqs_pyro.runs.recipe import AveragingRecipe, BoundsRecipe

ENSEMBLE = "ensemble.safetensors"
_FACTORS = tuple(20 ** (i / 3) for i in range(4))  # of the final temperature; 20 is where the default τ starts
_BUDGET = 2 * 10**7  # log-densities of one component, a temperature


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
    # Draws of other weights have other statistics; the packed network's are those of the most probable one.
    own: dict[str, Any] = {"batch_norm_batches": recipe.batch_norm_batches, "loader": data.train}
    net: Any = result.model.net if recipe.batch_norm_batches else result.hard  # the latter's norms are folded
    average: nn.Module
    with random_states_kept(seed):  # later stages draw the same with and without averaging
        temperature = recipe.temperature or choose_temperature(
            net, guide, data.validation, recipe.candidates, gate_temperature=gate_temperature, **own
        )
        temperatures: dict[str, Any] = {"temperature": temperature, "gate_temperature": gate_temperature}
        if recipe.pack:
            save(pack_ensemble(result, recipe.samples, **temperatures), directory / ENSEMBLE)
            average = load(directory / ENSEMBLE, net)  # from disk: what is judged is what is kept
        elif guide.estimator == "one_hot" and not recipe.batch_norm_batches:
            average = average_of_packed(load(directory / PACKED, net), recipe.samples, temperature=temperature)
        else:
            average = averaged_network(net, guide, recipe.samples, **temperatures, **own)
    mean = mean_network(result.hard, guide, **temperatures)
    file_bytes = (directory / ENSEMBLE).stat().st_size if recipe.pack else None
    about = {"temperature": temperature, "samples": recipe.samples, "file_bytes": file_bytes}
    return {
        "posterior_mean": asdict(evaluate(mean, data.test)),
        "averaged": {**asdict(evaluate(average, data.test)), **about},
    }


def write_bounds(
    recipe: BoundsRecipe | None,
    result: CompressionResult,
    train: Any,
    seed: int,
    directory: Path,
    progress: Progress,
) -> None:
    """Write the bounds of :func:`run_bounds` and their picture, unless they are left out."""
    if recipe is None:
        return
    bounds = run_bounds(recipe, result, train, seed, progress)
    write_json(directory / BOUNDS, bounds)
    write_bounds_picture(directory / "bounds.png", bounds)


def run_bounds(
    recipe: BoundsRecipe, result: CompressionResult, train: Any, seed: int, progress: Progress = silent
) -> dict[str, Any]:
    """Return what ``bounds.json`` holds: an :func:`elbo_report` at four temperatures, the guide's own first.

    It costs at most ``4 (networks + 1)`` passes over ``examples``, and four times the KL of every weight.

    Args:
        recipe: how much to spend.
        result: the compressed network and its posterior.
        train: minibatches of training data.
        seed: of the draws; the global generators stay as they are.
        progress: told of the stage ``"bounds"``.
    """
    x, y = _first_examples(train, result.model.net, recipe.examples)
    device = device_of(result.model)
    sites = result.guide.site_guides().values()
    densities = sum(site.mask.numel() * site.num_components for site in sites)

    def tell(done: int, total: int) -> None:
        progress("bounds", done, total, f"{len(y)} examples")

    with random_states_kept(seed):
        report = elbo_report(
            result.model,
            result.guide,
            move_to(x, device),
            y.to(device),
            temperatures=[result.guide.temperature * factor for factor in _FACTORS],
            # Of each weight; two at least, as one has no spread to tell its error by.
            num_samples=max(2, min(recipe.draws, _BUDGET // densities)),
            num_particles=recipe.networks,
            standard_error=recipe.standard_error,
            progress=tell,
        )
    return {"num_examples": len(y), **report.to_dict()}


def _first_examples(train: Any, net: nn.Module, count: int) -> tuple[Any, Tensor]:
    """Join minibatches until there are enough; of inputs that are no single tensor, take those of one."""
    xs, ys = [], []
    for x, y in minibatches(train, net, "training"):
        if not isinstance(x, Tensor):
            # Minibatches of several inputs may be padded to different lengths: they cannot be joined.
            return next(split_examples(x, count)), y[:count]
        xs.append(x)
        ys.append(y)
        if sum(map(len, ys)) >= count:
            break
    return torch.cat(xs)[:count], torch.cat(ys)[:count]
