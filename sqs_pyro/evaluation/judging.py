"""How good a network is, in one figure of at most 1, the higher the better."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, constraints

from sqs_pyro.documents import shown
from sqs_pyro.errors import DataError, NetworkError, SQSError, said
from sqs_pyro.evaluation.classification import accuracy
from sqs_pyro.evaluation.input_checks import NO_EXAMPLE, NO_LABEL, named, run
from sqs_pyro.isolation import isolating
from sqs_pyro.models.likelihoods import Categorical
from sqs_pyro.models.observation import Likelihood, base_support, innermost, observe
from sqs_pyro.networks.calling import device_of, move_to
from sqs_pyro.networks.loaders import Loader
from sqs_pyro.networks.minibatches import minibatches
from sqs_pyro.networks.modes import evaluating
from sqs_pyro.ranks import ALONE, Ranks

#: How good a network is on a loader: a figure of at most 1, the higher the better.
Judge: TypeAlias = Callable[[nn.Module, Loader], float]


@dataclass(frozen=True)
class JudgeBy:
    """The judge that a likelihood asks for, from minibatches of what it describes, which ranks can share.

    Of classes the accuracy, of several labels at once the share of labels that are right, of other whole numbers
    of a range the share that are the most probable ones, of counts and real numbers R²; labels that are left out
    count for nothing.

    Attributes:
        likelihood: of the network's output.
    """

    likelihood: Likelihood

    def __call__(self, net: nn.Module, loader: Loader, ranks: Ranks = ALONE) -> float:
        """Return how good a network is, from sums over minibatches that any number of ranks gives alike."""
        how = accuracy if isinstance(self.likelihood, Categorical) else agreement
        return how(net, loader, self.likelihood, ranks)


def judge_by(likelihood: Likelihood) -> JudgeBy:
    """Return the judge that a likelihood asks for."""
    return JudgeBy(likelihood)


def judged(judge: Judge, net: nn.Module, loader: Loader, ranks: Ranks = ALONE) -> float:
    """Return what a judge says.

    Args:
        judge: of the network.
        net: the network.
        loader: whole, on each rank.
        ranks: that call this together; they share the minibatches where the judge is a likelihood's, others are
            asked by the first alone, from whose random numbers all then go on.

    Raises:
        NetworkError: it fails, or says nothing of use: a finite number of at most 1.
    """
    if isinstance(judge, JudgeBy):
        return _checked(partial(judge, net, loader, ranks))
    if ranks.size == 1:
        return _checked(partial(judge, net, loader))
    figure, drawn = ranks.of_leader(lambda: (_checked(partial(judge, net, loader)), pyro.util.get_rng_state()))
    if not ranks.leads:
        pyro.util.set_rng_state(drawn)
    return figure


def _checked(judge: Callable[[], Any]) -> float:
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # a judge may turn gradients off for good
            figure: Any = judge()
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


@isolating("net", sees_parameters=True, sees_autocast=True)
@torch.no_grad()
def agreement(net: nn.Module, loader: Loader, likelihood: Likelihood, ranks: Ranks = ALONE) -> float:
    """Return how well the centre of a network's distribution agrees with what was observed, on a whole loader.

    Of whole numbers of a range the share that are the most probable ones; of counts without an end and of others
    ``R² = 1 - Σ (y - mean)² / Σ (y - ȳ)²``, ȳ of each coordinate (where y is constant, 1 if all are met, else 0).

    Args:
        net: the network.
        loader: minibatches.
        likelihood: of the network's output.
        ranks: that share the minibatches, which each of them has all of, and call this together.

    Raises:
        DataError: the loader is empty, or labels do not fit the network.
        NetworkError: the distribution knows neither mode nor mean.
    """
    own: dict[int, tuple[Tensor, Tensor]] = {}

    def seen() -> list[_Seen]:
        found = []
        for number, centre, value, discrete in _centres(net, loader, likelihood, ranks):
            if not discrete:
                own[number] = centre, value
            sums = (centre == value).sum() if discrete else value.sum(0)
            found.append(_Seen(number, discrete, len(value), sums.cpu()))
        return found

    told = sorted(itertools.chain.from_iterable(ranks.of_each(seen)), key=lambda each: each.number)
    if not told:
        raise DataError(NO_EXAMPLE)
    count = sum(each.size for each in told)
    if told[-1].discrete:
        if not count:
            raise DataError(NO_LABEL)
        return sum(int(each.sums) for each in told) / count
    if len({each.sums.shape for each in told}) == 1:
        mean = _added(each.sums for each in told) / count
    else:  # lengths that differ from minibatch to minibatch
        mean = _added(each.sums.sum() for each in told) / sum(each.size * each.sums.numel() for each in told)

    def squares() -> dict[int, Tensor]:
        return {
            number: torch.stack([(value - centre).square().sum(), (value - mean.to(value)).square().sum()]).cpu()
            for number, (centre, value) in own.items()
        }

    # Sums over all examples: R² of minibatches could not be averaged.
    of_each = dict(itertools.chain.from_iterable(each.items() for each in ranks.of_each(squares)))
    error, spread = _added(of_each[number] for number in sorted(of_each)).tolist()
    return 1 - error / spread if spread > 0 else float(error == 0)


class _Seen(NamedTuple):
    """A minibatch: its number, whether values are counted, how many there are, how many are met or their sum."""

    number: int
    discrete: bool
    size: int
    sums: Tensor


def _added(values: Iterable[Tensor]) -> Tensor:
    """Return the sum of what minibatches give, in their order."""
    return torch.stack([*values]).sum(0)


def _centres(
    net: nn.Module, loader: Loader, likelihood: Likelihood, ranks: Ranks
) -> Iterator[tuple[int, Tensor, Tensor, bool]]:
    """Yield of each minibatch that is this rank's its number, centres, values, and whether these are counted."""
    device = device_of(net)
    with evaluating(net):
        for number, (x, y) in enumerate(minibatches(loader, net, "evaluation"), 1):
            if number % ranks.size != ranks.rank:
                continue
            name = f"Evaluation minibatch {number}"
            output = run(net, move_to(x, device), name)
            with named(name):
                distribution, value = observe(likelihood, output, y.to(device))
            support = base_support(distribution)  # the same in each minibatch
            # A count that is missed by one of a hundred is no miss.
            discrete = support.is_discrete and not isinstance(support, type(constraints.nonnegative_integer))
            centre, known = _centre(distribution, value, discrete)
            pair = (centre[known], value[known]) if discrete else (_by_example(centre), _by_example(value))
            yield number, *pair, discrete


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
