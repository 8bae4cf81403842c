"""Check the safetensors files of a checkpoint before anything is loaded from them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sqs_pyro.errors import PackedFileError
from sqs_pyro.packing.leftovers import checksum, to_bytes

_REPAIR = "fetch the checkpoint again, or save it anew"


def check_files(
    files: Sequence[str | Path], packed: Mapping[str, int], leftovers: Mapping[str, int]
) -> dict[str, str | Path]:
    """Check that the files hold what the config says, and return the file of each of their tensors.

    Leftovers are read once, one at a time.

    The bytes of packed tensors are checked when they are decoded.

    Args:
        files: the checkpoint's safetensors files.
        packed: number of bytes of each compressed tensor by its name in the files.
        leftovers: CRC-32 of every other tensor by name.

    Raises:
        PackedFileError: naming the file or tensor: truncated, damaged, missing, of another size.
        OSError: a file cannot be read.
    """
    found: dict[str, str | Path] = {}
    for file in files:
        try:
            found |= dict.fromkeys(_check_file(file, packed, leftovers), file)
        except SafetensorError as error:
            raise PackedFileError(
                f"Checkpoint file '{file}' is truncated or damaged ({error}): {_REPAIR}."
            ) from None
    # Over all files: a tensor may be in any shard.
    missing = [name for name in (*packed, *leftovers) if name not in found]
    if missing:
        raise PackedFileError(
            f"Tensor {missing[0]!r} is missing in the checkpoint (it lacks {len(missing)} of the "
            f"{len(packed) + len(leftovers)} in its config): {_REPAIR}."
        )
    return found


def read_tensor(file: str | Path, name: str) -> Tensor:
    """Return one tensor of a file, which is mapped only as long as the tensor is there.

    Raises:
        PackedFileError: the file has been damaged since it was checked.
    """
    try:
        with safe_open(file, framework="pt") as content:
            tensor: Tensor = content.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise PackedFileError(f"Checkpoint file '{file}' cannot be read ({error}): {_REPAIR}.") from None


def tensor_names(file: str | Path) -> set[str]:
    """Return the names of the tensors in a file.

    Raises:
        PackedFileError: it is truncated or damaged.
    """
    try:
        with safe_open(file, framework="pt") as content:
            return set(content.keys())
    except SafetensorError as error:
        raise PackedFileError(f"Checkpoint file '{file}' is truncated or damaged ({error}): {_REPAIR}.") from None


def _check_file(file: str | Path, packed: Mapping[str, int], leftovers: Mapping[str, int]) -> set[str]:
    """Check the tensors of one file and return their names."""
    with safe_open(file, framework="pt") as content:
        names = set(content.keys())
        for name in names & packed.keys():
            # Of the header alone: the bytes are read once, by whoever decodes them.
            stored = content.get_slice(name)
            dtype, shape = stored.get_dtype(), stored.get_shape()
            if (dtype, shape) != ("U8", [packed[name]]):
                raise PackedFileError(
                    f"Tensor {name!r} is {dtype} {shape} in the checkpoint, but U8 [{packed[name]}] by its "
                    f"config: {_REPAIR}."
                )
        for name in names & leftovers.keys():
            # transformers casts them while it loads: afterwards there are no stored bytes to compare.
            if checksum([to_bytes(content.get_tensor(name))]) != leftovers[name]:
                raise PackedFileError(f"Tensor {name!r} is damaged, its checksum does not fit: {_REPAIR}.")
    return names
