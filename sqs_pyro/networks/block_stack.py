"""A network as a stack of blocks that hand on a hidden state, each called on its own as the network calls it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.errors import NetworkError
from sqs_pyro.networks.calling import call_arguments

#: What a block is called with behind the hidden state: positional and keyword arguments.
BlockArguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Entrance:
    """What reaches the blocks for one minibatch.

    Attributes:
        hidden: the hidden state before the first block, ``[B, T, D]``.
        arguments: of each block, all but the hidden state (masks, position embeddings, ...).
    """

    hidden: Tensor
    arguments: list[BlockArguments]


class _LastBlockReached(Exception):
    """The blocks' arguments are known: the rest of the network need not run."""


class BlockStack:
    """The blocks of a network; what stands before them runs once, and none of the code between them is rewritten.

    Args:
        net: the network, say a transformers model.
        blocks: its blocks in the order of their calls. Each takes a hidden state ``[B, T, D]`` as its first
            argument and returns the next one, alone or first in a tuple.
        stepped_over: whether the network needs nothing but the hidden state from a block, so that blocks need not
            run before what reaches them is known.

    Raises:
        NetworkError: there are no blocks, or one is not part of the network.
    """

    def __init__(self, net: nn.Module, blocks: Sequence[nn.Module], *, stepped_over: bool = True) -> None:
        inside = {id(module) for module in net.modules()}
        if not blocks or any(id(block) not in inside for block in blocks):
            raise NetworkError(
                f"The {len(blocks)} blocks given are not blocks of this {type(net).__name__}: give those that its "
                "forward calls, in order."
            )
        self.net, self.blocks, self.stepped_over = net, list(blocks), stepped_over

    def __len__(self) -> int:
        return len(self.blocks)

    @torch.no_grad()
    def entrance(self, inputs: Any) -> Entrance:
        """Run the network up to its first block; blocks are stepped over, so that their weights do not matter.

        Args:
            inputs: of the network, as :func:`~sqs_pyro.networks.calling.call_arguments` takes them.

        Raises:
            NetworkError: the network does not call its blocks in this order, once each.
        """
        args, kwargs = call_arguments(inputs)
        seen: list[tuple[Tensor, BlockArguments]] = []
        with self._recording(seen), _without_cache(self.net):
            try:
                self.net(*args, **kwargs)
            except _LastBlockReached:
                return Entrance(seen[0][0], [arguments for _, arguments in seen])
        raise NetworkError(
            f"{type(self.net).__name__} called {len(seen)} of its {len(self)} blocks: give those that every "
            "forward calls, in order."
        )

    @torch.no_grad()
    def exit_input(self, inputs: Any, hidden: Tensor, layer: nn.Module) -> Tensor:
        """Return what a layer behind the last block is called with, ``[..., M]``; no stepped-over block runs.

        Args:
            inputs: of the network.
            hidden: what the last block gives, ``[B, T, D]``.
            layer: a module that the network calls behind its blocks.

        Raises:
            NetworkError: the network does not call it there.
        """
        args, kwargs = call_arguments(inputs)
        with self._giving(hidden), _without_cache(self.net), _input_seen(layer) as seen:
            try:
                self.net(*args, **kwargs)
            except _LayerReached:
                return seen[0]
        raise NetworkError(f"This {type(self.net).__name__} does not call its {type(layer).__name__} {layer}.")

    @contextmanager
    def _giving(self, hidden: Tensor) -> Iterator[None]:
        """In place of the hidden state that each block gives, hand on ``hidden``."""

        def giver(own: Callable[..., Any]) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                output = hidden if self.stepped_over else own(*args, **kwargs)
                return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

            return forward

        try:
            for block in self.blocks:
                block.forward = giver(block.forward)
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)

    @contextmanager
    def _recording(self, seen: list[tuple[Tensor, BlockArguments]]) -> Iterator[None]:
        """In place of each block's own ``forward``, note the arguments and hand on the hidden state unchanged."""

        def recorder(index: int, own: Callable[..., Any]) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                given = dict(kwargs)
                # By name, too: the first parameter of transformers' blocks is called so.
                hidden, rest = (args[0], args[1:]) if args else (given.pop("hidden_states"), ())
                if index != len(seen):
                    raise NetworkError(
                        f"{type(self.net).__name__} called block {index} of {len(self)} as number {len(seen)}: "
                        "give the blocks in the order of their calls."
                    )
                seen.append((hidden, (rest, given)))
                if index + 1 == len(self):
                    raise _LastBlockReached
                return hidden if self.stepped_over else own(*args, **kwargs)

            return forward

        try:
            for index, block in enumerate(self.blocks):
                block.forward = recorder(
                    index, block.forward
                )  # on the instance: attributes of the block stay readable
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)


@contextmanager
def called_as(blocks: Sequence[nn.Module], others: Sequence[nn.Module]) -> Iterator[None]:
    """Let the network around some blocks compute with ``others`` in their places."""
    try:
        for block, other in zip(blocks, others, strict=True):
            block.forward = other.forward  # on the instance: the block stays in its place
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


@contextmanager
def _without_cache(net: nn.Module) -> Iterator[None]:
    """Causal networks keep keys and values by default; a block that is called again would attend to old ones."""
    found = (getattr(module, "config", None) for module in net.modules())
    configs: dict[int, Any] = {id(config): config for config in found if getattr(config, "use_cache", False)}
    try:
        for config in configs.values():  # a network of several parts has one for each
            config.use_cache = False
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


def run_block(block: nn.Module, hidden: Tensor, arguments: BlockArguments) -> Tensor:
    """Return the hidden state behind a block, ``[B, T, D]``."""
    args, kwargs = arguments
    output = block(hidden, *args, **kwargs)  # transformers' blocks give tuples or tensors, by release
    return output if isinstance(output, Tensor) else output[0]


class _LayerReached(Exception):
    """The input that was wanted is known: the rest of the block need not run."""


def input_of(layer: nn.Module, block: nn.Module, hidden: Tensor, arguments: BlockArguments) -> Tensor:
    """Return what a layer inside a block is called with, ``[..., M]``; the block runs up to there.

    Raises:
        NetworkError: the block does not call the layer.
    """
    with _input_seen(layer) as seen:
        try:
            run_block(block, hidden, arguments)
        except _LayerReached:
            return seen[0]
    raise NetworkError(f"This {type(block).__name__} does not call its {type(layer).__name__} {layer}.")


@contextmanager
def _input_seen(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Note what a layer is called with, and stop there by :class:`_LayerReached`."""
    seen: list[Tensor] = []

    def stop(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _LayerReached

    # By an exception out of a hook: what is computed before the layer is the network's own code, as it stands.
    hook = layer.register_forward_pre_hook(stop)
    try:
        yield seen
    finally:
        hook.remove()
