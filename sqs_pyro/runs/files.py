"""What can be said of a packed file alone: what it holds, and how well it does on its data."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from sqs_pyro.atomic import check_place, merging
from sqs_pyro.documents import read_json_object, shown
from sqs_pyro.errors import OutputError, PackedFileError, RecipeError
from sqs_pyro.integrations.checkpoint_documents import CONFIG
from sqs_pyro.integrations.checkpoint_size import is_packed_directory, packed_document
from sqs_pyro.kernels.native import bfloat16_products
from sqs_pyro.kernels.runtime import runtime_weights
from sqs_pyro.own_code import is_own
from sqs_pyro.packing.file import read_packed
from sqs_pyro.runs.bookkeeping import machine
from sqs_pyro.runs.directory import PACKED, write_json
from sqs_pyro.runs.kinds import Document, OpenedFile, kind_of, load_any_recipe

UNCERTAINTY = "uncertainty.json"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def inspect_file(
    file: str | Path, *, runtime: bool = False, network: str | None = None, device: str | None = None
) -> dict[str, Any]:
    """Describe a packed file to the byte, without building its network.

    Args:
        file: packed file.
        runtime: build it all the same, and say what its weights are on a device of this machine.
        network: the name of what builds it then, if the file does not say it.
        device: which, of ``runtime``: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"`` or ``"auto"``; by default the
            CPU.

    Returns:
        ``file``, ``format_version``, ``size`` (totals, bytes by part, one entry a tensor), ``metadata``; with
        ``runtime`` that, too: ``machine``, ``device``, ``bfloat16`` (what CPUs multiply it by, see
        :func:`~sqs_pyro.kernels.native.bfloat16_products`), and ``weights``, see
        :class:`~sqs_pyro.kernels.runtime.RuntimeWeight`.

    Raises:
        PackedFileError: the file is missing, not an intact packed file, or does not say how to build its network.
        NetworkError: the network's checkpoint is missing.
        RecipeError: there is no such device, or nothing is built that could be there.
    """
    if device is not None and not runtime:
        raise RecipeError(
            f"--device {device} is where a network is, but none is built to tell what a file holds: leave it out, "
            "or add --runtime."
        )
    path = existing_file(file)
    source = OpenedFile(path, {})
    inspection: dict[str, Any] = {
        "file": str(path),
        "format_version": _format_version(path),
        "size": source.size().to_dict(),
        "metadata": source.metadata,
    }
    if runtime:
        weights = [asdict(weight) for weight in runtime_weights(file_network(path, network, device or "cpu"))]
        where = {"machine": machine(), "device": device or "cpu", "bfloat16": bfloat16_products()}
        inspection["runtime"] = {**where, "weights": weights}
    return inspection


def _format_version(path: Path) -> int:
    if path.is_dir():  # of checkpoints, which are counted by themselves
        return int(packed_document(path).get("format_version", 1))
    return read_packed(path).format_version


def file_network(file: str | Path, network: str | None = None, device: str = "cpu") -> nn.Module:
    """Return the packed network of a file, built as its metadata says, or by what has the name ``network``.

    Raises:
        PackedFileError: the file is missing, not intact, or does not say how to build its network.
        NetworkError: the network's checkpoint is missing.
    """
    source = opened(file, network=network, device=device)
    return kind_of(source.document).network(source)


def evaluate_file(
    file: str | Path,
    *,
    data_from: str | Path | None = None,
    root: str | Path | None = None,
    shift: str | None = None,
    network: str | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Rebuild the network that a packed file names, and evaluate it on the test part of its data.

    A language model's file is judged by its perplexity, see :mod:`~sqs_pyro.runs.language_model_recipe`, a task's
    by its figures.

    Args:
        file: packed file.
        data_from: recipe whose ``data`` section to use instead of the one in the file; of a language model,
            ``network``, ``text`` and ``evaluation``; of a task, ``network`` and ``data``.
        root: directory of the data set on this machine, instead of the recipe's.
        shift: what is done to the images first, see :func:`~sqs_pyro.data.shifts.parse_shift`.
        network: the name of what builds the file's network, where that is code of the user's: ``module:function``.
        device: where it runs: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"`` or ``"auto"``.

    Returns:
        ``file``, ``accuracy``, ``nll``, ``ece``, ``brier``, ``entropy``, ``num_examples``, ``data``, ``shift``,
        ``size``. Of a language model ``file``, ``perplexity`` (by text), ``network``, ``size``. Of a task
        ``file``, its figures, ``task``, ``network``, ``data``, ``size``.

    Raises:
        PackedFileError: the file is missing, not intact, names no network, or belongs to another one.
        RecipeError: neither the file nor ``data_from`` says which data.
        DataError: the data is missing, the shift is unknown, or the file's network takes no images.
        NetworkError: the data does not fit the network, or the network's checkpoint is missing.
    """
    source = opened(file, data_from, network, device)
    return kind_of(source.document).evaluate(source, root=root, shift=shift)


