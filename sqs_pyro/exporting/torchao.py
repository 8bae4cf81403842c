"""State dicts of torchao's tensors, which the original network loads where only torchao is installed."""

import importlib
import io
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from struct import pack
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.atomic import write_bytes
from sqs_pyro.errors import NetworkError
from sqs_pyro.exporting.exported import Exported, check_one_network
from sqs_pyro.exporting.installed import check_installed
from sqs_pyro.exporting.linear_layers import linear_weights
from sqs_pyro.exporting.suffixes import check_suffix
from sqs_pyro.kernels.network import dense_state
from sqs_pyro.packing.stored import stored_weights

_WRITTEN_BY, _MAKER = "written_by", "sqs-pyro"


def export_torchao(packed: nn.Module, path: str | Path) -> Exported:
    """Write a state dict in which linear layers' whole numbers are tensors of torchao, and all else is float32.

    The original network takes it by ``load_state_dict(torch.load(path), assign=True)``, where torchao is imported.
    A weight that a linear layer shares with other modules stands there once as torchao's tensor and once decoded.

    Args:
        packed: a packed network, some of whose linear layers have whole numbers (``grid: uniform``).
        path: the file, ``.pt``.

    Raises:
        NetworkError: no linear layer has whole numbers, a network that is not packed, or an ensemble.
        MissingPackageError: torchao is not installed.
        OutputError: the path has another format's suffix, or the file cannot be written.
    """
    check_suffix(path, "torchao", directory=False)
    check_one_network(packed)
    tensors = torchao_tensors(packed)
    state = OrderedDict(
        (name, tensors[name][0] if name in tensors else _alone(value))
        for name, value in dense_state(packed).items()
    )
    vars(state)[_WRITTEN_BY] = _MAKER  # beside the tensors: a strict load would stumble over one more key
    # To memory first: torch.save hides why a disk takes no more, and writes the name of a path into the file.
    written = io.BytesIO()
    torch.save(state, written)
    write_bytes(path, [written.getbuffer()])
    return _exported(packed, {name: bits for name, (_, bits) in tensors.items()})


def is_torchao_export(path: Path) -> bool:
    """Return whether a file was written by :func:`export_torchao`; nothing in it is executed."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = archive.read("archive/data.pkl")  # torch.save's name where it was given no path
    except (OSError, KeyError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False
    # A pickle has strings behind a letter and their length in four bytes.
    return all(b"X" + pack("<I", len(text)) + text.encode() in pickled for text in (_WRITTEN_BY, _MAKER))


def torchao_tensors(packed: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Return ``IntxUnpackedToInt8Tensor`` of linear layers with whole numbers, and their bits, by parameter name.

    Numbers are int8 ``[N, M]`` of the fewest bits, 4 or 8, that hold all of the layer; scales float32
    ``[N, B]``, of blocks of ``M / B`` inputs.

    Args:
        packed: a packed network.

    Raises:
        NetworkError: no linear layer has whole numbers.
        MissingPackageError: torchao is not installed.
    """
    check_installed("torchao", "torchao")
    made: dict[int, tuple[Tensor, int] | None] = {}
    found = {}
    for name, weight in linear_weights(packed).items():
        # Once: layers that share a weight share its numbers.
        if id(weight) not in made:
            whole = weight.coded().whole_numbers()
            made[id(weight)] = None if whole is None else _tensor(*whole)
        tensor = made[id(weight)]
        if tensor is not None:
            found[name] = tensor
    if not found:
        raise NetworkError(
            "No linear layer has whole numbers as codewords, which torchao multiplies with: compress with "
            "grid: uniform, in the recipe's section compression or blockwise."
        )
    return found


def _tensor(numbers: Tensor, scales: Tensor) -> tuple[Tensor, int]:
    """Return int8 ``[N, M]`` times scales ``[N]`` or ``[N, B]`` as torchao's tensor, and its bits."""
    scales = scales.view(len(numbers), -1)
    bits = 4 if int(numbers.min()) >= -8 and int(numbers.max()) <= 7 else 8
    quantization: Any = importlib.import_module("torchao.quantization")
    tensor: Tensor = quantization.IntxUnpackedToInt8Tensor(
        qdata=numbers.cpu(),
        scale=scales.float().cpu(),
        zero_point=torch.zeros(scales.shape, dtype=torch.int8),
        target_dtype=getattr(torch, f"int{bits}"),
        block_size=(1, numbers.shape[1] // scales.shape[1]),
        dtype=torch.float32,
        activation_quantization=None,
    )
    return tensor, bits


def _alone(value: Tensor) -> Tensor:
    """Return a copy in float32, if it has fractions: of a view torch.save would write all that is behind it."""
    return value.to("cpu", torch.float32 if value.is_floating_point() else value.dtype, copy=True).contiguous()


def _exported(packed: nn.Module, bits: Mapping[str, int]) -> Exported:
    """Return what became of each compressed parameter, given the bits of torchao's tensors by every name."""
    linear, every_name = linear_weights(packed), stored_weights(packed, every_name=True)
    exported = Exported()
    for name, weight in stored_weights(packed).items():
        same = [each for each, other in every_name.items() if other is weight]
        held = [each for each in same if each in bits]
        others = [each for each in same if each not in bits]
        if held:
            also = f", and float32 as {' and '.join(others)}" if others else ""
            exported.packed[name] = f"torchao, int{bits[held[0]]}{also}"
        else:
            why = "no whole numbers" if linear.keys() & same else "no linear layer"
            exported.decoded[name] = f"{why}: float32"
    return exported
