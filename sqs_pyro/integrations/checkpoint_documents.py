"""``config.json`` and the index of a checkpoint's shards: read with bounds, checked before transformers does."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sqs_pyro.documents import read_json_object, shown
from sqs_pyro.errors import PackedFileError, SQSError

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
#: Name of a tensor beside the weights, uint8 ``[32]``: digest of what config.json says. (Not in the metadata of
#: their file: there safetensors writes several keys in another order each time.)
CONFIG_DIGEST = "sqs_config_sha256"
_NOT_COUNTED = ("transformers_version", "auto_map", "_name_or_path")  # rewritten without another meaning


def read_config(directory: Path, error: type[SQSError]) -> dict[str, Any]:
    """Return what ``config.json`` says.

    Raises:
        SQSError: of class ``error``; it is no JSON object, or names code of its own that only itself could read.
        OSError: there is none.
    """
    config = read_json_object(directory / CONFIG, error, "fetch it again")
    check_needs_no_code(config, directory, error)
    return config


def check_needs_no_code(config: Mapping[str, Any], directory: object, error: type[SQSError]) -> None:
    """Refuse a checkpoint whose network is code inside of it: that code is never run, nor asked for.

    Raises:
        SQSError: of class ``error``; ``auto_map`` names code, and transformers has no class of its own.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # here: heavy

    kind = config.get("model_type")
    # Many checkpoints name code that transformers has meanwhile taken in: then its own class is used.
    if config.get("auto_map") and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise error(
            f"'{directory}/{CONFIG}' names code of its own ('auto_map'), which is not run: load the network in "
            "Python by yourself, and call sqs_pyro with it."
        )


def config_digest(config: Mapping[str, Any]) -> Tensor:
    """Return the digest of what a config says, uint8 ``[32]``, ``dequantize`` left out, however it is written."""
    counted = {key: value for key, value in config.items() if key not in _NOT_COUNTED}
    if isinstance(packed := counted.get("quantization_config"), dict):
        # `dequantize` is how to load, not what is stored: a reader may set it.
        counted["quantization_config"] = {key: packed[key] for key in packed if key != "dequantize"}
    # Sorted: other programs write the same config with its keys in another order.
    digest = hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).digest()
    return torch.tensor(list(digest), dtype=torch.uint8, device="cpu")  # transformers loads under "meta"


def check_config(config: Mapping[str, Any], files: Iterable[str | Path]) -> None:
    """Check that a config is the one that was saved with the weights; older checkpoints do not say.

    Raises:
        PackedFileError: it was altered, or a file of weights is damaged.
    """
    expected = config_digest(config).tolist()
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                digest = content.get_tensor(CONFIG_DIGEST) if CONFIG_DIGEST in content.keys() else None  # noqa: SIM118
        except SafetensorError as error:
            raise PackedFileError(
                f"Checkpoint file '{file}' is truncated or damaged ({error}): fetch the checkpoint again, or save "
                "it anew."
            ) from None
        if digest is not None and digest.tolist() != expected:
            raise PackedFileError(
                f"'{Path(file).parent / CONFIG}' is not the one that was saved with the weights in "
                f"'{Path(file).name}', it was altered: fetch it again, or save the checkpoint anew."
            )


def read_index(index: Path, error: type[SQSError]) -> dict[str, str]:
    """Return the file of each tensor out of an index; every file is there, and beside the index.

    Raises:
        SQSError: of class ``error``; the index is damaged, names a file elsewhere, or one that is missing.
    """
    placed = read_json_object(index, error, "fetch it again").get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise error(f"'{index}' is damaged, it has no 'weight_map' of files: fetch it again.")
    files = sorted(set(placed.values()))
    # A path in an index must not lead out of the directory.
    odd = [file for file in files if not file.endswith(".safetensors") or Path(file).name != file or "\0" in file]
    if odd:
        raise error(f"'{index}' names {shown(odd[0])}, which is no safetensors file beside it: fetch it again.")
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing:
        raise error(f"Checkpoint '{index.parent}' lacks the shards {', '.join(missing[:20])}: fetch them again.")
    return placed


def check_placed(
    index: Path, placed: Mapping[str, str], inside: Mapping[str, set[str]], error: type[SQSError]
) -> None:
    """Check that an index and the names of the tensors inside of each file say the same.

    Raises:
        SQSError: of class ``error``; a tensor is not in the file that the index names.
    """
    absent = [name for name, file in placed.items() if name not in inside[file]]
    if absent:
        raise error(
            f"'{index}' says that tensor {shown(absent[0])} is in {placed[absent[0]]}, but it is not (as "
            f"{len(absent)} of {len(placed)}): index and shards belong to different checkpoints."
        )
