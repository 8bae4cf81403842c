"""Write and read Hugging Face checkpoints of packed networks; see :mod:`sqs_pyro.integrations`."""

from os import PathLike
from pathlib import Path
from typing import Any

import transformers

from sqs_pyro.errors import NetworkError
from sqs_pyro.integrations.checkpoint_size import packed_config
from sqs_pyro.integrations.model_card import write_model_card
from sqs_pyro.integrations.transformers_quantizer import SQSQuantizer, attach
from sqs_pyro.packing.module import METADATA, StoredEnsemble

# What `from_pretrained` takes to find files; the rest is for the model.
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def save_pretrained(
    packed: Any, directory: "str | PathLike[str]", tokenizer: Any, *, model_card: bool, **options: Any
) -> None:
    """Write a packed model, its tokenizer and its card; see :func:`sqs_pyro.integrations.save_pretrained`."""
    _check_packed(packed)
    if not isinstance(getattr(packed, "hf_quantizer", None), SQSQuantizer):
        attach(packed)
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise NetworkError(
            f"tokenizer is a {type(tokenizer).__name__} without save_pretrained: give a tokenizer or processor of "
            "transformers, or None."
        )
    packed.save_pretrained(directory, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    if model_card:
        write_model_card(Path(directory), type(packed).__name__)


def from_pretrained(directory: "str | PathLike[str]", *, auto_class: Any, dequantize: bool, **options: Any) -> Any:
    """Load a packed checkpoint; see :func:`sqs_pyro.from_pretrained`."""
    where = {key: options[key] for key in _WHERE if key in options}
    config, _ = transformers.PreTrainedConfig.get_config_dict(directory, **where)
    packed_config(config, directory)
    loaded = _loader(config, auto_class).from_pretrained(directory, **options)
    if dequantize:
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        if hasattr(model, "hf_quantizer"):  # else the config says the same
            model.dequantize()
    return loaded


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
    names = [auto_class] if auto_class is not None else config.get("architectures") or []
    if names and not isinstance(names[0], str):
        return names[0]
    found = getattr(transformers, names[0], None) if names else None
    if found is None:
        what = f"has no class {names[0]!r}" if names else "is not told a class by config.json"
        raise NetworkError(f"transformers {what}: give auto_class=, say 'AutoModelForCausalLM'.")
    return found
