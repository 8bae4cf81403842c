"""Texts from their sources, and token sequences of them, with tokenizers of a few words."""

import argparse
import json
import sys
import types
import zipimport
from pathlib import Path

import pytest
import torch

from sqs_pyro.data import Text, TextRecipe, load_text, token_sequences, token_stream
from sqs_pyro.data.text import text_of_file
from sqs_pyro.data.text_sources import pydoc_documents
from sqs_pyro.errors import DataError, MissingPackageError, RecipeError
from sqs_pyro.recipes import parse

PARAGRAPHS = [f"Paragraph {i}." for i in range(9)]


def write(path: Path, texts: list[str] = PARAGRAPHS, column: str = "text") -> Path:
    rows = [{"id": i, column: text} for i, text in enumerate(texts)]
    content = {
        ".txt": "\n\n".join(texts),
        ".json": json.dumps(rows),
        ".jsonl": "\n".join(json.dumps(row) for row in rows) + "\n",
        ".csv": f"id,{column}\n" + "".join(f'{row["id"]},"{row[column]}"\n' for row in rows),
    }[path.suffix]
    path.write_text(content, encoding="utf-8")
    return path


# Sources ----------------------------------------------------------------------------------------------


def test_pydoc_holds_out_every_fourth_topic():
    from pydoc_data.topics import topics

    text = load_text(TextRecipe(source="pydoc"))
    names = sorted(topics)
    assert text.held_out == "\n\n".join(topics[name] for name in names[3::4])
    assert all(topics[name] in text.calibration for name in names[:3] + names[4:7])
    assert len(text.calibration) + len(text.held_out) == sum(map(len, topics.values())) + 2 * (len(topics) - 2)
    assert text.name == "pydoc" and load_text(TextRecipe()) == text


@pytest.mark.parametrize("kind", [".txt", ".json", ".jsonl", ".csv"])
def test_the_end_of_a_file_is_held_out(tmp_path, kind):
    path = write(tmp_path / f"corpus{kind}")
    expected = Text("\n\n".join(PARAGRAPHS[:6]), "\n\n".join(PARAGRAPHS[6:]), f"corpus{kind}")
    assert load_text(TextRecipe(source=str(path))) == expected


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv"])
def test_column(tmp_path, kind):
    path = write(tmp_path / f"corpus{kind}", column="body")
    assert load_text(TextRecipe(source=str(path), column="body")).calibration.startswith("Paragraph 0.")
    with pytest.raises(DataError, match=r"corpus\.\w+' has no column 'text' in row 1: its columns are id, body"):
        load_text(TextRecipe(source=str(path)))


def test_another_file_is_held_out(tmp_path):
    first, second = write(tmp_path / "a.txt"), write(tmp_path / "b.csv", ["Foreign."])
    text = load_text(TextRecipe(source=str(first), held_out=str(second)))
    assert text == Text("\n\n".join(PARAGRAPHS), "Foreign.", "a.txt")
    assert load_text(TextRecipe(held_out=str(second))).held_out == "Foreign."


def test_further_texts_are_calibrated_on_and_never_judged_by(tmp_path):
    first, second = write(tmp_path / "a.txt"), write(tmp_path / "b.csv", ["Of another kind."])
    text = load_text(TextRecipe(source=str(first), further=[str(second), "pydoc"]))
    assert text.further == {str(second): "Of another kind.", "pydoc": "\n\n".join(pydoc_documents())}
    alone = load_text(TextRecipe(source=str(first)))
    assert (text.calibration, text.held_out) == (alone.calibration, alone.held_out)


def test_the_code_of_python_s_library():
    text = load_text(TextRecipe(source="stdlib"))
    assert Path(argparse.__file__).read_text(encoding="utf-8") in text.calibration
    assert Path(zipimport.__file__).read_text(encoding="utf-8") in text.held_out
    assert "def " in text.held_out and text.name == "stdlib"


@pytest.mark.parametrize(
    "twice", [{"further": ["pydoc"]}, {"further": ["a", "a"]}, {"held_out": "a", "further": ["a"]}]
)
def test_a_text_has_one_purpose(twice):
    with pytest.raises(RecipeError, match=r"none is given twice, as source, held_out or in further: '(pydoc|a)'"):
        parse(TextRecipe, twice, "text")


