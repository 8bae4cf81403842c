"""From a packed file to another format: find network and example, write, load what was written, compare."""

import copy
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sqs_pyro import integrations, size_report
from sqs_pyro.atomic import appearing, check_place, clean, resolved
from sqs_pyro.errors import OutputError, SQSError
from sqs_pyro.exporting.aoti import export_aoti, run_aoti
from sqs_pyro.exporting.dense import DTYPES, check_dtype, export_dense, is_dense_export
from sqs_pyro.exporting.examples import random_inputs, random_text
from sqs_pyro.exporting.exported import Exported, check_one_network
from sqs_pyro.exporting.onnx import check_installed, export_onnx, is_onnx_export, run_onnx
from sqs_pyro.exporting.suffixes import check_suffix
from sqs_pyro.exporting.trace import one_sentence, outputs
from sqs_pyro.integrations.checkpoint_size import checkpoint_size
from sqs_pyro.integrations.pretrained import quiet, transformers_package
from sqs_pyro.kernels.placing import unpack_weights
from sqs_pyro.networks.calling import move_to, split_examples
from sqs_pyro.networks.tokens import vocabulary_size
from sqs_pyro.packing.stored import stored_weights
from sqs_pyro.runs.bookkeeping import chosen_device
from sqs_pyro.runs.files import existing_file, file_network, opened
from sqs_pyro.runs.kinds import kind_of
from sqs_pyro.runs.seal import is_our_directory, seal

FORMATS = ("dense", "aoti", "onnx")


