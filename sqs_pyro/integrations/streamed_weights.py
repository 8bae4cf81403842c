"""A transformers network whose weights stay in its safetensors checkpoint until a part of it is at work."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sqs_pyro.errors import NetworkError, SQSError, first_line
from sqs_pyro.integrations.checkpoint_documents import INDEX, check_placed, read_config, read_index
from sqs_pyro.kernels.assemble import tensor_slots
from sqs_pyro.kernels.described import at_most_parts, parts_of
from sqs_pyro.networks.architectures import architecture_of

SINGLE = "model.safetensors"
_MOST_PARTS = 400_000  # three times those of 256 experts in 60 layers


def empty_network(directory: Path, dtype: torch.dtype) -> nn.Module:
    """Return the network that ``config.json`` names, in eval mode: parameters on meta, buffers in memory.

    Raises:
        NetworkError: config.json is missing or damaged, or names a network that transformers or
            :mod:`~sqs_pyro.networks.architectures` does not know.
    """
    if not (directory / "config.json").is_file():
        raise NetworkError(f"'{directory}' has no config.json: give the directory of a transformers checkpoint.")
    read_config(directory, NetworkError)
    try:
        # Neither network nor foreign code: what is in the directory has to be enough.
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a class of its own for each value that is wrong
        reason = first_line(error)
        raise NetworkError(f"'{directory}/config.json' cannot be read ({reason}): fetch it again.") from error
    architecture_of(config)
    name = next(iter(config.architectures or ()), "")
    network_class = getattr(transformers, name, None)
    if network_class is None:
        raise NetworkError(f"'{directory}/config.json' names the class {name!r}, which transformers lacks.")
    try:
        with (
            # config.json is data: a million layers must not be built, not even on the meta device.
            at_most_parts(_parts(directory), NetworkError),
            # Buffers are computed, not read: no checkpoint has rotary frequencies.
            init_empty_weights(include_buffers=False),
            torch.random.fork_rng(devices=[]),
        ):
            net = network_class._from_config(config, dtype=dtype)
        net.tie_weights()
    except SQSError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise NetworkError(
            f"transformers cannot build the {name} that '{directory}/config.json' describes ({reason}): fetch it "
            "again."
        ) from error
    return net.eval()


class StreamedWeights:
    """Reads parameters from a checkpoint's shards when they are wanted, and lets them go afterwards.

    Args:
        net: the network of :func:`empty_network`.
        directory: with ``model.safetensors``, or shards and ``model.safetensors.index.json``.

    Raises:
        NetworkError: the checkpoint has no safetensors files, a shard is missing or damaged, the index names
            tensors that are not in the shards, or the checkpoint lacks a parameter of the network.
    """

    whole = False

    def __init__(self, net: nn.Module, directory: Path) -> None:
        self._files = shard_of_tensors(directory)
        self._names: dict[int, str] = {}
        shared: dict[int, list[str]] = {}
        # A checkpoint stores a tied parameter under one of its names, and not always the same one.
        for name, value in net.named_parameters(remove_duplicate=False):
            shared.setdefault(id(value), []).append(name)
        for key, names in shared.items():
            stored = [name for name in names if name in self._files]
            if not stored:
                raise NetworkError(
                    f"Checkpoint '{directory}' has no tensor {names[0]!r}, which {type(net).__name__} needs: save "
                    "it anew with this version of transformers, or fetch it again."
                )
            self._names[key] = stored[0]
        self._parameters = list(net.parameters())  # ids stay theirs only while they live

    @contextmanager
    def held(self, part: nn.Module, without: Sequence[nn.Module] = ()) -> Iterator[None]:
        """Hold the parameters of ``part``, except those inside ``without``; then they are on meta again."""
        left_out = {id(value) for module in without for value in module.parameters()}
        slots = tensor_slots(part)  # before anything is exchanged: by the id of the empty ones
        wanted = [p for p in part.parameters() if p.is_meta and id(p) in self._names and id(p) not in left_out]
        try:
            for empty in wanted:
                full = nn.Parameter(self._read(empty), requires_grad=empty.requires_grad)
                for place, name in slots[id(empty)]:
                    place[name] = full
            yield
        finally:
            for empty in wanted:
                # The very parameter from before: its id is the key to the checkpoint.
                for place, name in slots[id(empty)]:
                    place[name] = empty

    def _read(self, empty: Tensor) -> Tensor:
        name = self._names[id(empty)]
        # Opened at each read: thousands of shards would be as many open files.
        with safe_open(self._files[name], framework="pt") as content:
            value: Tensor = content.get_tensor(name)
        if value.is_floating_point() != empty.is_floating_point():
            raise NetworkError(
                f"Tensor {name!r} is {value.dtype} in '{self._files[name]}': give a checkpoint of floating-point "
                "weights."
            )
        if value.shape != empty.shape:
            raise NetworkError(
                f"Tensor {name!r} is {list(value.shape)} in '{self._files[name]}', but {list(empty.shape)} in the "
                "network: config.json belongs to another checkpoint."
            )
        if not bool(value.isfinite().all()):
            raise NetworkError(
                f"Tensor {name!r} in '{self._files[name]}' holds values that are NaN or infinite: give a "
                "checkpoint of a network that works."
            )
        # a tensor of safetensors is a view of the mapped file: cloned, it outlives it
        return value.to(empty.dtype, copy=True)


def shard_of_tensors(directory: Path) -> dict[str, Path]:
    """Return the file of each tensor of a checkpoint, by name; errors as :class:`StreamedWeights`."""
    index = directory / INDEX
    if not index.is_file():
        if not (directory / SINGLE).is_file():
            raise NetworkError(
                f"'{directory}' has neither {SINGLE} nor {INDEX}: save the checkpoint as safetensors with "
                "save_pretrained."
            )
        return dict.fromkeys(_names_in(directory / SINGLE), directory / SINGLE)
    placed = read_index(index, NetworkError)
    check_placed(index, placed, {f: _names_in(directory / f) for f in set(placed.values())}, NetworkError)
    return {name: directory / file for name, file in placed.items()}


def _parts(directory: Path) -> int:
    """Return how many modules and parameters a checkpoint's network may have; a plan needs no weights."""
    there = (directory / INDEX).is_file() or (directory / SINGLE).is_file()
    return parts_of(len(shard_of_tensors(directory))) if there else _MOST_PARTS


def _names_in(file: Path) -> set[str]:
    try:
        with safe_open(file, framework="pt") as content:
            return set(content.keys())
    except SafetensorError as error:
        raise NetworkError(f"'{file}' is truncated or damaged ({error}): fetch it again.") from None
