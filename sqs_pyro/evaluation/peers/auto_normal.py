"""Mean-field variational inference by Pyro's own guide: a normal distribution for every weight."""

import copy
from collections.abc import Iterable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import nn

from sqs_pyro.arguments import is_whole
from sqs_pyro.documents import shown
from sqs_pyro.errors import ArgumentError
from sqs_pyro.evaluation.averaging import AveragedNetwork, average_of_guide
from sqs_pyro.isolation import isolating
from sqs_pyro.models.bayesian import BayesianNetwork, Prior
from sqs_pyro.models.observation import Likelihood
from sqs_pyro.networks.calling import device_of, move_to
from sqs_pyro.networks.loaders import examples_an_epoch
from sqs_pyro.networks.minibatches import minibatches


@isolating("net")
def auto_normal(
    net: nn.Module,
    loader: Iterable[Any],
    num_samples: int = 20,
    *,
    prior: Prior | None = None,
    likelihood: str | Likelihood = "categorical",
    include: str | None = ".*",
    epochs: int = 10,
    learning_rate: float = 1e-3,
    initial_scale: float = 0.01,
    seed: int | None = 0,
) -> AveragedNetwork:
    """Fit Pyro's ``AutoNormal`` to a network by ``SVI``, and average networks drawn from it.

    Args:
        net: a trained network, whose weights are the first means; it stays as it is.
        loader: minibatches of training data.
        num_samples: S, networks to draw.
        prior: of the weights, as of :class:`~sqs_pyro.models.BayesianNetwork`; None: ``Normal(0, 1)``.
        likelihood: as of the network.
        include: names of the parameters that are random, all by default; others are learned as they are.
        epochs: passes over the training data.
        learning_rate: of Adam.
        initial_scale: the first standard deviation of every weight.
        seed: of the draws.

    Raises:
        ArgumentError: an impossible argument.
        NetworkError: as of :class:`~sqs_pyro.models.BayesianNetwork`.
    """
    for name, value in (("num_samples", num_samples), ("epochs", epochs)):
        if not is_whole(value, 1):
            raise ArgumentError(f"{name} is {shown(value)}, but must be at least 1.")
    device = device_of(net)
    examples = examples_an_epoch(loader, net)
    standard = dist.Normal(torch.zeros((), device=device), torch.ones((), device=device))
    model = BayesianNetwork(
        copy.deepcopy(net).train(), standard if prior is None else prior, likelihood, examples, include
    )
    first = init_to_value(values=model.site_values())
    guide = AutoNormal(model, init_loc_fn=first, init_scale=initial_scale)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": learning_rate}), TraceMeanField_ELBO())
    for _ in range(epochs):
        for x, y in minibatches(loader, net, "training"):
            svi.step(move_to(x, device), y.to(device))
    return average_of_guide(model, guide, num_samples)
