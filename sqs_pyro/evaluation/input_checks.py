"""What is wrong with a minibatch: what can be said of data and network, and nothing that is only guessed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from sqs_pyro.documents import shown
from sqs_pyro.errors import DataError, NetworkError, SQSError, said
from sqs_pyro.isolation import modes_kept, random_states_kept
from sqs_pyro.models.observation import Likelihood, base_support, innermost, observe, settle
from sqs_pyro.networks.calling import call_arguments, device_of, forward_signature, own_copy, takes, tensors_in
from sqs_pyro.networks.modes import buffers_kept

#: Of evaluations of nothing.
NO_EXAMPLE = "There is no example to evaluate on: the loader is empty."
NO_LABEL = "There is no label to evaluate on: all of them are left out."

_ONE_VALUE = "Expected more than 1 value per channel"  # batch norm of torch, in training


def check_inputs(x: Any, what: str) -> None:
    """Check that inputs are finite.

    Raises:
        DataError: it begins with ``what`` and says how many values are not.
    """
    for tensor in tensors_in(x):
        bad = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
        if bad:
            raise DataError(
                f"{what} holds {bad} values of {tensor.numel()} that are NaN or infinite: clean the data."
            )


def check_labels(labels: Tensor, num_classes: int, what: str = "Labels") -> None:
    """Check that labels are from 0 to ``num_classes - 1``; no label at all is right, too.

    Raises:
        DataError: it begins with ``what`` and names the range that was found.
    """
    if not labels.numel():
        return
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        others = labels[(labels < 0) | (labels >= num_classes)]
        alone = int(others[0]) if bool((others == others[0]).all()) else "k"  # one odd value is a marker, mostly
        raise DataError(
            f"{what} run from {lowest} to {highest}, but the network has {num_classes} classes (labels 0 to "
            f"{num_classes - 1}): use the network and the data that belong together, or leave out labels with "
            f"likelihood=Categorical(ignore_index={alone})."
        )


def check_observation(distribution: TorchDistribution, y: Tensor, what: str) -> None:
    """Check that an observation is one that the distribution can give.

    Raises:
        DataError: it begins with ``what``.
    """
    check_inputs(y, what)
    support = base_support(distribution)
    if isinstance(support, constraints.integer_interval) and isinstance(support.upper_bound, int):
        check_labels(y[y != support.ignored] if hasattr(support, "ignored") else y, support.upper_bound + 1, what)
    if bool(distribution.support.check(y).all()):
        return
    if support is constraints.simplex:  # several hot classes have the same shape as probabilities
        raise DataError(
            f"{what} have the shape of the logits, {list(y.shape)}, but are no probabilities that sum to 1 over "
            "the classes: normalise them, or use likelihood='multilabel' for several classes at once."
        )
    raise DataError(
        f"{what} run from {float(y.min()):g} to {float(y.max()):g}, some of which the likelihood can never give "
        f"(it is a {type(innermost(distribution)).__name__}): correct them, or give another likelihood."
    )


def check_minibatch(
    net: nn.Module,
    likelihood: Likelihood,
    x: Any,
    y: Tensor,
    what: str = "training",
    number: int = 1,
    dtype: torch.dtype | None = None,
) -> Likelihood:
    """Run a network on a minibatch and compare what it says with what was observed; nothing is changed by it.

    Args:
        net: the network; in training mode here if the data is for training, afterwards as it was.
        likelihood: from its output to a distribution.
        x, y: inputs and observations.
        what: the data's name in sentences; ``"training"`` is run as training will.
        number: the minibatch's.
        dtype: of autocast, or None.

    Returns:
        The likelihood with everything settled that a first minibatch settles.

    Raises:
        DataError: the network cannot take the inputs, or the labels do not fit its output.
        NetworkError: its output is not finite, or the likelihood cannot take it.
    """
    name = f"{what.capitalize()} minibatch {number}"
    device = device_of(net)
    with (
        torch.no_grad(),
        _tried(net, what == "training"),
        torch.autocast(device.type, dtype, enabled=dtype is not None),
    ):
        # A copy, as a forward may write into its inputs. What it refuses says more than a NaN in them, which
        # is looked for thereafter.
        output = run(net, own_copy(x), name)
        check_inputs(x, name)
        try:
            with named(name):
                settled = settle(likelihood, output, y)
                distribution, value = observe(settled, output, y)
            check_observation(distribution, value, f"{what.capitalize()} labels in minibatch {number}")
            found = distribution.log_prob(value)
        except SQSError:
            raise
        except Exception as error:  # of the user's likelihood
            # A distribution refuses NaN with an error of its own, which would put the blame on the likelihood.
            if any(not torch.isfinite(t).all() for t in tensors_in(output) if t.is_floating_point()):
                raise _not_finite(net, name) from error
            raise NetworkError(
                f"The likelihood fails for the network's output ({shown(output)}) and labels ({shown(y)}) with "
                f"{said(error)}: give one that takes them."
            ) from error
    if found.is_complex():
        raise NetworkError(
            f"The network's output is complex ({shown(output)}), which the likelihood cannot take: give a "
            "likelihood=callable that makes a distribution of its real part, its absolute value or both parts."
        )
    if not torch.isfinite(found).all():
        raise _not_finite(net, name)
    return settled


def run(net: nn.Module, x: Any, name: str) -> Any:
    """Return the network's output for a minibatch's inputs.

    Raises:
        DataError: it fails; the sentence says what it was given, and its error is the cause.
    """
    args, kwargs = call_arguments(x, net)
    if not takes(net, args, kwargs):
        raise DataError(
            f"{name} gives {shown(x)} to {type(net).__name__}.forward{forward_signature(net)}, which takes other "
            "arguments: make the inputs those of `forward`, a tuple by position or a mapping by name."
        )
    try:
        return net(*args, **kwargs)
    except (SQSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the user's network
        raise _explained(error, net, x, name) from error


@contextmanager
def named(name: str) -> Iterator[None]:
    """Let what a :class:`DataError` says inside begin with this minibatch's name."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{name}: {error}") from error.__cause__


