"""How good a classifier is, and how far its probabilities can be trusted."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sqs_pyro.errors import DataError, NetworkError
from sqs_pyro.evaluation.input_checks import (
    NO_EXAMPLE,
    NO_LABEL,
    check_inputs,
    check_labels,
    check_observation,
    named,
    run,
)
from sqs_pyro.evaluation.reliability import expected_calibration_error, reliability_curve
from sqs_pyro.isolation import isolating
from sqs_pyro.models.label_distributions import ClassProbabilities
from sqs_pyro.models.likelihoods import Categorical, resolve
from sqs_pyro.models.observation import Likelihood, innermost, observe, settle
from sqs_pyro.networks.calling import device_of, move_to, output_tensor
from sqs_pyro.networks.checks import check_runs
from sqs_pyro.networks.minibatches import minibatches
from sqs_pyro.networks.modes import evaluating
from sqs_pyro.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Evaluation:
    """A classifier on a data set.

    Attributes:
        accuracy: share of examples whose most probable class is right, 0..1.
        nll: mean negative log-likelihood of the labels, nats.
        ece: expected calibration error of the top class, 15 equal bins, 0..1.
        brier: mean squared distance between probabilities and the one-hot label, 0..2.
        entropy: mean entropy of the predicted classes, nats: how unsure the classifier is.
        num_examples: labels evaluated; those that are left out (``ignore_index``) are in no figure.
    """

    accuracy: float
    nll: float
    ece: float
    brier: float
    entropy: float
    num_examples: int


def evaluate(net: nn.Module, loader: Iterable[Any], likelihood: str | Likelihood = "categorical") -> Evaluation:
    """Evaluate a classifier in evaluation mode; every label is an example, be it of an image, a pixel or a token.

    Args:
        net: any module from a minibatch to logits of classes.
        loader: minibatches with labels of the forms that :class:`~sqs_pyro.models.likelihoods.Categorical` knows.
        likelihood: ``"categorical"``, or one with arguments of its own, say the labels to leave out.

    Raises:
        DataError: the loader is empty, or labels or inputs do not fit the network.
        NetworkError: the network cannot run, or gives NaN.
    """
    return summarise(*predict(net, loader, likelihood))


def figures_of_classes(log_p: Tensor, y: Tensor) -> dict[str, Any]:
    """Return what :func:`summarise` says, and the bins of a reliability diagram, as plain data.

    Arguments and errors as of :func:`summarise`.
    """
    found = asdict(summarise(log_p, y))
    labels = y.argmax(-1) if y.dim() == 2 else y
    return {**found, "reliability": reliability_curve(log_p.exp(), labels).to_dict()}


@isolating("net", sees_parameters=True, sees_autocast=True)
@torch.no_grad()
def accuracy(
    net: nn.Module, loader: Iterable[Any], likelihood: str | Likelihood = "categorical", ranks: Ranks = ALONE
) -> float:
    """Return the share of examples whose most probable class is right; arguments and errors as :func:`evaluate`.

    Args:
        ranks: that share the minibatches, which each of them has all of, and call this together.
    """

    def counts() -> Tensor | None:
        found = None
        for log_p, y in _predictions(net, loader, likelihood, ranks):
            _check_labels(log_p, y)
            right = log_p.argmax(-1) == (y.argmax(-1) if y.dim() == 2 else y)
            one = torch.stack([right.sum(), right.new_tensor(len(y), dtype=torch.int64)])
            found = one if found is None else found + one
        return None if found is None else found.cpu()

    known = [each for each in ranks.of_each(counts) if each is not None]
    if not known:
        raise DataError(NO_EXAMPLE)
    right, total = sum(known, torch.zeros(2, dtype=torch.int64)).tolist()
    if not total:
        raise DataError(NO_LABEL)
    return right / total


@isolating("net", sees_parameters=True, sees_autocast=True)
@torch.no_grad()
def predict(
    net: nn.Module, loader: Iterable[Any], likelihood: str | Likelihood = "categorical"
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities ``[n, C]`` and labels ``[n]`` of all labelled examples, in evaluation mode.

    Labels that are probabilities come as they are, ``[n, C]``. Arguments and errors as :func:`evaluate`.
    """
    found = list(_predictions(net, loader, likelihood))
    if not found:
        raise DataError(NO_EXAMPLE)
    log_probs, labels = zip(*found, strict=True)
    return torch.cat(log_probs), torch.cat(labels)


