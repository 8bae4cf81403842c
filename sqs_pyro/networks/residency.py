"""Which weights of a network are in memory: all of them, or those of the part that is at work."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from torch import nn

from sqs_pyro.fingerprint import network_fingerprint, tensors_fingerprint


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
        """Do nothing: all of it is held."""
        return nullcontext()


@contextmanager
def called_whole(net: nn.Module, blocks: Sequence[nn.Module], residency: Residency) -> Iterator[None]:
    """Let a network be called as a whole: each block is held while it is at work, all else all the time.

    Of a streamed network every call reads every block.
    """

    def holding(block: nn.Module) -> Callable[..., Any]:
        forward = block.forward

        def held_forward(*args: Any, **kwargs: Any) -> Any:
            with residency.held(block):
                return forward(*args, **kwargs)

        return held_forward

    if residency.whole:
        yield
        return
    with residency.held(net, without=blocks):
        try:
            for block in blocks:
                block.forward = holding(block)  # on the instance: attributes of the block stay readable
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)


def resident_fingerprint(net: nn.Module, blocks: Sequence[nn.Module], residency: Residency) -> dict[str, str]:
    """Return the fingerprint of a network; of a streamed one every weight is read for it once."""
    with residency.held(net, without=blocks):
        found = network_fingerprint(net)  # without what is on the meta device: blocks follow one by one
    if residency.whole:
        return found
    paths = {id(module): path for path, module in net.named_modules()}
    for block in blocks:
        with residency.held(block):
            found |= tensors_fingerprint(block, f"{paths[id(block)]}.")
    return found
