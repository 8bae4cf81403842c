"""The KL's bounds at the end of a run, as numbers and as a picture."""

from typing import Any

import torch
from torch import Tensor

from sqs_pyro.compression import CompressionResult
from sqs_pyro.inference.elbo_report import elbo_report
from sqs_pyro.network_io import device_of, move_to

_FACTORS = tuple(20 ** (i / 3) for i in range(4))  # of the final temperature; 20 is where the default τ starts
_EXAMPLES, _PARTICLES = 256, 4
_MOST_SAMPLES, _BUDGET = 4, 2 * 10**7  # log-densities of one component, a temperature


def run_bounds(result: CompressionResult, train: Any, seed: int) -> dict[str, Any]:
    """What ``bounds.json`` holds: an :func:`elbo_report` at four temperatures, the guide's own first.

    It costs seconds: the likelihood is that of the first examples alone, and large networks get fewer Monte
    Carlo draws a weight, but at least 2.

    Args:
        result: the compressed network and its posterior.
        train: minibatches of training data.
        seed: of the draws; the global generators stay as they are.
    """
    x, y = _first_examples(train)
    device = device_of(result.model)
    sites = result.guide.site_guides().values()
    densities = sum(site.mask.numel() * site.num_components for site in sites)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        report = elbo_report(
            result.model,
            result.guide,
            move_to(x, device),
            y.to(device),
            temperatures=[result.guide.temperature * factor for factor in _FACTORS],
            num_samples=max(2, min(_MOST_SAMPLES, _BUDGET // densities)),
            num_particles=_PARTICLES,
        )
    return {"num_examples": len(y), **report.to_dict()}


def _first_examples(train: Any) -> tuple[Any, Tensor]:
    """Minibatches joined until there are enough; inputs that are no single tensor give one minibatch."""
    xs, ys = [], []
    for x, y in train:
        xs.append(x)
        ys.append(y)
        if not isinstance(x, Tensor):
            return x, y
        if sum(map(len, ys)) >= _EXAMPLES:
            break
    return torch.cat(xs)[:_EXAMPLES], torch.cat(ys)[:_EXAMPLES]
