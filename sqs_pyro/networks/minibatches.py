"""How minibatches come out of a loader, whoever made it: inputs, observations, and how many there are."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from sqs_pyro.documents import shown
from sqs_pyro.errors import DataError, SQSError, said
from sqs_pyro.isolation import isolated
from sqs_pyro.networks.calling import forward_signature, takes

#: Names under which a mapping, a named tuple or an object has its observations.
LABELS = ("labels", "label", "label_ids", "targets", "target", "y")
#: The value of a label that is to be left out, torch's and transformers' own.
IGNORED = -100

_FORMS = "give pairs (x, y), of several inputs ((u, v), y) or ({'u': u, 'v': v}, y), or a mapping with 'labels'"


def minibatches(
    loader: Iterable[Any], net: nn.Module | None, what: str, labelled: bool = True
) -> Iterator[tuple[Any, Any]]:
    """Inputs and observations of every minibatch of a loader.

    Args:
        loader: see :func:`split_minibatch` for what it may yield.
        net: the network that is given the inputs.
        what: the loader's name in sentences, say ``"training"``.
        labelled: whether observations are asked for; otherwise they come as they are, None too.

    Raises:
        DataError: the loader itself fails (its error is the cause), or a minibatch has an unknown form or no
            example; the minibatch is named by its number.
    """
    try:
        batches = iter(loader)
    except TypeError as error:
        raise DataError(
            f"The {what} data is a {type(loader).__name__}, but minibatches must come out of it: give a torch "
            "DataLoader or any iterable of (x, y)."
        ) from error
    number = 0
    while True:
        number += 1
        try:
            batch = next(batches)
        except StopIteration:
            return
        except SQSError:
            raise
        except Exception as error:  # of the user's own data set
            raise DataError(
                f"The {what} data failed at minibatch {number} with {said(error)}: repair the data set."
            ) from error
        yield split_minibatch(batch, net, f"{what.capitalize()} minibatch {number}", labelled)


def split_minibatch(
    batch: Any, net: nn.Module | None = None, name: str = "A minibatch", labelled: bool = True
) -> tuple[Any, Any]:
    """A minibatch's inputs, as :func:`~sqs_pyro.networks.calling.call_arguments` takes them, and its observations.

    ========================================  ==================================================================
    ``(x, y)``, ``[x, y]``                    x is the input; a tuple, list or mapping of inputs if it is one
    ``(u, v, ..., y)``                        several inputs, if ``forward`` needs all of them
    mapping, named tuple, dataclass, object   what is named in :data:`LABELS` is observed, the rest are inputs
    numpy arrays, lists of numbers            tensors
    ========================================  ==================================================================

    Labels of a causal language model that repeat its ``input_ids`` are moved on by one, as transformers does
    within its loss: token t is foretold from those before it.

    Args:
        batch: what a loader yields.
        net: the network that is given the inputs; its signature decides where the form leaves it open.
        name: of the minibatch, in sentences.
        labelled: whether observations are asked for.

    Raises:
        DataError: it cannot be told what is observed, or there is no example.
    """
    inputs, y, named = _parts(batch, net, name)
    if inputs is None:
        raise DataError(f"{name} has None for its input: {_FORMS}.")
    inputs = _as_tensors(inputs, name)
    if not labelled:
        return inputs, y
    y = _observation(y, name)
    if not len(y):
        raise DataError(f"{name} is empty (labels of the shape {list(y.shape)}): leave it out.")
    return inputs, _next_tokens(net, inputs, y, named)


def _parts(batch: Any, net: nn.Module | None, name: str) -> tuple[Any, Any, bool]:
    """Inputs, observations, and whether these were found by name."""
    if isinstance(batch, Mapping):
        inputs, y = _by_name(dict(batch), net, name)
        return inputs, y, True
    if isinstance(batch, PackedSequence) or not isinstance(batch, (tuple, list)):
        return _of_object(batch, net, name)
    fields = getattr(batch, "_fields", None)
    if fields is not None and sum(field in LABELS for field in fields) == 1:
        inputs, y = _by_name(dict(zip(fields, batch, strict=True)), net, name)
        return _positions_unless_keywords(inputs, net), y, True
    if len(batch) == 2:
        return batch[0], batch[1], False
    if len(batch) > 2 and net is not None and takes(net, batch[:-1], {}) and not takes(net, batch[:1], {}):
        return tuple(batch[:-1]), batch[-1], False
    raise DataError(
        f"{name} has {len(batch)} parts ({', '.join(map(shown, batch))}), of which {_forward(net)} does not say "
        f"which are inputs and which is observed: {_FORMS} (weights of single examples are not known)."
    )


def _by_name(parts: dict[Any, Any], net: nn.Module | None, name: str) -> tuple[dict[Any, Any], Any]:
    signature = None if net is None else forward_signature(net)
    needed = () if signature is None else tuple(k for k, p in signature.parameters.items() if p.default is p.empty)
    found = [key for key in LABELS if key in parts and key not in needed]
    if len(found) != 1:
        raise DataError(
            f"{name} has {', '.join(map(repr, parts)) or 'nothing'}, of which "
            f"{'none is' if not found else ' and '.join(map(repr, found)) + ' could be'} what is observed: name "
            "the labels 'labels', or give pairs (inputs, labels)."
        )
    return {key: value for key, value in parts.items() if key != found[0]}, parts[found[0]]


def _positions_unless_keywords(inputs: dict[Any, Any], net: nn.Module | None) -> Any:
    """Of a named tuple: keywords where ``forward`` knows the names, else its inputs in their order."""
    if net is not None and takes(net, (), inputs) and not takes(net, (), {"no such name": None}):
        return inputs
    return next(iter(inputs.values())) if len(inputs) == 1 else tuple(inputs.values())


def _of_object(batch: Any, net: nn.Module | None, name: str) -> tuple[Any, Any, bool]:
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        inputs, y = _by_name({f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}, net, name)
        return _positions_unless_keywords(inputs, net), y, True
    plain = batch is None or isinstance(batch, (Tensor, np.ndarray, PackedSequence, str, bytes, int, float))
    found = [] if plain else [key for key in LABELS if getattr(batch, key, None) is not None]
    if len(found) != 1:
        raise DataError(f"{name} is {shown(batch)}, in which nothing is named as what is observed: {_FORMS}.")
    return batch, getattr(batch, found[0]), True  # a graph goes to the network as a whole


def _as_tensors(value: Any, name: str) -> Any:
    """The same with tensors in place of numpy arrays and of lists of numbers."""
    try:
        if isinstance(value, (np.ndarray, np.generic)):
            return torch.tensor(value)
        if _is_numbers(value):
            return torch.tensor(value)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name} holds {shown(value)}, which is no tensor ({said(error)}): give numbers."
        ) from error
    if isinstance(value, PackedSequence) or not isinstance(value, (Mapping, tuple, list)):
        return value
    if isinstance(value, Mapping):
        if not any(isinstance(item, (np.ndarray, np.generic, list)) for item in value.values()):
            return value
        return {key: _as_tensors(item, name) for key, item in value.items()}
    found = [_as_tensors(item, name) for item in value]
    if all(new is old for new, old in zip(found, value, strict=True)):
        return value
    return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)


def _is_numbers(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, (bool, int, float, np.generic)) or _is_numbers(item) for item in value)
    )


def _observation(y: Any, name: str) -> Tensor:
    if isinstance(y, (list, tuple)) and y and all(isinstance(item, Tensor) and not item.dim() for item in y):
        y = torch.stack(list(y))
    if not isinstance(y, PackedSequence):
        y = _as_tensors(list(y) if isinstance(y, tuple) and not hasattr(y, "_fields") else y, name)
    if not isinstance(y, Tensor) or y.dim() == 0 or y.is_complex():
        raise DataError(
            f"{name} has {shown(y)} for labels, but one tensor with the examples in its first dimension is "
            "needed: collate them into it."
        )
    return y


def _next_tokens(net: nn.Module | None, inputs: Any, y: Tensor, named: bool) -> Tensor:
    tokens = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if net is None or not _is_causal(net) or not isinstance(tokens, Tensor) or tokens.shape != y.shape:
        return y
    known, tokens = y != IGNORED, tokens.to(y.device)
    repeated = bool(((y == tokens) | ~known).all())
    already = bool(((y[:, :-1] == tokens[:, 1:]) | ~known[:, :-1]).all()) and not repeated
    if repeated or (named and not already):
        return torch.cat([y[:, 1:], torch.full_like(y[:, :1], IGNORED)], 1)
    return y


def _is_causal(net: nn.Module) -> bool:
    """Whether transformers would compare this network's output with the *next* label."""
    while isinstance(inside := getattr(net, "called_like", getattr(net, "module", None)), nn.Module):
        net = inside
    return any(kind.__name__.endswith(("ForCausalLM", "LMHeadModel")) for kind in type(net).__mro__)


