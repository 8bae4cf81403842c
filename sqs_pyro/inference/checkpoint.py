"""Checkpoints of a training run: written whole or not at all, read without executing anything."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.errors import NetworkError, RecipeError
from sqs_pyro.weights import state_difference

BASELINE_KEYS = frozenset({"recipe", "data", "network", "optimizer", "history", "loader_epoch", "rng", "cuda_rng"})


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write beside, then rename: an interruption leaves the previous checkpoint whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_checkpoint(path: Path, keys: frozenset[str] = BASELINE_KEYS) -> dict[str, Any]:
    """Read what :func:`write_checkpoint` wrote, on the CPU; it must hold ``keys``.

    Raises:
        NetworkError: the file is damaged, or is no checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a different class for each kind of damage
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NetworkError(f"Checkpoint '{path}' cannot be read ({reason}): delete it to start again.") from None
    missing = keys - set(state) if isinstance(state, dict) else keys
    if missing:
        raise NetworkError(
            f"'{path}' is no checkpoint of a training run: it has no {', '.join(sorted(missing))}; give "
            f"another path."
        )
    return state


def check_same(what: str, saved: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Check that the run that wrote a checkpoint had the same `what`.

    Raises:
        RecipeError: naming each value that changed.
    """
    changed = [f"{key}: {saved.get(key)!r} -> {now[key]!r}" for key in now if saved.get(key) != now[key]]
    if changed:
        raise RecipeError(
            f"Checkpoint '{path}' was made with another {what} ({', '.join(changed)}): go back to these "
            f"values, or give another checkpoint path to start again."
        )


def check_same_network(saved: Mapping[str, Tensor], net: nn.Module, path: Path) -> None:
    """Check names and shapes of a saved state dict.

    Raises:
        NetworkError: naming the first tensor that differs.
    """
    difference = state_difference(saved, net)
    if difference is not None:
        raise NetworkError(
            f"Checkpoint '{path}' was made for another network: {difference}; give another checkpoint path."
        )
