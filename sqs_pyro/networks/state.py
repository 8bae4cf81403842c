"""State dicts from files that others wrote, into networks they must fit exactly."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sqs_pyro.errors import NetworkError, first_line


def fp32_bytes(net: nn.Module) -> int:
    """Return the bytes of a network's floating tensors at 4 bytes an element."""
    return 4 * sum(tensor.numel() for tensor in net.state_dict().values() if tensor.is_floating_point())


def load_weights(net: nn.Module, path: str | Path) -> None:
    """Read a state dict into a network, in place. Nothing in the file is executed.

    Args:
        net: the network.
        path: of safetensors, or of what ``torch.save`` wrote, whatever its suffix: a mapping of names to tensors,
            or one that holds it at ``"state_dict"``, ``"model"`` or ``"network"``.

    Raises:
        NetworkError: the file is missing, unreadable or of another network, or holds weights that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise NetworkError(f"The file of weights '{path}' does not exist: correct the path.")
    state = _read_state(path)
    difference = state_difference(state, net)
    if difference is not None:
        raise NetworkError(
            f"The weights in '{path}' are another network's: {difference}; give the weights of this network or "
            "change its options."
        )
    check_finite(state, net, path)
    net.load_state_dict(state)


def check_finite(state: Mapping[str, Tensor], net: nn.Module, path: str | Path) -> None:
    """Check that the weights of a network, which came from ``path``, are finite.

    Raises:
        NetworkError: some are not.
    """
    buffers = {name for name, _ in net.named_buffers()}  # which may hold infinity, as masks of attention do
    for name, tensor in state.items():
        right = ~torch.isnan(tensor) if name in buffers else torch.isfinite(tensor)
        if not right.all():
            raise NetworkError(
                f"The weights in '{path}' hold values of '{name}' that are not finite: give others."
            )


def state_difference(state: Mapping[str, Tensor], net: nn.Module) -> str | None:
    """Return a clause on the first tensor that is absent or of another shape in a state dict or in ``net``."""
    here = {name: list(tensor.shape) for name, tensor in net.state_dict().items()}
    there = {name: list(tensor.shape) for name, tensor in state.items()}
    for name in [*here, *there]:  # the network's own order first: the sentence names its first layer
        if there.get(name) != here.get(name):
            return f"'{name}' is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
    return None


def _is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors do: eight bytes, and a JSON object."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if _is_safetensors(path):
            return load_file(path)
        with path.open("rb") as file:  # torch believes the suffix of a path
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, LookupError, ValueError):  # torch's text advises to run what is in the file
        raise NetworkError(
            f"The weights in '{path}' cannot be read (neither safetensors nor tensors that torch.save wrote): "
            "fetch them again, or save `net.state_dict()` instead of the network."
        ) from None
    except Exception as error:  # each library and each kind of damage raises a class of its own
        reason = first_line(error)
        raise NetworkError(f"The weights in '{path}' cannot be read ({reason}): fetch them again.") from None
    for key in ("state_dict", "model", "network"):  # one within another, too
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise NetworkError(f"'{path}' holds no state dict (names to tensors): save `net.state_dict()`.")
    return content
