"""The KL's bounds at the end of a run, as numbers and as a picture."""

from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.compression.finetune.call import CompressionResult
from sqs_pyro.inference.elbo_report import elbo_report
from sqs_pyro.networks.calling import device_of, move_to, split_examples
from sqs_pyro.networks.minibatches import minibatches
from sqs_pyro.runs.bounds_recipe import BoundsRecipe
from sqs_pyro.runs.progress import Progress, silent

_FACTORS = tuple(20 ** (i / 3) for i in range(4))  # of the final temperature; 20 is where the default τ starts
_BUDGET = 2 * 10**7  # log-densities of one component, a temperature


def run_bounds(
    recipe: BoundsRecipe, result: CompressionResult, train: Any, seed: int, progress: Progress = silent
) -> dict[str, Any]:
    """What ``bounds.json`` holds: an :func:`elbo_report` at four temperatures, the guide's own first.

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

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        report = elbo_report(
            result.model,
            result.guide,
            move_to(x, device),
            y.to(device),
            temperatures=[result.guide.temperature * factor for factor in _FACTORS],
            num_samples=max(2, min(recipe.draws, _BUDGET // densities)),
            num_particles=recipe.networks,
            standard_error=recipe.standard_error,
            progress=tell,
        )
    return {"num_examples": len(y), **report.to_dict()}


def _first_examples(train: Any, net: nn.Module, count: int) -> tuple[Any, Tensor]:
    """Minibatches joined until there are enough; of inputs that are no single tensor, those of one minibatch."""
    xs, ys = [], []
    for x, y in minibatches(train, net, "training"):
        if not isinstance(x, Tensor):
            return next(split_examples(x, count)), y[:count]
        xs.append(x)
        ys.append(y)
        if sum(map(len, ys)) >= count:
            break
    return torch.cat(xs)[:count], torch.cat(ys)[:count]
