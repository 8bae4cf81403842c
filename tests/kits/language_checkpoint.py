"""A language model's checkpoint as a user has one on disk, of two layers with random weights, and texts."""

from pathlib import Path

import pytest
import torch

import sqs_pyro  # noqa: F401  # first: transformers imports a torchvision that may need to be repaired

transformers = pytest.importorskip("transformers")

_SENTENCES = (
    "the cat sat on the mat and looked at the dog.",
    "a dog that barks at night sleeps by day.",
    "nobody has seen the river as high as it was in that spring.",
    "she counted the stairs, and there was one too many.",
    "bread, salt and a little oil are enough for supper.",
)
LENGTH = 24


def text(seed: int, paragraphs: int = 60) -> str:
    """Paragraphs of three sentences, in an order of their own for each seed."""
    order = torch.randint(len(_SENTENCES), (paragraphs, 3), generator=torch.Generator().manual_seed(seed))
    return "\n\n".join(" ".join(_SENTENCES[i] for i in row) for row in order.tolist())


def tokenizer() -> "transformers.PreTrainedTokenizerFast":
    """Byte-level BPE, trained on the sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_SENTENCES, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def write_checkpoint(directory: Path, seed: int = 0, **changes) -> Path:
    """A Llama and its tokenizer, as ``save_pretrained`` writes them, in several shards."""
    words = tokenizer()
    options = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    torch.manual_seed(seed)
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**options, **changes}))
    net.save_pretrained(directory, max_shard_size="30kB")
    words.save_pretrained(directory)
    return directory


def recipe_values(directory: Path) -> dict:
    """A recipe that takes seconds, of files that are written into a directory."""
    if not (directory / "checkpoint").exists():
        write_checkpoint(directory / "checkpoint")
        (directory / "calibration.txt").write_text(text(1), encoding="utf-8")
        (directory / "foreign.txt").write_text(text(2, 12), encoding="utf-8")
    return {
        "name": "tiny",
        "network": {"path": str(directory / "checkpoint")},
        "text": {"source": str(directory / "calibration.txt"), "length": LENGTH, "count": 8},
        "generated": 4,
        "blockwise": {"bits": 3.5, "importance_sequences": 4, "batch_size": 4},
        "evaluation": {
            "window": 32,
            "stride": 16,
            "tokens": 400,
            "foreign": str(directory / "foreign.txt"),
            "batch_size": 4,
        },
    }
