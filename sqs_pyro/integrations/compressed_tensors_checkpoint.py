"""Checkpoints of compressed-tensors (``pack-quantized``), which vLLM, llm-compressor and transformers read.

A linear layer whose codewords are whole numbers is ``weight_packed``, int32 of 4- or 8-bit numbers from 0, the
first in the lowest bits, and ``weight_scale``, one for each output, or one for each group of its inputs. All such
layers have the same bits, for runtimes put those that share their input into one product. Everything else is as in
a plain checkpoint.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sqs_pyro.errors import NetworkError
from sqs_pyro.packing.bits import pack_bits
from sqs_pyro.packing.stored import stored_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORMAT = "pack-quantized"


def save_compressed_tensors(packed: nn.Module, dense: "PreTrainedModel", directory: Path) -> dict[str, str]:
    """Write a packed transformers model as a checkpoint of compressed-tensors.

    Args:
        packed: the model, some of whose linear layers have whole numbers (``blockwise.grid: uniform``).
        dense: the same as a plain one, of the dtype that everything else is to have; its configuration is changed.
        directory: where to.

    Returns:
        What became of each compressed parameter that has kept its codes.

    Raises:
        NetworkError: no layer has whole numbers.
    """
    weights = whole_number_layers(packed, dense)
    bits = 4 if all(_fits(numbers, 4) for numbers, _ in weights.values()) else 8
    state = dense.state_dict()
    for path, (numbers, scales) in weights.items():
        del state[f"{path}.weight"]
        state |= {
            f"{path}.weight_packed": pack_to_int32(numbers, bits),
            f"{path}.weight_scale": scales.to(dense.dtype).view(len(scales), -1),
            f"{path}.weight_shape": torch.tensor(numbers.shape),
        }
    others = [
        name for name, module in dense.named_modules() if isinstance(module, nn.Linear) and name not in weights
    ]
    groups = {path: _group_size(numbers, scales) for path, (numbers, scales) in weights.items()}
    dense.config.quantization_config = _quantization_config(bits, groups, others)
    dense.save_pretrained(directory, state_dict=state)
    return {
        f"{path}.weight": f"{_FORMAT}, {bits} bits" + (f", groups of {size}" if size else "")
        for path, size in groups.items()
    }


def whole_number_layers(packed: nn.Module, dense: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return whole numbers, int8 ``[N, M]``, and scales of linear layers that have them, by path.

    Scales are ``[N]`` of outputs, or ``[N, B]`` of groups of ``M / B`` inputs of each.

    Args:
        packed: a packed network.
        dense: the same as a plain one.

    Raises:
        NetworkError: no layer has.
    """
    found = {}
    for name, weight in stored_weights(packed).items():
        path = name.removesuffix(".weight")
        whole = weight.coded().whole_numbers() if isinstance(dense.get_submodule(path), nn.Linear) else None
        if whole is not None:
            found[path] = whole
    if not found:
        raise NetworkError(
            "No linear layer has whole numbers as codewords, which this format needs: compress with "
            "blockwise.grid: uniform."
        )
    return found


def pack_to_int32(numbers: Tensor, bits: int) -> Tensor:
    """Return numbers ``[N, M]`` of so many bits with a sign as int32 ``[N, ⌈M bits / 32⌉]``."""
    from_zero = (numbers.int() + 2 ** (bits - 1)).to(torch.uint8)
    filled = nn.functional.pad(from_zero, (0, -numbers.shape[1] % (32 // bits)))
    return pack_bits(filled.reshape(-1), bits).view(torch.int32).view(len(numbers), -1)


def _fits(numbers: Tensor, bits: int) -> bool:
    return -(2 ** (bits - 1)) <= int(numbers.min()) and int(numbers.max()) < 2 ** (bits - 1)


def _group_size(numbers: Tensor, scales: Tensor) -> int | None:
    """Return how many inputs share a scale; None where all do."""
    return None if scales.dim() == 1 else numbers.shape[1] // scales.shape[1]


def _quantization_config(bits: int, groups: dict[str, int | None], ignored: list[str]) -> dict[str, Any]:
    """Return the configuration of layers whose groups are given, one ``config_group`` for each size of groups."""
    sizes = list(dict.fromkeys(groups.values()))
    schemes = {}
    for i, size in enumerate(sizes):
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
        if size is not None:
            weights |= {"strategy": "group", "group_size": size}
        # By name where a layer's kind does not tell its group.
        targets = ["Linear"] if len(sizes) == 1 else [path for path, own in groups.items() if own == size]
        schemes[f"group_{i}"] = {"targets": targets, "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": schemes,
        "ignore": ignored,
    }
