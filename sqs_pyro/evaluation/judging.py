"""How good a network is, in one figure of at most 1, the higher the better."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, constraints

from sqs_pyro.documents import shown
from sqs_pyro.errors import DataError, NetworkError, SQSError, said
from sqs_pyro.evaluation.classification import accuracy
from sqs_pyro.evaluation.input_checks import named, run
from sqs_pyro.models.likelihoods import Categorical
from sqs_pyro.models.observation import Likelihood, base_support, innermost, observe
from sqs_pyro.networks.calling import device_of, move_to
from sqs_pyro.networks.loaders import Loader
from sqs_pyro.networks.minibatches import minibatches
from sqs_pyro.networks.modes import evaluating

#: How good a network is on a loader: a figure of at most 1, the higher the better.
Judge: TypeAlias = Callable[[nn.Module, Loader], float]


def judge_by(likelihood: Likelihood) -> Judge:
    """Return the judge that a likelihood asks for, from minibatches of what it describes.

    Of classes the accuracy, of several labels at once the share of labels that are right, of other whole numbers
    of a range the share that are the most probable ones, of counts and real numbers R²; labels that are left out
    count for nothing.
    """
    if isinstance(likelihood, Categorical):
        return lambda net, loader: accuracy(net, loader, likelihood)
    return lambda net, loader: agreement(net, loader, likelihood)


def judged(judge: Judge, net: nn.Module, loader: Loader) -> float:
    """Return what a judge says.

    Raises:
        NetworkError: it fails, or says nothing of use: a finite number of at most 1.
    """
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # a judge may turn gradients off for good
            figure: Any = judge(net, loader)
    except SQSError:
        raise
    except Exception as error:  # of the user's judge
        raise NetworkError(
            f"The judge fails on the validation data with {said(error)}: correct it, or leave it out; by default "
            "the likelihood decides how a network is judged."
        ) from error
    figure = figure.detach() if isinstance(figure, Tensor) else figure
    try:
        value = float(figure)
    except (TypeError, ValueError, RuntimeError):
        value = math.nan
    if not value <= 1 + 1e-6 or math.isinf(value):  # NaN is refused, too; means of ones may round above 1
        raise NetworkError(
            f"The judge says {value if math.isfinite(value) else shown(figure)}, but must give one finite number "
            "of at most 1, the higher the better: an accuracy, or 1 minus an error."
        )
    return value


@torch.no_grad()
def agreement(net: nn.Module, loader: Loader, likelihood: Likelihood) -> float:
    """Return how well the centre of a network's distribution agrees with what was observed, on a whole loader.

    Of whole numbers of a range the share that are the most probable ones; of counts without an end and of others
    ``R² = 1 - Σ (y - mean)² / Σ (y - ȳ)²``, ȳ of each coordinate (where y is constant, 1 if all are met, else 0).

    Raises:
        DataError: the loader is empty, or labels do not fit the network.
        NetworkError: the distribution knows neither mode nor mean.
    """
    device = device_of(net)
    found, observed, discrete = [], [], False
    with evaluating(net):
        for number, (x, y) in enumerate(minibatches(loader, net, "evaluation"), 1):
            name = f"Evaluation minibatch {number}"
            output = run(net, move_to(x, device), name)
            with named(name):
                distribution, value = observe(likelihood, output, y.to(device))
            support = base_support(distribution)  # the same in each minibatch
            # A count that is missed by one of a hundred is no miss.
            discrete = support.is_discrete and not isinstance(support, type(constraints.nonnegative_integer))
            centre, known = _centre(distribution, value, discrete)
            found.append(centre[known] if discrete else _by_example(centre))
            observed.append(value[known] if discrete else _by_example(value))
    if not observed:
        raise DataError("There is no example to evaluate on: the loader is empty.")
    if len({part.shape[1:] for part in observed}) > 1:  # lengths that differ from minibatch to minibatch
        found, observed = [part.flatten() for part in found], [part.flatten() for part in observed]
    centres, values = torch.cat(found), torch.cat(observed)
    if discrete:
        if not len(values):
            raise DataError("There is no label to evaluate on: all of them are left out.")
        return float((centres == values).double().mean())
    # Sums over all examples: R² of minibatches could not be averaged.
    error, spread = (values - centres).square().sum(), (values - values.mean(0)).square().sum()
    return float(1 - error / spread) if float(spread) > 0 else float(error == 0)


def _by_example(values: Tensor) -> Tensor:
    """Bring to ``[B, n]`` numbers of any shape ``[B, ...]``, one an example where that is ``[B]``."""
    return values.reshape(len(values), -1).double()


def _centre(distribution: Any, value: Tensor, discrete: bool) -> tuple[Tensor, Tensor]:
    """Return the most probable value or the mean, and which labels count."""
    base = innermost(distribution)
    try:
        centre = _most_probable(base) if discrete else distribution.mean
    except NotImplementedError as error:
        raise NetworkError(
            f"The likelihood's {type(base).__name__} has no {'mode' if discrete else 'mean'} to judge the network "
            "by: give a judge."
        ) from error
    ignored = getattr(base, "ignore_index", None)
    known = torch.ones_like(value, dtype=torch.bool) if ignored is None else value != ignored
    return centre, known


def _most_probable(base: Any) -> Tensor:
    if isinstance(base, Bernoulli):  # its own mode is NaN at 1/2
        return (base.logits > 0).to(base.logits.dtype)
    return base.mode