def check_training_loader(loader: Any) -> None:
    """Check that a loader says how much there is to train on, and that it is something.

    Raises:
        DataError: it has no length or no data set, or is empty.
    """
    if not hasattr(loader, "__len__") or not hasattr(loader, "dataset"):
        raise DataError(
            f"The training data is a {type(loader).__name__}, but must say how much there is: give a torch "
            "DataLoader, or any iterable of (x, y) with len(loader) minibatches and len(loader.dataset) examples."
        )
    try:
        empty = len(loader) == 0 or len(loader.dataset) == 0
    except TypeError as error:
        raise DataError(
            f"The training data ({type(loader.dataset).__name__}) has no length ({said(error)}), but the schedule "
            "and the KL's weight follow from it: give its class a method __len__, the number of examples."
        ) from error
    if empty:
        raise DataError("There is no minibatch to train on: the training data is empty.")


def check_repeatable(loader: Any, what: str) -> None:
    """Check that a loader can be gone through again and again.

    Raises:
        DataError: it is an iterator or a generator.
    """
    if isinstance(loader, Iterator):
        raise DataError(
            f"The {what} data is a {type(loader).__name__}, which ends after one pass, but is gone through after "
            "every epoch: give a list of minibatches or a torch DataLoader."
        )


def examples_an_epoch(loader: Any, net: nn.Module | None = None) -> int:
    """N: how many examples an epoch of a loader yields, whatever its data set, sampler and collation are.

    What data set and sampler say is believed where the first minibatch and the number of minibatches agree with
    it; otherwise the examples of one pass are counted.
    """
    if isinstance(loader, Sequence):
        return _counted(loader, net)
    own = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    batches: Any = loader.batch_sampler if own else None
    with undisturbed(loader):
        if batches is not None and not (type(batches) is BatchSampler and hasattr(batches.sampler, "__len__")):
            return sum(len(list(indices)) for indices in batches)
        counted: Any = loader.dataset if batches is None else batches.sampler
        said = len(counted)
        if batches is not None and batches.drop_last:
            said -= said % batches.batch_size
        first = next((len(y) for _, y in minibatches(loader, net, "training")), 0)
        # A loader of one's own may leave out the last, smaller minibatch of an order that is new in every epoch:
        # all of its examples are data.
        left_out = max(first - 1, 0) if batches is None else 0
        agree = first * (len(loader) - 1) < said <= first * len(loader) + left_out
        return said if agree else _counted(loader, net)


def _counted(loader: Any, net: nn.Module | None) -> int:
    return sum(len(y) for _, y in minibatches(loader, net, "training"))


@contextmanager
def undisturbed(*loaders: Any) -> Iterator[None]:
    """Look into loaders without changing what they yield later: random state, generators, epochs as before."""
    epochs = [(loader, loader.epoch) for loader in loaders if hasattr(loader, "epoch")]
    generators = [(g, g.get_state()) for loader in loaders for g in _generators(loader)]
    try:
        with isolated(sees_parameters=True, sees_autocast=True):
            yield
    finally:
        for generator, state in generators:
            generator.set_state(state)
        for loader, epoch in epochs:
            loader.epoch = epoch


def _generators(loader: Any) -> list[torch.Generator]:
    samplers = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    samplers += [getattr(sampler, "sampler", None) for sampler in samplers]
    inside = getattr(loader, "loader", None)
    found = [getattr(owner, "generator", None) for owner in (loader, *samplers)]
    own = [generator for generator in found if isinstance(generator, torch.Generator)]
    return own if inside is None else own + _generators(inside)


def _forward(net: nn.Module | None) -> str:
    if net is None:
        return "nothing"
    return f"{type(net).__name__}.forward{forward_signature(net) or '(...)'}"
