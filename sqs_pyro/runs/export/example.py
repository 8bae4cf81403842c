"""Inputs that an export is made from, and compared on, with what the packed network gives for them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.errors import SQSError
from sqs_pyro.exporting.examples import random_inputs, random_text
from sqs_pyro.exporting.trace import one_sentence, outputs
from sqs_pyro.networks.calling import move_to, split_examples
from sqs_pyro.networks.tokens import vocabulary_size
from sqs_pyro.runs.files import opened
from sqs_pyro.runs.kinds import kind_of

#: Minibatches, each with the outputs that are expected.
Batches = list[tuple[Any, tuple[Tensor, ...]]]


@dataclass(frozen=True, eq=False)
class Example:
    """Inputs of a minibatch, or None.

    Attributes:
        inputs: two rows or more.
        said: where they come from.
        expected: minibatches with the packed network's outputs: all rows, and the first alone.
    """

    inputs: Any
    said: str
    expected: Batches


def example_of(
    net: nn.Module,
    path: Path,
    shape: Sequence[int] | None,
    data_from: str | Path | None,
    *,
    needed: bool,
    device: torch.device,
) -> Example:
    """Return inputs for a network and what it gives for them.

    Args:
        net: the packed network.
        path: where it is from.
        shape: of a random example, without batch; None: of the file's own data.
        data_from: recipe that says which data that is.
        needed: whether there must be one.
        device: where the packed network runs.

    Raises:
        DataError, RecipeError, NetworkError: there is none, but one is needed or was asked for.
    """
    try:
        inputs, said = random_inputs(net, shape) if shape is not None else _own(net, path, data_from)
        with one_sentence("run on the example"):
            # A batch of another size, too: a trace that has fixed the batch is found out.
            parts = (inputs, next(split_examples(inputs, 1)))
            there = copy.deepcopy(net).to(device) if device.type != "cpu" else net
            expected = [tuple(each.cpu() for each in outputs(there, move_to(part, device))) for part in parts]
            return Example(inputs, said, list(zip(parts, expected, strict=True)))
    except SQSError as error:
        # A dense export only compares with it: without one, and if none was asked for, the export is still good.
        if needed or shape is not None or data_from is not None:
            hint = "" if shape is not None else " Or give --input-shape, for random inputs."
            raise type(error)(f"{error}{hint}") from None  # of the same class, by which callers tell errors
        return Example(None, f"none: {error}", [])


def _own(net: nn.Module, path: Path, data_from: str | Path | None) -> tuple[Any, str]:
    """Return inputs of the kind that a file is of; of a Hugging Face directory of text, random tokens."""
    if path.is_dir() and data_from is None and vocabulary_size(net) is not None:
        return random_text(net, path)
    source = opened(path, data_from)
    return kind_of(source.document).example(net, source)
