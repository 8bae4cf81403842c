"""The inputs of a loader's first minibatch, read without changing what the loader yields later."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def first_inputs(loader: Any) -> Any | None:
    """Inputs of the first minibatch; None of an iterator, which would have lost it, and of an empty loader.

    Args:
        loader: minibatches, each a sequence that begins with its inputs.
    """
    if isinstance(loader, Iterator):
        return None
    with _undisturbed(loader):
        batch = next(iter(loader), None)
    return None if batch is None else batch[0]


@contextmanager
def _undisturbed(loader: Any) -> Iterator[None]:
    owners = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    generators = [(each, each.get_state()) for each in found if isinstance(each, torch.Generator)]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 (what data sets may draw from)
    epoch = getattr(loader, "epoch", None)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        for generator, state in generators:
            generator.set_state(state)
        if epoch is not None:
            loader.epoch = epoch
