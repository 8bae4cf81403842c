"""A network in evaluation mode for a while, and buffers that are afterwards as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sqs_pyro.isolation import modes_kept


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Run a block with networks in evaluation mode; afterwards every module is in its own mode again.

    The flag of each module is set, and nobody's ``train`` or ``eval`` is called: what those do besides (merge
    weights, say) could not be taken back.
    """
    with modes_kept(*networks):
        for net in networks:
            for module in net.modules():
                module.training = False
        yield


@contextmanager
def buffers_kept(net: nn.Module) -> Iterator[None]:
    """Run a block after which a network has the same buffers, with the same values."""
    held = [(module, name, buffer) for module in net.modules() for name, buffer in module._buffers.items()]
    values = [None if buffer is None else buffer.detach().clone() for _, _, buffer in held]
    try:
        yield
    finally:
        for (module, name, buffer), value in zip(held, values, strict=True):
            if buffer is not None and value is not None and not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)  # in place: others may hold it
            module._buffers[name] = buffer  # a forward may have hung another in its place
