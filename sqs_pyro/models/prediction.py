"""Prediction and training are told apart by what Pyro does, not by a flag that somebody may forget to set."""

from collections.abc import Iterator
from contextlib import contextmanager

from pyro import poutine
from torch import nn


def predicting() -> bool:
    """Whether densities are not asked for, as in :class:`pyro.infer.Predictive`: what is drawn is a prediction."""
    return poutine.get_mask() is False


@contextmanager
def evaluation_mode(net: nn.Module) -> Iterator[None]:
    """Evaluation mode of a network and all in it, which are put back as they were."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