def test_what_files_may_hold(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffOne\r\nline\r\n \r\n\r\nTwo".encode())
    assert load_text(TextRecipe(source=str(tmp_path / "a.txt"))) == Text("One\nline", "Two", "a.txt")
    (tmp_path / "a.csv").write_text('text\n"of, two\nlines \u2028"\n" "\nplain \x0b text\n', encoding="utf-8")
    assert load_text(TextRecipe(source=str(tmp_path / "a.csv"))) == Text(
        "of, two\nlines \u2028", "plain \x0b text", "a.csv"
    )
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b"}\n\n{"text": "c"}', encoding="utf-8")
    assert load_text(TextRecipe(source=str(tmp_path / "a.jsonl"))) == Text("a\u2028b", "c", "a.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.txt", None, "'.*none.txt' was not found: correct the path"),
        ("a.md", "text", r"'.*a.md' is no text that can be read here: give a file in .txt, .json, .jsonl, .csv"),
        ("a.txt", " \n ", "'.*a.txt' is empty"),
        ("a.txt", b"\xff\xfe\x00", r"'.*a.txt' is not UTF-8 \(byte 0\)"),
        ("a.txt", "one paragraph", "'.*a.txt' leaves no text to calibrate on: .*`held_out`"),
        ("a.json", "{", r"'.*a.json' is no JSON .*a \.jsonl file"),
        ("a.json", '{"text": "a"}', "'.*a.json' holds a dict, but must hold a list"),
        ("a.json", '["a"]', r"'.*a.json' has no column 'text' in row 1: its columns are none \(a str\)"),
        ("a.json", '[{"text": null}]', "has None in column 'text' of row 1, which is no text"),
        ("a.json", '[{"text": " "}]', "has no text in column 'text': name another"),
        ("a.jsonl", '{"text": "a"}\n{"text"', "Line 2 of '.*a.jsonl' is no JSON"),
        ("a.csv", "text\n" + "a" * 200_000, r"'.*a.csv' cannot be read as CSV: field larger.*\.jsonl"),
        ("a.csv", "text\n", "has no text in column 'text'"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=sentence):
        load_text(TextRecipe(source=str(tmp_path / name)))


class TestHub:
    """Against a package of the name ``datasets`` that notes what it is asked for."""

    @pytest.fixture
    def hub(self, monkeypatch):
        asked = []

        def load_dataset(name, subset, split):
            asked.append((name, subset, split))
            if name == "away":
                raise ConnectionError("Couldn't reach the hub.")
            return [{"text": f"{split} {i}"} for i in range(4)]

        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
        return asked

    def test_splits(self, hub):
        recipe = TextRecipe(source="owner/name", subset="raw", held_out="test")
        train, test = ("\n\n".join(f"{split} {i}" for i in range(4)) for split in ("train", "test"))
        assert load_text(recipe) == Text(train, test, "owner/name")
        assert hub == [("owner/name", "raw", "train"), ("owner/name", "raw", "test")]

    def test_one_split(self, hub):
        text = load_text(TextRecipe(source="name", split="validation"))
        assert text.held_out == "validation 3"
        assert hub == [("name", None, "validation")]

    def test_foreign_file(self, hub, tmp_path):
        foreign = write(tmp_path / "foreign.txt", ["Foreign."])
        assert load_text(TextRecipe(source="name", held_out=str(foreign))).held_out == "Foreign."

    def test_errors(self, hub):
        with pytest.raises(
            DataError, match=r"Split 'train' of data set 'away' .*Couldn't reach the hub.*or 'pydoc'"
        ):
            load_text(TextRecipe(source="away"))
        with pytest.raises(DataError, match="'name' has no column 'body' in row 1: its columns are text"):
            load_text(TextRecipe(source="name", column="body"))

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(
            MissingPackageError, match=r"'owner/name' need the package 'datasets', .*\[text\]', or give a file"
        ):
            load_text(TextRecipe(source="owner/name"))
        assert load_text(TextRecipe()).name == "pydoc"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lenght": 3}, "'calibration.lenght' is unknown.*did you mean 'length'"),
        ({"length": 1}, "'calibration.length' is 1, but should be greater than or equal to 2"),
        ({"count": 0}, "'calibration.count' is 0"),
        ({"source": ""}, "'calibration.source' is ''"),
    ],
)
def test_a_wrong_recipe(values, sentence):
    with pytest.raises(RecipeError, match=sentence):
        parse(TextRecipe, values, where="calibration")