def _predictions(
    net: nn.Module, loader: Iterable[Any], likelihood: str | Likelihood, ranks: Ranks = ALONE
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield log-probabilities and labels of each minibatch that is this rank's."""
    check_runs(net)
    how = resolve(likelihood)
    device = device_of(net)
    with evaluating(net):
        for number, (x, y) in enumerate(minibatches(loader, net, "evaluation"), 1):
            if number % ranks.size != ranks.rank:
                continue
            name = f"Evaluation minibatch {number}"
            x, y = move_to(x, device), y.to(device)
            output = run(net, x, name)
            with named(name):
                how = settle(how, output, y)
                rows, y = _rows(how, output, y)
            log_p = rows.float().log_softmax(-1)  # [n, C]; of log-probabilities it changes nothing
            if log_p.isnan().any():  # is it the data? Only if not, the network is to blame
                check_inputs(x, name)
                raise NetworkError(f"{type(net).__name__} gives NaN for finite inputs: check its weights.")
            yield log_p, y


def _rows(likelihood: Likelihood, output: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits ``[n, C]`` and labels ``[n]`` or ``[n, C]`` of what is labelled."""
    if isinstance(likelihood, Categorical):
        rows, value = likelihood.rows(output, y)
        ignored: int | None = likelihood.ignore_index
    else:
        distribution, value = observe(likelihood, output, y)
        base = innermost(distribution)
        if not isinstance(base, torch.distributions.Categorical):
            raise DataError(
                f"The likelihood's {type(base).__name__} is not of classes, but only classes have these figures: "
                "judge the network by sqs_pyro.evaluation.judging.judge_by(likelihood)."
            )
        rows, ignored = base.logits, getattr(base, "ignore_index", None)
    if value.is_floating_point() and value.shape == rows.shape:
        return rows.flatten(0, -2), value.flatten(0, -2)
    rows, value = rows.flatten(0, -2), value.long().flatten()
    known = torch.ones_like(value, dtype=torch.bool) if ignored is None else value != ignored
    return rows[known], value[known]


@isolating("first", "second", sees_parameters=True, sees_autocast=True)
@torch.no_grad()
def largest_difference(first: nn.Module, second: nn.Module, loader: Iterable[Any]) -> float:
    """Return the largest absolute difference between two networks' predictions, over all examples of a loader.

    Both run in evaluation mode on the device of ``first``.

    Raises:
        DataError: the loader is empty, or its inputs do not fit the networks.
    """
    check_runs(first)
    check_runs(second)
    device = device_of(first)
    differences = []
    with evaluating(first, second):
        for number, (x, _) in enumerate(minibatches(loader, first, "evaluation", labelled=False), 1):
            x, name = move_to(x, device), f"Evaluation minibatch {number}"
            own, other = output_tensor(run(first, x, name)), output_tensor(run(second, x, name))
            differences.append((own - other).abs().max())  # read once, at the end
    if not differences:
        raise DataError("There is no example to compare two networks on: the loader is empty.")
    return float(torch.stack(differences).max())


def _check_labels(log_p: Tensor, y: Tensor) -> None:
    if y.dim() == 2:
        check_observation(ClassProbabilities(log_p), y, "Labels")
    else:
        check_labels(y, log_p.shape[-1])


def summarise(log_p: Tensor, y: Tensor) -> Evaluation:
    """Sum up predictions.

    Args:
        log_p: log-probabilities ``[n, C]``.
        y: labels ``[n]``, or probabilities ``[n, C]``: then NLL is the cross-entropy, and the right class is the
            most probable one.

    Raises:
        DataError: there is no label, or labels do not fit the number of classes.
    """
    classes, p = log_p.shape[-1], log_p.exp()
    if not len(y):
        raise DataError(NO_LABEL)
    _check_labels(log_p, y)
    if y.dim() == 2:
        target, y = y, y.argmax(-1)
        # 0 log 0 is 0, where torch would have NaN.
        nll = float(-(target * log_p.double()).masked_fill(target == 0, 0.0).sum(-1).mean())
    else:
        target, nll = F.one_hot(y, classes), float(F.nll_loss(log_p.double(), y))
    return Evaluation(
        accuracy=float((log_p.argmax(-1) == y).double().mean()),
        nll=nll,
        ece=expected_calibration_error(p, y),
        brier=float((p - target).square().sum(-1).mean()),
        entropy=float(torch.special.entr(p).sum(-1).mean()),
        num_examples=len(y),
    )