def uncertainty_file(
    file: str | Path,
    *,
    data_from: str | Path | None = None,
    root: str | Path | None = None,
    foreign: Sequence[str] = (),
    shifts: Sequence[str] = (),
    draws: int | None = None,
    out: str | Path | None = None,
    network: str | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Say what the uncertainty of a packed classifier is worth: of one file, or of the draws of an ensemble.

    Args:
        file, data_from, root, network, device: as of :func:`evaluate_file`.
        foreign: inputs of other classes: names of data sets, image folders, or recipes with a section ``data``.
        shifts: what is done to the images, each by itself; see :func:`~sqs_pyro.data.shifts.parse_shift`.
        draws: how many are averaged; None: all of an ensemble, ten where the file has widths to draw by.
        out: directory for the document, ``uncertainty.json``, and its pictures.

    Returns:
        ``file``, ``draws``, ``temperature`` (fitted on the validation data), ``predictors``, ``data``, ``size``;
        see docs/cli.md.

    Raises:
        PackedFileError, RecipeError, DataError, NetworkError: as of :func:`evaluate_file`.
        OutputError: ``out`` cannot be written, or holds something else under these names.
    """
    source = opened(file, data_from, network, device)
    place = None if out is None else _checked_out(Path(out))
    found, curves = kind_of(source.document).uncertainty(
        source, root=root, foreign=foreign, shifts=shifts, draws=draws
    )
    if place is not None:
        from sqs_pyro.reporting.uncertainty import write_uncertainty_pictures  # matplotlib

        with merging(place, last=UNCERTAINTY) as made:
            drawn = {name: asdict(own) for name, own in curves.items()}
            write_json(made / UNCERTAINTY, {**found, "curves": drawn})
            write_uncertainty_pictures(made, curves)
    return found


def _checked_out(out: Path) -> Path:
    """Check, before any work, that a directory takes the document, in whose place may be an older one."""
    check_place(out / UNCERTAINTY)
    if (out / UNCERTAINTY).exists():
        older = read_json_object(out / UNCERTAINTY, OutputError, "choose another directory")
        if "predictors" not in older:
            raise OutputError(f"'{out / UNCERTAINTY}' was not written by this command: choose another directory.")
    elif taken := [name for name in ("reliability.png", "risk_coverage.png") if (out / name).exists()]:
        raise OutputError(f"'{out / taken[0]}' was not written by this command: choose another directory.")
    return out


def existing_file(file: str | Path) -> Path:
    """Return the path of a packed file, or packed Hugging Face directory, that is there; of a run's its file's.

    Raises:
        PackedFileError: it is not.
    """
    path = Path(file)
    if (path / PACKED).is_file():
        return path / PACKED
    if is_packed_directory(path):
        return path
    if (path / CONFIG).is_file():
        raise PackedFileError(
            f"The weights in '{path}' are not packed: compress them with `sqs compress`, and give the run's "
            "directory, its file or a packed Hugging Face directory."
        )
    if path.is_dir():
        raise PackedFileError(
            f"'{path}' is a directory without a '{PACKED}': give a run's directory, a packed Hugging Face "
            "directory, or the path of a file that `sqs` wrote."
        )
    if not path.is_file():
        raise PackedFileError(f"Packed file '{path}' is not there: give the path of a file that `sqs` wrote.")
    return path


def opened(
    file: str | Path,
    data_from: str | Path | None = None,
    network: str | None = None,
    device: str = "cpu",
) -> OpenedFile:
    """Return a packed file with its recipe.

    Args:
        file: its path.
        data_from: a recipe to take instead of its own, or a function's name, of which its data are.
        network: name of what builds its network, which the user gave.
        device: where it shall run.

    Raises:
        PackedFileError, RecipeError: as :func:`existing_file` and :func:`recipe_of`.
    """
    path = existing_file(file)
    if data_from is not None and is_own(str(data_from)):
        document, name = recipe_of(path), str(data_from)
        section = document.get("data")
        if not isinstance(section, Mapping) or section.get("name") != name:
            section = {"name": name}
        # Without the file's metric, which may be other code than the user has named.
        document = {**document, "data": {key: section[key] for key in section if not key.startswith("metric")}}
    else:
        document = recipe_of(path, data_from)
    return OpenedFile(path, document, network, device, given=data_from is not None)


def recipe_of(path: Path, data_from: str | Path | None = None) -> Document:
    """Return the recipe that a packed file holds, as it was written there; programs may write anything.

    Args:
        path: the file.
        data_from: a recipe to take instead.

    Raises:
        PackedFileError: the file is not intact, or holds something else as its recipe.
        RecipeError: the other recipe is wrong.
    """
    if data_from is not None:
        document: Document = load_any_recipe(data_from).model_dump(mode="json")
        return document
    recipe = OpenedFile(path, {}).metadata.get("recipe") or {}  # a file made in Python need not have one
    if not isinstance(recipe, Mapping):
        raise PackedFileError(
            f"Packed file '{path}' holds {shown(recipe)} as its recipe, which is none: load it in Python with the "
            "network's constructor."
        )
    return directory_recipe(path, recipe) if path.is_dir() else recipe


def directory_recipe(path: Path, recipe: Document) -> Document:
    """Return the recipe of a packed directory: of a language model, that it is itself the checkpoint it names.

    The one that it was made of may be elsewhere; a directory without a tokenizer still needs it.
    """
    config = read_json_object(path / CONFIG, PackedFileError, "fetch it again")
    names = config.get("architectures")
    is_language_model = isinstance(names, list) and any(str(name).endswith("ForCausalLM") for name in names)
    if "blockwise" not in recipe and (recipe or not is_language_model):
        return recipe
    if recipe and not any((path / name).is_file() for name in _TOKENIZER):
        return recipe
    network = recipe.get("network")
    kept = network if isinstance(network, Mapping) else {}
    return {"blockwise": {}, **recipe, "network": {**kept, "path": str(path), "gguf_file": None}}
