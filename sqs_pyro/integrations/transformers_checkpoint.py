"""Write and read Hugging Face checkpoints of packed networks; see :mod:`sqs_pyro.integrations`."""

from os import PathLike
from pathlib import Path
from typing import Any

import transformers

from sqs_pyro.atomic import merging
from sqs_pyro.documents import shown
from sqs_pyro.errors import NetworkError, PackedFileError, SQSError, first_line
from sqs_pyro.integrations.checkpoint_documents import (
    CONFIG,
    INDEX,
    check_config,
    check_placed,
    read_config,
    read_index,
)
from sqs_pyro.integrations.checkpoint_files import tensor_names
from sqs_pyro.integrations.checkpoint_size import packed_config
from sqs_pyro.integrations.model_card import is_foreign_card, write_model_card
from sqs_pyro.integrations.transformers_quantizer import SQSQuantizer, attach
from sqs_pyro.kernels.described import at_most_parts, parts_of
from sqs_pyro.packing.stored import METADATA, StoredEnsemble

_WEIGHTS = "model.safetensors"
# Weights of an older checkpoint, in other shards: a reader would take them for the new one's.
_STALE = (_WEIGHTS, "model-*-of-*.safetensors", INDEX)
# What `from_pretrained` takes to find files; the rest is for the model.
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def save_pretrained(
    packed: Any, directory: "str | PathLike[str]", tokenizer: Any, *, model_card: bool, **options: Any
) -> None:
    """Write a packed model, its tokenizer and its card; see :func:`sqs_pyro.integrations.save_pretrained`."""
    _check_packed(packed)
    # Packed before transformers was imported, or copied: `attach` has not seen it.
    if not isinstance(getattr(packed, "hf_quantizer", None), SQSQuantizer):
        attach(packed)
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise NetworkError(
            f"tokenizer is a {type(tokenizer).__name__} without save_pretrained: give a tokenizer or processor of "
            "transformers, or None."
        )
    # Written beside, then moved in, config.json last: without it nobody takes the directory for a checkpoint.
    with merging(Path(directory), last="config.json", stale=_STALE) as made:
        packed.save_pretrained(made, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        if model_card and not is_foreign_card(Path(directory)):
            write_model_card(made, type(packed).__name__)


def from_pretrained(directory: "str | PathLike[str]", *, auto_class: Any, dequantize: bool, **options: Any) -> Any:
    """Load a packed checkpoint; see :func:`sqs_pyro.from_pretrained`."""
    where = {key: options[key] for key in _WHERE if key in options}
    folder = Path(directory, options.get("subfolder") or "")
    try:
        # Only files that are here can be checked before transformers opens them; from the hub it fetches them
        # itself.
        if folder.is_dir():
            config = _checked(folder)
        else:
            config, _ = transformers.PreTrainedConfig.get_config_dict(directory, **where)
        found = packed_config(config, directory)
        # config.json decides how large a network is built, and may be damaged.
        with at_most_parts(_many_more(found)):
            loaded = _loader(config, auto_class).from_pretrained(
                # The default is never to run a checkpoint's code; a caller may still decide otherwise.
                directory,
                **{"trust_remote_code": False, **options},
            )
        if dequantize:
            model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
            if hasattr(model, "hf_quantizer"):  # else the config says the same
                model.dequantize()
    # Sentences of our own, and files that are missing, stay as they are.
    except (SQSError, OSError):
        raise
    except Exception as error:  # transformers hands on whatever a value that it did not expect ends in
        reason = first_line(error)
        raise PackedFileError(
            f"Checkpoint '{directory}' cannot be loaded ({reason}): fetch it again, or correct the options."
        ) from error
    return loaded


def _checked(directory: Path) -> dict[str, Any]:
    """Return the config of a checkpoint on this machine, whose files are there and belong together."""
    if not (directory / CONFIG).is_file():
        raise PackedFileError(f"'{directory}' has no file {CONFIG}: give the directory of a packed checkpoint.")
    config = read_config(directory, PackedFileError)
    index = directory / INDEX
    # Of an index only its own shards: others may lie there of an older checkpoint.
    files = sorted(directory.glob("*.safetensors"))
    if index.is_file():
        placed = read_index(index, PackedFileError)
        files = sorted({directory / file for file in placed.values()})
    packed_config(config, directory)
    missing = [path for path in files or [directory / _WEIGHTS] if not path.is_file()]
    if missing:
        raise PackedFileError(f"'{missing[0]}' is missing, or no file: fetch it again, or save it anew.")
    check_config(config, files)
    if index.is_file():
        check_placed(index, placed, {file.name: tensor_names(file) for file in files}, PackedFileError)
    return config


def _many_more(quantization: dict[str, Any]) -> int:
    described = [quantization.get(key) for key in ("tensors", "leftovers")]
    return parts_of(sum(len(each) for each in described if isinstance(each, dict)))


def _check_packed(packed: Any) -> None:
    if isinstance(packed, StoredEnsemble):
        raise NetworkError(
            f"An ensemble of {packed.num_draws} draws is no transformers model: save it with sqs_pyro.save."
        )
    if not isinstance(packed, transformers.PreTrainedModel) or not hasattr(packed, METADATA):
        what = "not packed" if isinstance(packed, transformers.PreTrainedModel) else "none of transformers"
        raise NetworkError(
            f"A packed transformers model is needed, but a {type(packed).__name__} was given that is {what}: give "
            "the result of packed_network or compress, or save other networks with sqs_pyro.save."
        )


def _loader(config: dict[str, Any], auto_class: Any) -> Any:
    """Return the class to load a checkpoint as."""
    named = config.get("architectures")
    names = [auto_class] if auto_class is not None else named if isinstance(named, list) else []
    if auto_class is not None and not isinstance(auto_class, str):  # a class
        return auto_class
    found = getattr(transformers, names[0], None) if names and isinstance(names[0], str) else None
    if not hasattr(found, "from_pretrained"):
        what = f"has no class {shown(names[0])}" if names else "is not told a class by config.json"
        raise NetworkError(f"transformers {what}: give auto_class=, say 'AutoModelForCausalLM'.")
    return found
