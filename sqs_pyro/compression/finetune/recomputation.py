"""Networks whose forward runs again during the backward pass, when drawn weights are no longer in their place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from sqs_pyro.errors import NetworkError

_SENTENCE = (
    "The network recomputes activations in the backward pass (gradient checkpointing), where drawn weights are no "
    "longer in its place: turn that off, with gradient_checkpointing_disable() in transformers, "
    "set_grad_checkpointing(False) in timm, or by leaving torch.utils.checkpoint out of its forward."
)


@contextmanager
def no_recomputation() -> Iterator[None]:
    """Let recomputation in the backward pass of the body fail as one sentence.

    Raises:
        NetworkError: activations are recomputed, and are not what they were.
    """
    try:
        yield
    except CheckpointError as error:
        raise NetworkError(_SENTENCE) from error


def check_not_recomputed(loss: Tensor) -> None:
    """Check that a loss's graph has no part that runs the forward again (reentrant checkpointing tells nothing).

    Raises:
        NetworkError: it has.
    """
    waiting: list[Any] = [loss.grad_fn]  # not by recursion: graphs are deeper than Python's stack
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # torch's reentrant checkpoint is an autograd function of this name.
        if node.name().startswith("CheckpointFunction"):
            raise NetworkError(_SENTENCE)
        waiting.extend(following for following, _ in node.next_functions)