def export_file(
    file: str | Path,
    export_format: str,
    out: str | Path,
    *,
    dtype: str | None = None,
    input_shape: Sequence[int] | None = None,
    data_from: str | Path | None = None,
    overwrite: bool = False,
    network: str | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write the network of a packed file in another format, load what was written, and compare.

    The output appears when it is complete and has been run. Formats are those of :mod:`sqs_pyro.exporting`; of a
    packed Hugging Face directory ``"dense"`` is a plain one.

    Args:
        file: packed file, a run's directory, or packed Hugging Face directory.
        export_format: ``"dense"``, ``"aoti"`` or ``"onnx"``.
        out: file to write; of ``"aoti"``, and of a Hugging Face directory's ``"dense"``, a directory.
        dtype: of floating tensors in ``"dense"``; None: ``"float32"``.
        input_shape: of a random example without batch, say ``(1, 28, 28)``; of a network with a vocabulary the
            number of tokens. None: the first rows of the file's own data.
        data_from: recipe that says which data that is.
        overwrite: whether older output may be replaced.
        network: the name of what builds the file's network, where that is code of the user's.
        device: where the packed network gives the outputs that are compared with. What is written is the same: a
            compiled network is one for the CPU.

    Returns:
        ``file``, ``format``, ``out``, ``dtype``, ``bytes`` (by file), ``total_bytes``, ``packed_bytes`` (of
        ``file``), ``dense_bytes`` (of the network in float32), ``packed`` and ``decoded`` (see
        :class:`~sqs_pyro.exporting.exported.Exported`), ``example``, ``max_difference`` (to the packed network's
        output, over the example and its first row alone; None: there is no example, or an output is not finite).

    Raises:
        OutputError: the format is unknown, the output's suffix is another one's, it is in the way or cannot be
            written.
        PackedFileError: the file is missing, not intact, or names no network.
        NetworkError: an ensemble, a network that the format cannot hold, or a package is missing.
        DataError, RecipeError: there is no example.
    """
    # Options and places are checked before a network of gigabytes is read.
    _check_options(export_format, dtype)
    path, target = existing_file(file), Path(out)
    directory = path.is_dir()  # of Hugging Face: of a run's it is the file
    writes_directory = export_format == "aoti" or (directory and export_format == "dense")
    check_suffix(resolved(target), export_format, directory=writes_directory)
    as_file = {"dense": is_dense_export, "onnx": is_onnx_export}
    is_ours = is_our_directory if writes_directory else as_file[export_format]
    _check_free(target, f"export of format {export_format}", is_ours, overwrite=overwrite)
    net = file_network(path, network)
    check_one_network(net)
    example = _example(
        net, path, input_shape, data_from, needed=export_format != "dense", device=chosen_device(device)
    )
    # Run from where it is made: the target only appears if what was written loads and computes.
    with appearing(target, parents=True) as made:
        exported, run = _write(export_format, net, path, made, example, dtype or "float32")
        difference = _difference(run, example.expected)
    sizes = _tree_bytes(target)
    return {
        "file": str(path),
        "format": export_format,
        "out": str(target),
        "dtype": (dtype or "float32") if export_format == "dense" else None,
        "bytes": sizes,
        "total_bytes": sum(sizes.values()),
        **_measured(path),
        "packed": exported.packed,
        "decoded": exported.decoded,
        "example": example.said,
        "max_difference": difference,
    }


def _check_options(export_format: str, dtype: str | None) -> None:
    if export_format not in FORMATS:
        raise OutputError(f"Format {export_format!r} is unknown: give one of {', '.join(FORMATS)}.")
    if dtype is not None and export_format != "dense":
        raise OutputError(
            f"--dtype {dtype} is for --format dense, but the format is {export_format}: leave it out."
        )
    check_dtype(dtype or "float32")
    if export_format == "onnx":
        check_installed("onnx", "onnxscript", "onnxruntime")


# ---- the output ----


def _check_free(out: Path, kind: str, is_ours: Callable[[Path], bool], *, overwrite: bool) -> None:
    """Check that output may be written; nothing but leftovers of killed processes is changed.

    Args:
        out: where to.
        kind: what it is, for the sentence.
        is_ours: whether what is there is older output of that kind; only that is ever replaced.
        overwrite: whether it may be.

    Raises:
        OutputError: something is in the way.
    """
    check_place(out)
    clean(resolved(out))
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_ours(out):
        raise OutputError(f"'{out}' exists and is no {kind} that sqs-pyro wrote: choose another path.")
    if not overwrite:
        raise OutputError(f"'{out}' exists: choose another path, or replace it with --overwrite.")


def _tree_bytes(path: Path) -> dict[str, int]:
    """Return bytes of a file, or of each file of a directory by its path in it."""
    if path.is_file():
        return {path.name: path.stat().st_size}
    return {str(p.relative_to(path)): p.stat().st_size for p in sorted(path.rglob("*")) if p.is_file()}


# ---- an example ----


Batches = list[tuple[Any, tuple[Tensor, ...]]]


@dataclass(frozen=True, eq=False)
class _Example:
    """Inputs of a minibatch, or None.

    Attributes:
        inputs: two rows or more.
        said: where they come from.
        expected: minibatches with the packed network's outputs: all rows, and the first alone.
    """

    inputs: Any
    said: str
    expected: Batches


def _example(
    net: nn.Module,
    path: Path,
    shape: Sequence[int] | None,
    data_from: str | Path | None,
    *,
    needed: bool,
    device: torch.device,
) -> _Example:
    try:
        inputs, said = random_inputs(net, shape) if shape is not None else _own(net, path, data_from)
        with one_sentence("run on the example"):
            # A batch of another size, too: a trace that has fixed the batch is found out.
            parts = (inputs, next(split_examples(inputs, 1)))
            there = copy.deepcopy(net).to(device) if device.type != "cpu" else net
            expected = [tuple(each.cpu() for each in outputs(there, move_to(part, device))) for part in parts]
            return _Example(inputs, said, list(zip(parts, expected, strict=True)))
    except SQSError as error:
        # A dense export only compares with it: without one, and if none was asked for, the export is still good.
        if needed or shape is not None or data_from is not None:
            hint = "" if shape is not None else " Or give --input-shape, for random inputs."
            raise type(error)(f"{error}{hint}") from None  # of the same class, by which callers tell errors
        return _Example(None, f"none: {error}", [])


def _own(net: nn.Module, path: Path, data_from: str | Path | None) -> tuple[Any, str]:
    """Return inputs of the kind that a file is of; of a Hugging Face directory of text, random tokens."""
    if path.is_dir() and data_from is None and vocabulary_size(net) is not None:
        return random_text(net, path)
    source = opened(path, data_from)
    return kind_of(source.document).example(net, source)


# ---- writing and running ----


def _write(
    export_format: str, net: nn.Module, path: Path, made: Path, example: _Example, dtype: str
) -> tuple[Exported, Callable[[Any], tuple[Tensor, ...]]]:
    """Write the format; return what is in it, and what runs it."""
    if export_format == "aoti":
        exported = export_aoti(net, example.inputs, made)
        seal(made)
        return exported, lambda inputs: run_aoti(made, inputs)
    if export_format == "onnx":
        return export_onnx(net, example.inputs, made), lambda inputs: run_onnx(made, inputs)
    if path.is_dir():
        plain = _write_checkpoint(path, made, dtype)
        exported = Exported(decoded=dict.fromkeys(stored_weights(net), "a plain checkpoint has no codes"))
    else:
        exported = export_dense(net, made, dtype)
        # A copy of the packed network's form, filled from the file alone: `strict` finds what is missing in it.
        plain = unpack_weights(copy.deepcopy(net))
        plain.load_state_dict(load_file(made), strict=True)
    return exported, lambda inputs: outputs(plain, inputs)


def _write_checkpoint(source: Path, made: Path, dtype: str) -> nn.Module:
    """Write a plain Hugging Face directory, with the tokenizer of the packed one; return what it loads as."""
    with quiet(transformers_package(), source):
        dense = integrations.from_pretrained(source, dequantize=True, dtype=DTYPES[dtype])
        dense.save_pretrained(made)
    for beside in checkpoint_size(source).besides:
        if beside != "README.md":  # which says how to load packed weights
            shutil.copyfile(source / beside, made / beside)
    seal(made)
    with quiet(transformers_package(), made):
        return type(dense).from_pretrained(made).eval()


def _difference(run: Callable[[Any], tuple[Tensor, ...]], batches: Batches) -> float | None:
    """Return the largest difference between what is expected and what a network gives."""
    largest = 0.0
    for inputs, expected in batches:
        for one, other in zip(expected, run(inputs), strict=True):
            # Equal infinities differ by 0, not by NaN (masks of attention have them).
            differs = torch.where(one == other, 0.0, (one.float() - other.float()).abs())
            largest = max(largest, float(differs.max()))
    return largest if batches and math.isfinite(largest) else None


def _measured(path: Path) -> dict[str, int]:
    """Return what there was: bytes of the packed file, and of the network in float32."""
    if path.is_dir():
        size = checkpoint_size(path)
        return {"packed_bytes": size.total, "dense_bytes": size.fp32_bytes}
    return {"packed_bytes": path.stat().st_size, "dense_bytes": size_report(path).fp32_bytes}
