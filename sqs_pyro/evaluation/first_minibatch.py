"""The first minibatch is tried through network, likelihood, labels and judge before anything is trained."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sqs_pyro.errors import DataError
from sqs_pyro.evaluation.input_checks import check_minibatch
from sqs_pyro.evaluation.judging import Judge, judged
from sqs_pyro.models.likelihoods import Categorical
from sqs_pyro.models.observation import Likelihood
from sqs_pyro.networks.calling import device_of, move_to, split_examples, tensors_in
from sqs_pyro.networks.loaders import (
    Loader,
    check_repeatable,
    check_training_loader,
    examples_an_epoch,
    undisturbed,
)
from sqs_pyro.networks.minibatches import minibatches
from sqs_pyro.shipping.shipped import copied


@dataclass(frozen=True)
class FirstMinibatch:
    """What the first minibatch has settled.

    Attributes:
        likelihood: with everything decided that labels decide.
        num_data: N, examples that an epoch yields.
        labels: classes that an example has, on average: 1, or as many as pixels or tokens that count.
    """

    likelihood: Likelihood
    num_data: int
    labels: float = 1.0


def try_first_minibatch(
    net: nn.Module,
    train: Loader,
    likelihood: Likelihood,
    *,
    validation: Loader | None = None,
    judge: Judge | None = None,
    dtype: torch.dtype | None = None,
) -> FirstMinibatch:
    """Try training and validation data, network, likelihood and judge on each other, before anything is trained.

    Networks, loaders and random state are as before, but for state that a data set keeps to itself.

    Args:
        net: the network.
        train: minibatches to train on, see :func:`~sqs_pyro.networks.minibatches.split_minibatch`.
        likelihood: from the network's output to a distribution.
        validation: minibatches to judge by, or None.
        judge: of the user's own, tried on the whole validation data; None tries the labels alone.
        dtype: of autocast in training, or None.

    Raises:
        DataError, NetworkError: one sentence that says what does not fit, and what would.
    """
    check_training_loader(train)
    settled = try_loader(net, train, likelihood, "training", dtype)
    num_data = examples_an_epoch(train, net)  # after a minibatch is known to be one: counting may read them all
    _try_last(net, train, settled, num_data, dtype)
    if validation is not None:
        check_repeatable(validation, "validation")
        if judge is None:
            try_loader(net, validation, settled, "validation")
        else:
            with undisturbed(validation):
                # Of a copy, as in training: a judge may change what it is given.
                judged(judge, copied(net).eval(), validation)
    return FirstMinibatch(settled, num_data, _labels(net, train, settled))


def _labels(net: nn.Module, train: Loader, likelihood: Likelihood) -> float:
    """Return how many classes an example of the first minibatch has that counts for anything."""
    if not isinstance(likelihood, Categorical) or likelihood.class_axis is None:  # not settled: there is one
        return 1.0
    with undisturbed(train):
        for _, y in minibatches(train, net, "training"):
            if y.dim() < 2 or y.is_floating_point():  # probabilities are of one example
                return 1.0
            axis = likelihood.class_axis
            one_hot = axis < y.dim() and bool((y >= 0).all()) and bool((y.sum(axis) == 1).all())
            known = int(y.sum() if one_hot else (y != likelihood.ignore_index).sum())
            if known:
                return max(known / len(y), 1.0)
    return 1.0


def try_loader(
    net: nn.Module, loader: Loader, likelihood: Likelihood, what: str, dtype: torch.dtype | None = None
) -> Likelihood:
    """Return the likelihood as a loader's first minibatch settles it; errors as :func:`try_first_minibatch`.

    A minibatch whose labels are all left out settles nothing, so that the next one is tried.
    """
    device, number = device_of(net), 0
    with undisturbed(loader):
        for number, (x, y) in enumerate(minibatches(loader, net, what), 1):
            x, y = move_to(x, device), y.to(device)
            settled = check_minibatch(eager(net), likelihood, x, y, what, number, dtype)
            ignored = getattr(settled, "ignore_index", None)
            if ignored is None or bool((y != ignored).any()):
                return settled
    if not number:
        raise DataError(f"There is no {what} minibatch: the loader is empty.")
    raise DataError(
        f"Every one of the {what} labels is {ignored}, which is left out: give labels that count, or a likelihood "
        "with another ignore_index."
    )


def first_inputs(loader: Loader, net: nn.Module) -> Any | None:
    """Return inputs of a loader's first minibatch, on the network's device; None of an empty one."""
    with undisturbed(loader):
        x, _ = next(minibatches(loader, net, "training", labelled=False), (None, None))
    return move_to(x, device_of(net))


def eager(net: nn.Module) -> nn.Module:
    """Return what ``torch.compile`` has wrapped: one pass is not worth compiling for."""
    return getattr(net, "_orig_mod", net)


def _try_last(
    net: nn.Module, train: Loader, likelihood: Likelihood, num_data: int, dtype: torch.dtype | None
) -> None:
    """Try a last minibatch of one example, if there will be one, under batch norm."""
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules()):
        return
    device = device_of(net)
    with undisturbed(train):
        x, y = next(minibatches(train, net, "training"))
        # N = k B + 1, and none dropped: the last minibatch would fail after a whole epoch.
        if len(y) < 2 or num_data % len(y) != 1 or len(train) * len(y) < num_data or not tensors_in(x):
            return
        one = next(split_examples(x, 1))
        check_minibatch(
            eager(net), likelihood, move_to(one, device), y[:1].to(device), "training", len(train), dtype
        )
