"""A network as a graph with a dynamic batch: where AOTInductor and ONNX begin."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from sqs_pyro.errors import NetworkError
from sqs_pyro.networks.calling import call_arguments

NETWORK = "network"  # the traced module's child, before every name in the graph


class Positional(nn.Module):
    """A network that takes tensors in a row and gives a tensor, or a tuple where it gives several.

    Args:
        network: the network.
        inputs: of a minibatch, as the network takes them; a mapping's keys say how the tensors are handed over.

    Raises:
        NetworkError: an input is no tensor.
    """

    def __init__(self, network: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.network = network
        # Names stay outside of the graph, which has tensors in a row.
        self.names = tuple(inputs) if isinstance(inputs, Mapping) else None
        for value in input_tensors(inputs):
            if not isinstance(value, Tensor) or value.dim() == 0:
                raise NetworkError(
                    f"An input of the network is {value!r}, but an export takes tensors with a batch only."
                )

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the tensors in the network's output, in order."""
        args, kwargs = call_arguments(
            tensors if self.names is None else dict(zip(self.names, tensors, strict=True))
        )
        if getattr(getattr(self.network, "config", None), "use_cache", False):
            kwargs["use_cache"] = False  # of transformers: a cache is no output
        # Outputs of transformers are classes of their own; leaves are in the order of their fields.
        found = tuple(leaf for leaf in tree_leaves(self.network(*args, **kwargs)) if isinstance(leaf, Tensor))
        return found[0] if len(found) == 1 else found


def input_tensors(inputs: Any) -> tuple[Any, ...]:
    """Return the values of a minibatch's inputs in a row."""
    args, kwargs = call_arguments(inputs)
    return (*args, *kwargs.values())


def input_names(inputs: Any) -> list[str]:
    """Return a name for each of them: a mapping's keys, else ``x``, or ``x_0``, ``x_1``, ..."""
    if isinstance(inputs, Mapping):
        return list(inputs)
    count = len(input_tensors(inputs))
    return ["x"] if count == 1 else [f"x_{i}" for i in range(count)]


def named_arrays(inputs: Any, taken: Iterable[str]) -> dict[str, Any]:
    """Return a minibatch's inputs as NumPy arrays by name, those that a model takes: unused ones it has not."""
    given = dict(zip(input_names(inputs), input_tensors(inputs), strict=True))
    wanted = set(taken)
    return {name: tensor.numpy() for name, tensor in given.items() if name in wanted}


def outputs(net: nn.Module, inputs: Any) -> tuple[Tensor, ...]:
    """Return the tensors in a network's output, without gradients."""
    with torch.inference_mode():
        found = Positional(net, inputs)(*input_tensors(inputs))
    return (found,) if isinstance(found, Tensor) else found


def trace(net: nn.Module, inputs: Any, *, up_to_example: bool = False) -> ExportedProgram:
    """Trace a network; its parameters stand in the graph under ``network.<name>``.

    The first dimension of every input is dynamic. Of inputs that a mapping names, as tokens are, so is the second
    where the network allows it.

    Args:
        net: the network, in evaluation mode.
        inputs: an example, two rows or more.
        up_to_example: whether what is dynamic is at most as large as the example.

    Raises:
        NetworkError: it does not take these inputs, or does what a graph cannot say.
    """
    module, tensors = Positional(net, inputs), input_tensors(inputs)
    # One batch for all inputs: they grow together.
    batch = Dim("batch", max=len(tensors[0]) if up_to_example else None)
    shapes = []
    for value in tensors:
        # AUTO: a network that fixes its length is traced with that length, instead of refused.
        auto = Dim.AUTO(max=value.shape[1]) if up_to_example and value.dim() > 1 else Dim.AUTO
        length = {1: auto} if module.names is not None and value.dim() > 1 else {}
        shapes.append({0: batch, **length})
    with torch.no_grad(), one_sentence("traced"):
        return torch.export.export(module, tensors, dynamic_shapes=(tuple(shapes),))


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Turn what torch's tracers and compilers raise, of many classes, into one sentence; hide their warnings."""
    try:
        # Tracers warn of their own workings, which no user can change.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None:  # the last in a chain tells of steps, the first of the network
            first = first.__cause__
        lines = [line.strip() for line in str(first).splitlines() if line.strip()] or [type(first).__name__]
        raise NetworkError(
            f"The network cannot be {what} ({lines[0].rstrip(' .:')}): check the example's shape against its "
            "inputs, and that its forward does not depend on values of tensors."
        ) from error