# Tokens -----------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of the package ``tokenizers``' manners: a letter is a token, its number in the alphabet."""

    def encode(self, text: str, add_special_tokens: bool):
        assert not add_special_tokens
        return types.SimpleNamespace(ids=[ord(letter) - ord("a") for letter in text if letter.isalpha()])


ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def test_all_sequences_are_the_text_cut_up():
    assert torch.equal(token_sequences(Letters(), ALPHABET, 5), torch.arange(25).view(5, 5))
    assert torch.equal(token_stream(Letters(), ALPHABET), torch.arange(26))


def test_drawn_sequences_are_some_of_them_in_order():
    every = {tuple(row) for row in torch.arange(24).view(8, 3).tolist()}
    drawn = [token_sequences(Letters(), ALPHABET, 3, 4, seed=seed) for seed in range(20)]
    for sequences in drawn:
        rows = [tuple(row) for row in sequences.tolist()]
        assert len(set(rows)) == 4 and set(rows) <= every and rows == sorted(rows)
    assert {tuple(row) for sequences in drawn for row in sequences.tolist()} == every
    assert torch.equal(drawn[3], token_sequences(Letters(), ALPHABET, 3, 4, seed=3))
    assert len({tuple(sequences.flatten().tolist()) for sequences in drawn}) > 10


def test_tokens_around_each_sequence():
    sequences = token_sequences(Letters(), ALPHABET[:9], 6, prefix=[30], suffix=[31, 32], vocab_size=33)
    assert sequences.tolist() == [[30, 0, 1, 2, 31, 32], [30, 3, 4, 5, 31, 32], [30, 6, 7, 8, 31, 32]]


def test_tokenizer_of_transformers():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[CLS]": 0, "[UNK]": 1, "a": 2, "b": 3}, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=4, cls_token="[CLS]")
    assert fast("a b")["input_ids"] == [0, 2, 3]
    for tokenizer in (words, fast):
        assert token_sequences(tokenizer, "a b c a b a b", 3).tolist() == [[2, 3, 1], [2, 3, 2]]


def test_a_long_text_is_no_reason_to_warn(caplog):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=4)
    transformers.logging.enable_propagation()
    try:
        token_sequences(fast, "a " * 50, 3)
    finally:
        transformers.logging.disable_propagation()
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "arguments", "sentence"),
    [
        ("abc", {"length": 4}, "has 3 tokens, fewer than one sequence of 4: give more text or a smaller length"),
        ("abc", {"length": 2, "count": 2}, "gives 1 sequences of 2 tokens, but 2 were asked for: .* from 1 to 1"),
        ("abc", {"length": 1, "count": 0}, "but 0 were asked for"),
        (
            "abz",
            {"length": 1, "vocab_size": 25},
            "Tokens run from 0 to 25, but the network knows 0 to 24: use the t",
        ),
        ("abc", {"length": 2, "prefix": [7], "vocab_size": 7}, "run from 0 to 7, but the network knows 0 to 6"),
        ("abc", {"length": 2, "prefix": [1], "suffix": [1]}, r"of 2 tokens leaves no room for text beside 1 \+ 1"),
        ("123", {"length": 2}, "The text has no tokens"),
        ("", {"length": 2}, "The text has no tokens"),
    ],
)
def test_tokens_that_do_not_fit(text, arguments, sentence):
    with pytest.raises(DataError, match=sentence):
        token_sequences(Letters(), text, **arguments)


def test_all_of_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n\ntwo")
    (tmp_path / "a.csv").write_text("said\none\ntwo\n")
    assert text_of_file(tmp_path / "a.txt") == text_of_file(tmp_path / "a.csv", "said") == "one\n\ntwo"
    with pytest.raises(DataError, match="has no column 'text'"):
        text_of_file(tmp_path / "a.csv")
