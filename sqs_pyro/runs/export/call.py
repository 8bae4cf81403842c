"""From a packed file to another format: find network and example, write, load what was written, compare."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sqs_pyro import size_report
from sqs_pyro.atomic import appearing, check_place, clean, resolved
from sqs_pyro.errors import OutputError
from sqs_pyro.exporting.dense import check_dtype
from sqs_pyro.exporting.exported import check_one_network
from sqs_pyro.exporting.suffixes import check_suffix
from sqs_pyro.integrations.checkpoint_size import checkpoint_size
from sqs_pyro.runs.bookkeeping import chosen_device
from sqs_pyro.runs.export.example import Batches, example_of
from sqs_pyro.runs.export.formats import FORMATS, Run, Source
from sqs_pyro.runs.files import existing_file, file_network


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
        export_format: one of ``FORMATS``.
        out: what to write: a file of ``"onnx"``, ``"onnx-qdq"``, ``"coreml"``, ``"torchao"``, ``"executorch"``,
            ``"gguf"`` and a file's ``"dense"``, else a directory.
        dtype: of floating tensors that have no codes, in ``"dense"`` and ``"compressed-tensors"``; None:
            ``"float32"``.
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
        output, over the example and its first row alone; None: there is no example, an output is not finite, or
        the format runs on other systems alone).

    Raises:
        OutputError: the format is unknown, the output's suffix is another one's, it is in the way or cannot be
            written.
        PackedFileError: the file is missing, not intact, or names no network.
        NetworkError: an ensemble, a network that the format cannot hold, or a package is missing.
        DataError, RecipeError: there is no example.
    """
    # Options and places are checked before a network of gigabytes is read.
    if export_format not in FORMATS:
        raise OutputError(f"Format {export_format!r} is unknown: give one of {', '.join(FORMATS)}.")
    form = FORMATS[export_format]
    form.check(dtype)
    check_dtype(dtype or "float32")
    path, target = existing_file(file), Path(out)
    form.check_source(path)
    check_suffix(resolved(target), export_format, directory=form.is_directory(path))
    _check_free(target, f"export of format {export_format}", form.is_ours, overwrite=overwrite)
    net = file_network(path, network)
    check_one_network(net)
    example = example_of(
        net, path, input_shape, data_from, needed=form.needs_example, device=chosen_device(device)
    )
    # Run from where it is made: the target only appears if what was written loads and computes.
    with appearing(target, parents=True) as made:
        exported, run = form.write(Source(path, net, example.inputs, dtype or "float32"), made)
        difference = None if run is None else _difference(run, example.expected)
    sizes = _tree_bytes(target)
    return {
        "file": str(path),
        "format": export_format,
        "out": str(target),
        "dtype": (dtype or "float32") if form.has_dtype else None,
        "bytes": sizes,
        "total_bytes": sum(sizes.values()),
        **_measured(path),
        "packed": exported.packed,
        "decoded": exported.decoded,
        "example": example.said,
        "max_difference": difference,
    }


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


def _difference(run: Run, batches: Batches) -> float | None:
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
