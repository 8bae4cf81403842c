"""How minibatches enter a network and predictions come out of it, whoever made the network."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.errors import NetworkError
from sqs_pyro.substitution import call_with


def call_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a network's call: a mapping becomes keywords, a tuple positions."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def output_tensor(output: Any) -> Tensor:
    """The tensor of predictions in a network's output: itself, its ``logits``, or its first element.

    Raises:
        NetworkError: the output holds no tensor that could be the predictions.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise NetworkError(
        f"The network returned a {type(output).__name__} without 'logits': give a likelihood=callable that "
        "turns this output into a distribution."
    )


def predictions(net: nn.Module, inputs: Any) -> Tensor:
    """Run ``net`` on a minibatch's inputs and return its predictions."""
    args, kwargs = call_arguments(inputs)
    return output_tensor(net(*args, **kwargs))


def average_log_probabilities(
    net: nn.Module,
    draws: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    draws_at_once: int = 1,
) -> Tensor:
    """``log 1/S Σ_s softmax(f(x; θ_s))``, ``[B, C]``, of S networks that differ in some of their tensors.

    Args:
        net: f, a module from inputs to logits.
        draws: θ, tensors ``[S, *shape]`` by name of parameter or buffer.
        args, kwargs: x, the network's arguments.
        draws_at_once: networks that run together, by ``torch.vmap``; 1 is a loop.
    """

    def log_probabilities(tensors: dict[str, Tensor]) -> Tensor:
        return output_tensor(call_with(net, tensors, args, kwargs)).float().log_softmax(-1)

    num_draws = len(next(iter(draws.values())))
    if draws_at_once > 1:
        every = torch.vmap(log_probabilities, chunk_size=draws_at_once)(dict(draws))
    else:
        each = ({name: tensor[s] for name, tensor in draws.items()} for s in range(num_draws))
        every = torch.stack([log_probabilities(tensors) for tensors in each])
    return every.logsumexp(0) - math.log(num_draws)


def move_to(inputs: Any, device: torch.device) -> Any:
    """The same inputs, every tensor on ``device``."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    if isinstance(inputs, Mapping):
        return {key: move_to(value, device) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(move_to(value, device) for value in inputs)
    return inputs


def split_examples(inputs: Any, size: int) -> Iterator[Any]:
    """A minibatch's inputs as smaller ones of at most ``size`` examples, tensors cut along their first dimension.

    What is no tensor goes with each of them.
    """
    count = len(tensors_in(inputs)[0])
    for start in range(0, count, size):
        part = slice(start, start + size)
        if isinstance(inputs, Tensor):
            yield inputs[part]
        elif isinstance(inputs, Mapping):
            yield {key: value[part] if isinstance(value, Tensor) else value for key, value in inputs.items()}
        else:
            yield tuple(value[part] if isinstance(value, Tensor) else value for value in inputs)


def tensors_in(inputs: Any) -> list[Tensor]:
    """The tensors of a minibatch's inputs."""
    args, kwargs = call_arguments(inputs)
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def device_of(net: nn.Module) -> torch.device:
    """Where a network's first parameter or buffer is; the CPU if it has none."""
    return next((tensor.device for tensor in (*net.parameters(), *net.buffers())), torch.device("cpu"))
