"""Plain checkpoints: every weight decoded, for the original network."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sqs_pyro.atomic import appearing
from sqs_pyro.errors import NetworkError
from sqs_pyro.exporting.exported import Exported, check_one_network
from sqs_pyro.exporting.suffixes import check_suffix
from sqs_pyro.kernels.network import dense_state
from sqs_pyro.packing.stored import stored_weights

_MARK = {"written_by": "sqs-pyro"}  # one key: safetensors writes several in any order
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_dense(packed: nn.Module, path: str | Path, dtype: str = "float32") -> Exported:
    """Write a safetensors file that the original network loads with ``load_state_dict(..., strict=True)``.

    A shared tensor stands under each of its names.

    Args:
        packed: a packed network.
        path: the file, ``.safetensors``.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``, of every floating tensor.

    Raises:
        NetworkError: an unknown dtype, a network that is not packed, or an ensemble.
        OutputError: the path has another format's suffix, or the file cannot be written.
    """
    check_dtype(dtype)
    check_suffix(path, "dense", directory=False)
    check_one_network(packed)
    # safetensors writes to a path: a temporary one, renamed when it is whole.
    with appearing(path) as made:
        save_file({name: _alone(value, DTYPES[dtype]) for name, value in dense_state(packed).items()}, made, _MARK)
    return Exported(decoded=dict.fromkeys(stored_weights(packed), "a plain checkpoint has no codes"))


def is_dense_export(path: Path) -> bool:
    """Return whether a file was written by :func:`export_dense`."""
    try:
        with safe_open(path, framework="pt") as content:
            return content.metadata() == _MARK  # a packed file is safetensors, too
    except (OSError, SafetensorError):
        return False


def check_dtype(dtype: str) -> None:
    """Check the name of a dtype.

    Raises:
        NetworkError: it is unknown.
    """
    if dtype not in DTYPES:
        raise NetworkError(f"dtype is {dtype!r}, but should be one of {', '.join(DTYPES)}.")


def _alone(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy, because safetensors stores no tensors that share memory."""
    return value.to(dtype if value.is_floating_point() else value.dtype, copy=True).contiguous()
