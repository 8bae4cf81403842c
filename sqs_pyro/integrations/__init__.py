"""Other libraries' ways to load and save: packed networks as Hugging Face checkpoints.

Importing this package imports no other library. It registers the quantization method ``"sqs"`` as soon as
transformers itself is imported, before or after: then ``AutoModelForCausalLM.from_pretrained`` reads packed
checkpoints.
"""

import warnings
from os import PathLike
from typing import TYPE_CHECKING, Any

from sqs_pyro.extras import needed_for
from sqs_pyro.integrations.checkpoint_size import CheckpointSize, checkpoint_size
from sqs_pyro.integrations.post_import import after_import
from sqs_pyro.isolation import isolated
from sqs_pyro.networks import task_networks as task_networks  # files name its networks, and load anywhere

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CheckpointSize", "checkpoint_size", "from_pretrained", "save_pretrained"]


def save_pretrained(
    packed: "PreTrainedModel",
    directory: "str | PathLike[str]",
    tokenizer: Any = None,
    *,
    model_card: bool = True,
    **options: Any,
) -> None:
    """Write a packed transformers model as a Hugging Face checkpoint.

    The directory then holds ``config.json`` with a ``quantization_config``, safetensors files with every
    compressed tensor in its stored form (the smallest) and all others in the smallest floating dtype that holds
    them exactly, the generation config, the tokenizer's files, and a README.md that says how to load it and what
    takes how many bytes. ``packed.save_pretrained(directory)`` writes the same without tokenizer and README.md.

    Args:
        packed: what ``packed_network`` (or ``compress``, ``load``, ``from_pretrained``) returned for a
            transformers model.
        directory: where to; made if needed.
        tokenizer: what else to save beside it: anything with ``save_pretrained``, say a tokenizer or processor.
        model_card: whether to write README.md; one that this function has not written is left alone.
        options: of the model's own ``save_pretrained``, say ``max_shard_size``.

    Raises:
        NetworkError: ``packed`` is not a packed transformers model.
        ModuleNotFoundError: transformers is not installed.
        OutputError: the directory cannot be written.
    """
    _require_transformers()
    from sqs_pyro.integrations import transformers_checkpoint  # imports transformers

    with isolated():
        transformers_checkpoint.save_pretrained(packed, directory, tokenizer, model_card=model_card, **options)


def from_pretrained(
    directory: "str | PathLike[str]",
    *,
    auto_class: Any = None,
    dequantize: bool = False,
    **options: Any,
) -> "PreTrainedModel":
    """Load a packed Hugging Face checkpoint as a transformers model that runs on packed weights, in eval mode.

    Its outputs equal those of the saved network exactly. Memory stays near the packed size: no weight is decoded
    to floating-point numbers while loading. transformers' own ``from_pretrained`` does the same once ``sqs_pyro``
    has been imported; this function cannot be called without that.

    Args:
        directory: of the checkpoint, or its name on the Hugging Face Hub.
        auto_class: class to load it as, say ``transformers.AutoModelForSequenceClassification``, or its name;
            None: the class that was saved.
        dequantize: give a plain dense model instead, which transformers can train and save as any other.
        options: of transformers' ``from_pretrained``, say ``dtype=torch.bfloat16`` or ``device_map="cuda"``.

    Raises:
        PackedFileError: the checkpoint is not packed, truncated, altered, incomplete, of a newer version, or made
            for another network.
        NetworkError: no class fits, or ``device_map`` offloads.
        ModuleNotFoundError: transformers is not installed.
        OSError: there is no such checkpoint.
    """
    _require_transformers()
    from sqs_pyro.integrations import transformers_checkpoint

    with isolated():
        return transformers_checkpoint.from_pretrained(
            directory, auto_class=auto_class, dequantize=dequantize, **options
        )


def __getattr__(name: str) -> Any:
    """Import ``SQSConfig`` at its first use: the class needs transformers."""
    if name != "SQSConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _require_transformers()
    from sqs_pyro.integrations.transformers_config import SQSConfig

    return SQSConfig


def _require_transformers() -> None:
    with needed_for("Hugging Face checkpoints"):
        import transformers  # noqa: F401
    _register()


def _register() -> None:
    """Make the method known to transformers; a release that cannot know it still works without."""
    try:
        # Its import registers it: once, however often this is called.
        from sqs_pyro.integrations import transformers_quantizer  # noqa: F401
    except ImportError as error:
        warnings.warn(
            f"Packed checkpoints cannot be loaded with this release of transformers ({error}): install "
            "transformers 5 or later.",
            stacklevel=2,
        )


after_import("transformers.quantizers.auto", _register)
