"""Hidden states on their way through blocks."""

from collections.abc import Iterable

from torch import Tensor, nn

from sqs_pyro.networks.block_stack import BlockArguments, run_block

#: Hidden states and the blocks' other arguments, a minibatch each.
States = list[tuple[Tensor, list[BlockArguments]]]


def advance(block: nn.Module, states: States, i: int) -> list[Tensor]:
    """Return the hidden states behind a block."""
    return [run_block(block, hidden, arguments[i]) for hidden, arguments in states]


def behind(outputs: Iterable[Tensor], states: States) -> States:
    """Return states with the outputs of a block in place of the hidden states before it."""
    return [(output, arguments) for output, (_, arguments) in zip(outputs, states, strict=True)]
