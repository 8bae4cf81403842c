"""What is asked of a loader before it is trained on: how many examples it has, whether it can be repeated."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from sqs_pyro.errors import DataError, said
from sqs_pyro.isolation import isolated
from sqs_pyro.networks.minibatches import minibatches


class Loader(Protocol):
    """Minibatches (x, y). A loader with an attribute `epoch` is resumed exactly, see `ArrayLoader`."""

    def __len__(self) -> int:
        """Number of minibatches."""

    def __iter__(self) -> Iterator[Any]: ...


def check_training_loader(loader: Any) -> None:
    """Check that a loader says how much there is to train on, and that it is something.

    Raises:
        DataError: it has no length or no data set, or is empty.
    """
    if not hasattr(loader, "__len__") or not hasattr(loader, "dataset"):
        raise DataError(
            f"The training data is a {type(loader).__name__}, but must say how much there is: give a torch "
            "DataLoader, or any iterable of (x, y) with len(loader) minibatches and len(loader.dataset) examples."
        )
    try:
        empty = len(loader) == 0 or len(loader.dataset) == 0
    except TypeError as error:
        raise DataError(
            f"The training data ({type(loader.dataset).__name__}) has no length ({said(error)}), but the schedule "
            "and the KL's weight follow from it: give its class a method __len__, the number of examples."
        ) from error
    if empty:
        raise DataError("There is no minibatch to train on: the training data is empty.")


def check_repeatable(loader: Any, what: str) -> None:
    """Check that a loader can be gone through again and again.

    Raises:
        DataError: it is an iterator or a generator.
    """
    if isinstance(loader, Iterator):
        raise DataError(
            f"The {what} data is a {type(loader).__name__}, which ends after one pass, but is gone through after "
            "every epoch: give a list of minibatches or a torch DataLoader."
        )


def examples_an_epoch(loader: Any, net: nn.Module | None = None) -> int:
    """N: how many examples an epoch of a loader yields, whatever its data set, sampler and collation are.

    What data set and sampler say is believed where the first minibatch and the number of minibatches agree with
    it; otherwise the examples of one pass are counted.
    """
    if isinstance(loader, Sequence):
        return _counted(loader, net)
    own = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    batches: Any = loader.batch_sampler if own else None
    with undisturbed(loader):
        if batches is not None and not (type(batches) is BatchSampler and hasattr(batches.sampler, "__len__")):
            return sum(len(list(indices)) for indices in batches)
        counted: Any = loader.dataset if batches is None else batches.sampler
        said = len(counted)
        if batches is not None and batches.drop_last:
            said -= said % batches.batch_size
        first = next((len(y) for _, y in minibatches(loader, net, "training")), 0)
        # A loader of one's own may leave out the last, smaller minibatch of an order that is new in every epoch:
        # all of its examples are data.
        left_out = max(first - 1, 0) if batches is None else 0
        agree = first * (len(loader) - 1) < said <= first * len(loader) + left_out
        return said if agree else _counted(loader, net)


def _counted(loader: Loader, net: nn.Module | None) -> int:
    return sum(len(y) for _, y in minibatches(loader, net, "training"))


@contextmanager
def undisturbed(*loaders: Any) -> Iterator[None]:
    """Look into loaders without changing what they yield later: random state, generators, epochs as before."""
    epochs = [(loader, loader.epoch) for loader in loaders if hasattr(loader, "epoch")]
    generators = [(g, g.get_state()) for loader in loaders for g in _generators(loader)]
    try:
        with isolated(sees_parameters=True, sees_autocast=True):
            yield
    finally:
        for generator, state in generators:
            generator.set_state(state)
        for loader, epoch in epochs:
            loader.epoch = epoch


def _generators(loader: Any) -> list[torch.Generator]:
    samplers = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    samplers += [getattr(sampler, "sampler", None) for sampler in samplers]
    inside = getattr(loader, "loader", None)
    found = [getattr(owner, "generator", None) for owner in (loader, *samplers)]
    own = [generator for generator in found if isinstance(generator, torch.Generator)]
    return own if inside is None else own + _generators(inside)
