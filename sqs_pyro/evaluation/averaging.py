"""Predictors out of one posterior: the average over drawn networks, and the network of mean weights.

The third is the most probable network (:func:`~sqs_pyro.shipping.pack.hard_network`), which is what is shipped.
All are modules from a minibatch to logits or log-probabilities, so whatever evaluates one evaluates the others.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro.infer import Predictive
from torch import Tensor, nn

from sqs_pyro.arguments import is_whole
from sqs_pyro.distributions.temperatures import check_temperatures
from sqs_pyro.documents import shown
from sqs_pyro.errors import ArgumentError
from sqs_pyro.evaluation.classification import Evaluation, evaluate
from sqs_pyro.inference.guides.batch_norm import warn_of_batch_norm
from sqs_pyro.inference.guides.checks import check_like_sites
from sqs_pyro.inference.guides.posterior import PosteriorGuide
from sqs_pyro.isolation import isolating
from sqs_pyro.kernels.placing import unpack_weights
from sqs_pyro.models.bayesian import BayesianNetwork
from sqs_pyro.networks.calling import device_of
from sqs_pyro.networks.drawn import AverageOfDraws, leave_to_draws
from sqs_pyro.packing.stored import stored_weights
from sqs_pyro.shipping.pack import batch_norm_statistics, network_with, reestimate_batch_norm
from sqs_pyro.shipping.widths import needed_widths


class AveragedNetwork(AverageOfDraws):
    """Log-probabilities of a mixture of networks: ``log 1/S Σ_s softmax(f(x; θ_s))``, ``[B, C]``.

    The drawn tensors are made once; no Pyro model is traced. What a draw does not name (norms and their
    statistics, biases) is the network's own and the same for all draws. Several threads may call it at once.

    Args:
        net: it is copied, and runs in evaluation mode.
        draws: for each network, its tensors by name of parameter or buffer.
        draws_at_once: networks that run together, by ``torch.vmap``; 1 runs one after the other, which is faster
            on CPUs (``benchmarks/draws.py``).

    Attributes:
        class_axis, draws_used: see :class:`~sqs_pyro.networks.drawn.AverageOfDraws`.

    Raises:
        ArgumentError: there is no draw, or ``draws_at_once`` is below 1.
        NetworkError: draws are not the network's.
    """

    def __init__(self, net: nn.Module, draws: Sequence[Mapping[str, Tensor]], draws_at_once: int = 1) -> None:
        super().__init__()
        if not draws or not is_whole(draws_at_once, 1):
            raise ArgumentError(
                f"An average over {len(draws)} networks, {draws_at_once} at once, is impossible: both must be at "
                "least 1."
            )
        self.net = copy.deepcopy(net)
        self.num_draws, self.draws_at_once = len(draws), draws_at_once
        tensors = self.net.state_dict(keep_vars=True)
        for name in draws[0]:
            for draw in draws:
                check_like_sites("draw", name, draw[name], tensors)
            stacked = torch.stack([draw[name] for draw in draws]).to(tensors[name])  # its dtype and device
            # [S, ...]; buffers, so that they move with the module. Their names may not hold dots.
            self.register_buffer(name.replace(".", "/"), stacked, persistent=False)
        # The copy's own tensors would be dead weight: each is stood in for by the draws.
        leave_to_draws(self.net, {id(tensors[name]): name for name in draws[0]})
        self.eval()

    def draws(self) -> dict[str, Tensor]:
        """Return the drawn tensors, ``[S, *shape]`` by name."""
        return {name.replace("/", "."): stacked for name, stacked in self._buffers.items() if stacked is not None}

    @property
    def called_like(self) -> nn.Module:
        """The network to which arguments are handed on."""
        return self.net


@isolating("net", sees_parameters=True)
def averaged_network(
    net: nn.Module,
    guide: PosteriorGuide,
    num_samples: int = 20,
    *,
    temperature: float | None = None,
    gate_temperature: float | None = None,
    batch_norm_batches: int = 0,
    loader: Iterable[Any] = (),
    draws_at_once: int = 1,
    seed: int | None = None,
) -> AveragedNetwork:
    """Draw networks from a guide and average them.

    Args:
        net: what the draws are weights of: ``result.hard`` of a compression, so that draws use the shipped
            network's norms, or ``model.net``.
        guide: the posterior.
        num_samples: S, networks to draw.
        temperature, gate_temperature: see :meth:`SpikeGMMGuide.evaluation_temperatures`.
        batch_norm_batches: minibatches of ``loader`` from which batch-norm statistics are estimated anew for each
            draw; 0 uses those of ``net`` for all. Needs a network whose batch norms are not folded: ``model.net``.
        loader: minibatches of training data for that.
        draws_at_once: see :class:`AveragedNetwork`.
        seed: of the draws; without it they follow torch's random state, which stays as it is, so that the same
            call draws the same again.
    """
    if not is_whole(num_samples, 1):
        raise ArgumentError(f"num_samples is {shown(num_samples)}, but must be at least 1 network.")
    if not batch_norm_batches and getattr(guide, "stage", None) == "dense":
        warn_of_batch_norm(guide.model, guide)
    draws = []
    for draw in guide.draw_weights(num_samples, temperature, gate_temperature):
        draws.append(with_own_statistics(net, draw, loader, batch_norm_batches))
    return AveragedNetwork(net, draws, draws_at_once)


@isolating("model", sees_parameters=True)
def average_of_guide(
    model: BayesianNetwork, guide: Callable[..., Any], num_samples: int = 20, seed: int | None = None
) -> AveragedNetwork:
    """Draw networks from any guide of a Bayesian network, as Pyro's ``Predictive`` does, and average them.

    Args:
        model: the Bayesian network; what of it is no site is its network's own, and the same for all draws.
        guide: a trained guide, an ``AutoNormal`` say, that was called before or needs no arguments.
        num_samples: S, networks to draw.
        seed: of the draws; without it they follow torch's random state, which stays as it is.
    """
    if not is_whole(num_samples, 1):
        raise ArgumentError(f"num_samples is {shown(num_samples)}, but must be at least 1 network.")
    sites = model.site_values()
    with torch.no_grad():
        samples = Predictive(guide, num_samples=num_samples, return_sites=tuple(sites))()
    draws = [{name: samples[name][s].reshape(sites[name].shape) for name in sites} for s in range(num_samples)]
    return AveragedNetwork(model.net, draws)


@isolating("packed", sees_parameters=True)
def average_of_packed(
    packed: nn.Module, num_samples: int = 10, *, temperature: float = 1.0, seed: int | None = 0
) -> AveragedNetwork:
    """Draw networks from the posterior that a packed file keeps beside its network, and average them.

    A weight that is not zero is drawn from ``N(c, T σ²)`` around its codeword; zeros, norms and biases are the
    packed network's. See :mod:`sqs_pyro.shipping.widths`.

    Args:
        packed: as compressed with the allocation ``rate_distortion``, or loaded from such a file.
        num_samples: S, networks to draw.
        temperature: T.
        seed: of the draws, so that one file has one average; None follows torch's random state.

    Raises:
        NetworkError: it is no packed network, or has no widths.
        ArgumentError: a number that is impossible.
    """
    if not is_whole(num_samples, 1):
        raise ArgumentError(f"num_samples is {shown(num_samples)}, but must be at least 1 network.")
    check_temperatures(temperature=temperature)
    widths = needed_widths(packed)
    weights = {name: weight.coded() for name, weight in stored_weights(packed).items()}
    spread = {name: math.sqrt(temperature) * widths[name] * weights[name].mask for name in weights}
    centre = {name: weight.dense() for name, weight in weights.items()}
    draws = [
        {name: value + spread[name] * torch.randn(value.shape) for name, value in centre.items()}
        for _ in range(num_samples)
    ]
    return AveragedNetwork(unpack_weights(copy.deepcopy(packed)), draws).to(device_of(packed))


def with_own_statistics(
    net: nn.Module, draw: Mapping[str, Tensor], loader: Iterable[Any], batch_norm_batches: int
) -> dict[str, Tensor]:
    """Return a draw's tensors with batch-norm statistics estimated for it: it has activations of its own.

    Args:
        net: the network.
        draw: its tensors by name of parameter.
        loader: minibatches of training data.
        batch_norm_batches: how many of them are used; 0 adds no statistics.
    """
    if not batch_norm_batches:
        return dict(draw)
    one = network_with(net, draw)
    reestimate_batch_norm(one, loader, batch_norm_batches)
    return {**draw, **batch_norm_statistics(one)}


def mean_network(
    net: nn.Module,
    guide: PosteriorGuide,
    *,
    temperature: float | None = None,
    gate_temperature: float | None = None,
) -> nn.Module:
    """Return a copy of ``net`` with the posterior's means ``E θ`` for weights: sparse where pruned, not discrete.

    Args:
        net, temperature, gate_temperature: as for :func:`averaged_network`.
        guide: the posterior.
    """
    return network_with(net, guide.mean(temperature, gate_temperature))


@isolating("model", sees_parameters=True)
def evaluate_averaged(
    model: nn.Module,
    guide: PosteriorGuide,
    loader: Iterable[Any],
    num_samples: int = 20,
    temperature: float | None = None,
    gate_temperature: float | None = None,
) -> Evaluation:
    """Evaluate the Bayesian average over networks drawn from the guide of a ``BayesianNetwork``.

    The same ``num_samples`` discrete networks (gates and codes drawn once) answer every minibatch; their
    probabilities are averaged.

    Args:
        model: the Bayesian network.
        guide: its guide.
        loader: minibatches.
        num_samples: networks to draw.
        temperature, gate_temperature: see :meth:`SpikeGMMGuide.evaluation_temperatures`.
    """
    net = averaged_network(
        model.net,  # type: ignore[arg-type]
        guide,
        num_samples,
        temperature=temperature,
        gate_temperature=gate_temperature,
    )
    return evaluate(net, loader)


@isolating("net", sees_parameters=True)
def choose_temperature(
    net: nn.Module,
    guide: PosteriorGuide,
    validation: Iterable[Any],
    candidates: Sequence[float],
    num_samples: int = 5,
    gate_temperature: float | None = None,
    batch_norm_batches: int = 0,
    loader: Iterable[Any] = (),
) -> float:
    """Return the evaluation temperature of the smallest NLL on validation data.

    Args:
        net, guide: as for :func:`averaged_network`.
        validation: minibatches that neither training nor the final figures use.
        candidates: temperatures to try.
        num_samples: networks drawn at each.
        gate_temperature: of the gates alone; by default they follow each candidate.
        batch_norm_batches, loader: as for :func:`averaged_network`.

    Raises:
        ArgumentError: there is no candidate, or one is not above 0.
    """
    if not candidates:
        raise ArgumentError("There is no temperature to choose from: give at least one candidate.")

    def nll(temperature: float) -> float:
        average = averaged_network(
            net,
            guide,
            num_samples,
            temperature=temperature,
            gate_temperature=gate_temperature,
            batch_norm_batches=batch_norm_batches,
            loader=loader,
        )
        return evaluate(average, validation).nll

    return min(candidates, key=nll)  # `isolating` without a seed: every candidate draws from the same state
