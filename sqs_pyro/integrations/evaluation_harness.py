"""EleutherAI's lm-evaluation-harness on packed networks.

The harness loads by transformers' own ``from_pretrained``, which reads packed checkpoints once ``sqs_pyro`` is
imported. From the command line that import is what this module is for; every argument is the harness's own:

    python -m sqs_pyro.integrations.evaluation_harness --model hf --model_args pretrained=DIRECTORY --tasks piqa

In Python, :func:`harness_model` also takes networks that are no checkpoint.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sqs_pyro.errors import NetworkError
from sqs_pyro.extras import needed_for
from sqs_pyro.integrations import from_pretrained

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM


def harness_model(network: str | Path | nn.Module, tokenizer: Any = None, **options: Any) -> "HFLM":
    """Return a packed (or any other) causal language model as the harness takes it.

    ``lm_eval.simple_evaluate(model=harness_model("small-llama"), tasks=["arc_easy"])``

    Args:
        network: a packed checkpoint's directory, or a transformers module, packed or not.
        tokenizer: that belongs to it; None takes the directory's.
        options: of the harness's own ``HFLM``, say ``batch_size=8`` or ``max_length=1024``.

    Raises:
        ModuleNotFoundError: the harness is not installed.
        NetworkError: a module without a tokenizer.
        PackedFileError, OSError: as :func:`~sqs_pyro.from_pretrained`.
    """
    HFLM = _language_model_class()
    if isinstance(network, nn.Module):
        if tokenizer is None:
            raise NetworkError(f"A {type(network).__name__} does not bring its tokenizer: give tokenizer=.")
    else:
        from transformers import AutoTokenizer

        # A packed checkpoint brings no code, and none is asked for.
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(network, trust_remote_code=False)
        network = from_pretrained(network)
    return HFLM(pretrained=network, tokenizer=tokenizer, **options)


def main() -> None:
    """Run the harness's command line."""
    _language_model_class()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


def _language_model_class() -> Any:
    with needed_for("Tasks of the evaluation harness"):
        from lm_eval.models.huggingface import HFLM
    return HFLM


if __name__ == "__main__":
    main()
