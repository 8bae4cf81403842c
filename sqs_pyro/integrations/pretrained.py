"""The language model that a recipe names: configuration, tokenizer and weights, through transformers.

Each of the three is loaded on its own, so that what is cheap is checked first. transformers is imported here and
only when it is needed; sqs_pyro comes first, which makes torchvision importable.
"""

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.errors import NetworkError, SQSError, first_line
from sqs_pyro.extras import needed_for
from sqs_pyro.integrations.pretrained_recipe import PretrainedRecipe
from sqs_pyro.networks.architectures import architecture_of, base_path, is_known, layer_names
from sqs_pyro.networks.calling import predictions
from sqs_pyro.networks.linear_form import in_linear_form
from sqs_pyro.networks.tokens import vocabulary_size


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A checkpoint whose weights are not loaded yet.

    Attributes:
        recipe: which checkpoint.
        config: its configuration.
        tokenizer: that belongs to it.
    """

    recipe: PretrainedRecipe
    config: Any
    tokenizer: Any

    def network(
        self, auto_class: str = "AutoModelForCausalLM", *, new_head: bool = False, **options: Any
    ) -> nn.Module:
        """Return the network with its weights, in evaluation mode on the CPU.

        Args:
            auto_class: of transformers, that says which head the network has.
            new_head: whether a head may be missing in the checkpoint; it is then initialised at random.
            options: of its configuration, in place of the checkpoint's.

        Raises:
            NetworkError: weights are missing, damaged or of another shape than the configuration says, or a block
                has layers that its architecture does not name.
        """
        transformers = transformers_package()
        # `quiet` inside: what it puts back is put back before the error is told.
        with _one_sentence("weights", self.recipe), quiet(transformers, Path(self.recipe.path)):
            net, found = getattr(transformers, auto_class).from_pretrained(
                self.recipe.path,
                dtype=getattr(torch, self.recipe.dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are looked at below, where transformers only logs them
                **_where(self.recipe),
                **options,
            )
        # transformers draws such weights at random and only logs it: the network would be judged with them.
        wrong = sorted(found["missing_keys"]) + sorted(str(each[0]) for each in found["mismatched_keys"])
        # A base model needs no head, and a new one is trained.
        if auto_class == "AutoModel" or new_head:
            wrong = [name for name in wrong if not is_of_head(net, name)]
        if wrong:
            hint = "" if auto_class == "AutoModelForCausalLM" else ", or train a head with a section `baseline`"
            raise NetworkError(
                f"Checkpoint '{self.recipe.path}' lacks {len(wrong)} weights of a {type(net).__name__}, or has "
                f"them in another shape, '{wrong[0]}' first: give a complete checkpoint with the config.json that "
                f"belongs to it{hint}."
            )
        if is_known(net):
            with in_linear_form(net):
                layer_names(net)  # raises, where compression would after a while
        return net.eval()

    def unloaded_network(self) -> nn.Module:
        """Return the network without its weights, for a packed file to fill."""
        transformers = transformers_package()
        with _one_sentence("network", self.recipe), torch.random.fork_rng(devices=[]):
            dtype = getattr(torch, self.recipe.dtype)
            # First weights are drawn and then overwritten: not from the caller's random state.
            return transformers.AutoModelForCausalLM.from_config(
                self.config, dtype=dtype, trust_remote_code=False
            ).eval()


def find_pretrained(recipe: PretrainedRecipe, *, known: bool = True) -> Pretrained:
    """Load configuration and tokenizer of a checkpoint; its weights are left alone.

    Args:
        recipe: which checkpoint.
        known: whether its architecture must be a known one.

    Raises:
        NetworkError: transformers is not installed, there is no such checkpoint, its architecture is unknown, or
            it has no tokenizer.
    """
    _check_path(recipe)
    transformers = transformers_package()
    if recipe.gguf_file is not None:
        with needed_for("GGUF files"):
            importlib.import_module("gguf")
    if recipe.gguf_file is None and Path(recipe.path, "config.json").is_file():
        from sqs_pyro.integrations.checkpoint_documents import read_config  # needs transformers

        read_config(Path(recipe.path), NetworkError)
    with _one_sentence("configuration", recipe), quiet(transformers, Path(recipe.path)):
        config = transformers.AutoConfig.from_pretrained(recipe.path, **_where(recipe))
    if known:
        architecture_of(config)
    with _one_sentence("tokenizer", recipe), quiet(transformers, Path(recipe.path)):
        tokenizer = transformers.AutoTokenizer.from_pretrained(recipe.path, **_where(recipe))
    return Pretrained(recipe, config, tokenizer)


def pad_token(found: Pretrained) -> int:
    """Return the token behind shorter sequences of a minibatch: for padding or, as decoders have none, the last.

    Classifiers on decoders look for the last token that is not this one, so it must not end the texts themselves.

    Raises:
        NetworkError: the tokenizer has neither a padding token nor one that ends a text, or the network does not
            know it.
    """
    words = found.tokenizer
    # 0 is a token: `or` would pass it over.
    token = words.eos_token_id if words.pad_token_id is None else words.pad_token_id
    if token is None:
        raise NetworkError(
            f"The tokenizer of '{found.recipe.path}' has neither a padding token nor one that ends a text: set "
            "pad_token in its tokenizer_config.json."
        )
    known = vocabulary_size(found)
    if known is not None and token >= known:
        raise NetworkError(
            f"The tokenizer of '{found.recipe.path}' pads with token {token}, but the network knows "
            f"0 to {known - 1}: use the tokenizer that belongs to the network."
        )
    return int(token)


@torch.no_grad()
def check_causal(net: nn.Module, tokens: Tensor) -> None:
    """Check that a network foretells tokens from those before them only; else its perplexity means nothing.

    Args:
        net: the network.
        tokens: a few, int64 ``[T]``.

    Raises:
        NetworkError: the prediction of a token changes with the token.
    """
    other = tokens.clone()
    # Another token, and one that every vocabulary has.
    other[-1] = tokens[-1] - 1 if tokens[-1] > 0 else 1
    logits = predictions(net, {"input_ids": torch.stack([tokens, other])})
    first, second = logits[:, :-1].float().nan_to_num()  # perplexity has a sentence of its own for NaN
    # Generous: two rows of a batch may be summed in different order, in bfloat16.
    if not torch.allclose(first, second, rtol=1e-2, atol=1e-2 * float(first.abs().max())):
        raise NetworkError(
            f"{type(net).__name__} looks at the tokens that it is to foretell: perplexity needs a causal language "
            "model."
        )


def is_of_head(net: nn.Module, name: str) -> bool:
    """Return whether a weight stands behind the base model; so does a pooler, which not every head needs."""
    path = base_path(net)
    return name.startswith("pooler.") or ".pooler." in name or (bool(path) and not name.startswith(f"{path}."))


def _check_path(recipe: PretrainedRecipe) -> None:
    path = recipe.path
    if Path(path).is_file():
        raise NetworkError(
            f"Checkpoint '{path}' is a file: give its directory, or a GGUF file (*.gguf), as network.path."
        )
    if recipe.gguf_file is not None and Path(path).is_dir() and not Path(path, recipe.gguf_file).is_file():
        raise NetworkError(f"GGUF file '{recipe.gguf_file}' is not in '{path}': correct network.path.")
    # "owner/name" or "name", as the hub has them; "./network" and "/data/network" can only be directories.
    if not Path(path).is_dir() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path):
        raise NetworkError(
            f"Checkpoint directory '{path}' is not there: correct network.path, a directory with config.json, "
            "weights and tokenizer, or a model's name on the Hugging Face hub."
        )


def _where(recipe: PretrainedRecipe) -> dict[str, Any]:
    gguf = {} if recipe.gguf_file is None else {"gguf_file": recipe.gguf_file}
    # A directory is complete: nothing is fetched for it. Code of a checkpoint is never run.
    return {"local_files_only": Path(recipe.path).is_dir(), "trust_remote_code": False, **gguf}


def transformers_package() -> Any:
    """Return the package, imported.

    Raises:
        MissingPackageError: it is not installed.
    """
    with needed_for("Language models"):
        return importlib.import_module("transformers")


@contextmanager
def _one_sentence(part: str, recipe: PretrainedRecipe) -> Iterator[None]:
    try:
        yield
    except SQSError:
        raise
    except Exception as error:  # each of transformers, tokenizers, safetensors, gguf has classes of its own
        reason = first_line(error)
        place = f"'{recipe.path}'" if recipe.gguf_file is None else f"'{recipe.gguf_file}' in '{recipe.path}'"
        if Path(recipe.path).is_dir():
            raise NetworkError(
                f"The {part} of {place} cannot be loaded ({reason}): correct network.path, or complete the "
                "checkpoint."
            ) from error
        raise NetworkError(
            f"'{recipe.path}' is no directory here, and the Hugging Face hub does not give its {part} ({reason}): "
            "correct network.path, or check the connection."
        ) from error


@contextmanager
def quiet(transformers: Any, path: Path) -> Iterator[None]:
    """Keep transformers' own reports and bars off stderr while it loads; a download keeps its bar."""
    logging = transformers.utils.logging
    # transformers keeps both for the process.
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if path.is_dir():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
