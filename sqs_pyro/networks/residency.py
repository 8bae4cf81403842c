"""Which weights of a network are in memory: all of them, or those of the part that is at work."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import nn


class Residency(Protocol):
    """Brings the parameters of a part of a network into memory, for as long as it is at work.

    Attributes:
        whole: whether all weights are in memory at all times.
    """

    whole: bool

    def held(self, part: nn.Module, without: Sequence[nn.Module] = ()) -> AbstractContextManager[None]:
        """Hold the parameters of ``part``, those inside the modules ``without`` excepted."""
        ...


class InMemory:
    """The whole network is in memory: there is nothing to do."""

    whole = True

    def held(self, part: nn.Module, without: Sequence[nn.Module] = ()) -> AbstractContextManager[None]:
        """Nothing happens."""
        return nullcontext()
