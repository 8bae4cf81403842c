"""Honest size of a Hugging Face checkpoint: every byte that loading it needs, by what it is for."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sqs_pyro.documents import read_json_object
from sqs_pyro.errors import PackedFileError
from sqs_pyro.integrations.checkpoint_documents import CONFIG_DIGEST
from sqs_pyro.integrations.records import read_record
from sqs_pyro.packing.record import TensorRecord
from sqs_pyro.packing.size import SizeReport, compressed_bytes, largest, paper_ratio

# Bits of one element, by safetensors' names.
_FLOATS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}
_OTHERS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "I32": 32, "I64": 64, "C64": 64}


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of a checkpoint.

    Attributes:
        parts: bytes by what they are for; their sum is :attr:`total`. ``codes``, ``masks``, ``codebooks`` and
            ``tables`` of the compressed tensors, ``uncompressed`` of all others, ``headers`` of the safetensors
            files, ``configs``: the other files that loading reads, and the digest of config.json.
        besides: bytes of the directory's remaining files (tokenizer, README.md) by name, which no size counts.
        fp32_bytes: the whole network at 4 bytes for each weight and each element of its other floating tensors.
        num_weights: number of compressed weights, zeros included.
        nonzeros: how many of them are not zero.
    """

    parts: dict[str, int]
    besides: dict[str, int]
    fp32_bytes: int
    num_weights: int
    nonzeros: int

    @property
    def total(self) -> int:
        """Bytes of the safetensors files and of what else loading reads."""
        return sum(self.parts.values())

    @property
    def ratio(self) -> float:
        """fp32 bytes of the whole network over :attr:`total`."""
        return self.fp32_bytes / self.total

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes, masks, codebooks and tables for each compressed weight; 0 without one."""
        compressed = sum(self.parts[kind] for kind in compressed_bytes(()))  # the names of its kinds
        return 8 * compressed / self.num_weights if self.num_weights else 0.0


def checkpoint_size(directory: "str | PathLike[str]") -> CheckpointSize:
    """Count the bytes of a packed Hugging Face checkpoint, as they are on the disk.

    Raises:
        PackedFileError: the directory holds no packed checkpoint, or a damaged one.
        OSError: a file cannot be read.
    """
    directory = Path(directory)
    tensors = _records(directory)
    files = {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.is_file()}
    weights = {name: size for name, size in files.items() if name.endswith(".safetensors")}
    # What loading reads beside the weights; tokenizers are not a network's.
    configs = [name for name in files if name in ("config.json", "generation_config.json") or ".index." in name]
    packed = compressed_bytes(tensors.values())
    every = [entry for name in weights for entry in _entries(directory / name)]
    # The digest of config.json stands among the weights, but is none.
    digests = sum(math.prod(shape) for name, _, _, shape in every if name == CONFIG_DIGEST)
    stored = [(is_float, bits, math.prod(shape)) for name, is_float, bits, shape in every if name != CONFIG_DIGEST]
    data = sum(bits * count // 8 for _, bits, count in stored)
    num_weights = sum(tensor.numel for tensor in tensors.values())
    floats = sum(count for is_float, _, count in stored if is_float)
    return CheckpointSize(
        parts={
            **packed,
            # Differences, so that the parts sum to the files whatever is in them.
            "uncompressed": data - sum(packed.values()),
            "headers": sum(weights.values()) - data - digests,
            "configs": sum(files[name] for name in configs) + digests,
        },
        besides={name: size for name, size in files.items() if name not in (*weights, *configs)},
        fp32_bytes=4 * (num_weights + floats),
        num_weights=num_weights,
        nonzeros=sum(tensor.nonzeros for tensor in tensors.values()),
    )


def checkpoint_report(directory: "str | PathLike[str]") -> SizeReport:
    """Return the bytes of a packed Hugging Face checkpoint as those of a packed file.

    What is a file's manifest are here config.json, and what else loading reads beside the weights. Errors as
    :func:`checkpoint_size`.
    """
    size, rows = checkpoint_size(directory), tuple(_records(Path(directory)).values())
    every = [entry for file in sorted(Path(directory).glob("*.safetensors")) for entry in _entries(file)]
    return SizeReport(
        **{kind: size.parts[kind] for kind in compressed_bytes(())},
        uncompressed=size.parts["uncompressed"],
        manifest=size.parts["configs"],
        header=size.parts["headers"],
        padding=0,
        fp32_bytes=size.fp32_bytes,
        num_weights=size.num_weights,
        nonzeros=size.nonzeros,
        paper_ratio=paper_ratio(rows),
        tensors=rows,
        largest_uncompressed=largest((name, shape) for name, is_float, _, shape in every if is_float),
    )


def packed_config(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Return the ``quantization_config`` out of a checkpoint's config.json.

    Raises:
        PackedFileError: it is not that of a packed checkpoint.
    """
    found = config.get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != "sqs":
        raise PackedFileError(
            f"'{where}' is no packed checkpoint (its config.json has no quantization_config of quant_method "
            "'sqs'): load it with transformers, or write it with sqs_pyro.integrations.save_pretrained."
        )
    return found


def is_packed_directory(path: "str | PathLike[str]") -> bool:
    """Whether a path is that of a directory whose config.json says that its weights are packed."""
    if not (Path(path) / "config.json").is_file():
        return False
    config = read_json_object(Path(path) / "config.json", PackedFileError, "fetch it again")
    packed = config.get("quantization_config")
    return isinstance(packed, dict) and packed.get("quant_method") == "sqs"


def packed_document(directory: Path) -> dict[str, Any]:
    """Return what the ``quantization_config`` of a packed directory says; errors as :func:`packed_config`."""
    return packed_config(read_json_object(directory / "config.json", PackedFileError, "fetch it again"), directory)


def _records(directory: Path) -> dict[str, TensorRecord]:
    records = packed_document(directory).get("tensors", {})
    if not isinstance(records, dict):
        raise PackedFileError(f"'{directory / 'config.json'}' has no records of tensors: fetch it again.")
    return {name: read_record(name, record) for name, record in records.items()}


def _entries(file: Path) -> Iterator[tuple[str, bool, int, tuple[int, ...]]]:
    """Yield of each tensor of a file its name, whether it is floating, bits an element and its shape."""
    try:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118
                entry = content.get_slice(name)
                dtype = entry.get_dtype()
                if dtype not in {**_FLOATS, **_OTHERS}:
                    raise PackedFileError(f"Tensor {name!r} in '{file}' is {dtype}, which no network here has.")
                yield name, dtype in _FLOATS, {**_FLOATS, **_OTHERS}[dtype], tuple(entry.get_shape())
    except SafetensorError as error:
        raise PackedFileError(f"Checkpoint file '{file}' is truncated or damaged ({error}).") from None