def _explained(error: Exception, net: nn.Module, x: Any, name: str) -> DataError:
    if _ONE_VALUE in str(error):
        return DataError(
            f"{name} has one example, of which batch norm in training can make no statistics: leave it out "
            "(DataLoader(..., drop_last=True)) or choose another batch size."
        )
    own = {p.dtype for p in net.parameters() if p.is_floating_point()}
    # Only a guess where torch's message speaks of types: integers are right for an embedding.
    others = [t for t in tensors_in(x) if t.dtype not in own]
    if others and own and any(word in str(error).lower() for word in ("type", "float", "double", "half", "byte")):
        dtype = next(iter(own))
        of_images = ", of images x.float() / 255" if others[0].dtype == torch.uint8 else ""
        return DataError(
            f"{name} is {shown(others[0])}, but the weights of {type(net).__name__} are "
            f"{str(dtype).removeprefix('torch.')} ({said(error)}): convert the inputs (x.to({dtype}){of_images})."
        )
    repair = "give inputs that it takes"
    signature = forward_signature(net)
    if isinstance(x, Mapping) and signature is not None and call_arguments(x, net)[0]:  # it is given as a whole
        lacking = ", ".join(repr(key) for key in x if key not in signature.parameters)
        repair = f"its forward{signature} has no argument {lacking or 'of these'}, so leave that out or rename it"
    return DataError(
        f"{type(net).__name__} fails on {name[0].lower()}{name[1:]} ({shown(x)}) with {said(error)}: {repair}."
    )


@contextmanager
def _tried(net: nn.Module, training: bool) -> Iterator[None]:
    """Set a network's mode; mode, buffers and random state come back as they were."""
    with modes_kept(net), buffers_kept(net), random_states_kept(), torch.no_grad():
        net.train(training)
        yield


def _not_finite(net: nn.Module, name: str) -> NetworkError:
    return NetworkError(
        f"{type(net).__name__} gives no finite log-probability for {name[0].lower()}{name[1:]}, whose values are "
        "all finite: check its weights, and that the likelihood is the one it was trained for."
    )
