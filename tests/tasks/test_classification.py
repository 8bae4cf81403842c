"""Labelled texts from files: what GLUE says of them, what is held out, and what is no label."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from kits.task_checkpoint import bert_tokenizer, opinions, write_rows
from scipy.stats import pearsonr
from torch import nn

from sqs_pyro.data.token_loader import TokenLoader
from sqs_pyro.errors import DataError, RecipeError
from sqs_pyro.recipes import parse
from sqs_pyro.tasks.classification import ClassificationData, TextClassification


def data(**values) -> ClassificationData:
    return parse(ClassificationData, values, "data")


def task(tmp_path, rows, **values) -> TextClassification:
    return TextClassification(data(source=write_rows(tmp_path / "rows.jsonl", rows), **values))


def test_glue_says_what_the_recipe_does_not():
    hub = data(glue="cola")
    assert (hub.source, hub.subset, hub.split, hub.test) == ("nyu-mll/glue", "cola", "train", "validation")
    assert (hub.columns, hub.metric) == (("sentence",), "matthews")
    assert data(glue="mnli").test == "validation_matched" and len(data(glue="mnli").labels) == 3
    local = data(glue="mrpc", source="here.csv", label="same")
    assert (local.columns, local.label, local.metric) == (("sentence1", "sentence2"), "same", "f1")
    assert local.subset is None and local.test is None
    assert data(**json.loads(local.model_dump_json())) == local


def test_a_tenth_of_every_class_is_held_out_twice(tmp_path):
    examples = task(tmp_path, opinions(200, 0), glue="sst2").examples
    assert [len(examples.train), len(examples.validation), len(examples.test)] == [160, 20, 20]
    for part in (examples.validation, examples.test):
        assert sum(example.label for example in part) == 10
    rows = sorted((row["sentence"], row["label"]) for row in opinions(200, 0))
    everything = [*examples.train, *examples.validation, *examples.test]
    assert sorted((e.texts[0], e.label) for e in everything) == rows


def test_parts_of_their_own(tmp_path):
    write_rows(tmp_path / "dev.jsonl", opinions(8, 1)), write_rows(tmp_path / "test.jsonl", opinions(6, 2))
    where = {"validation": str(tmp_path / "dev.jsonl"), "test": str(tmp_path / "test.jsonl")}
    examples = task(tmp_path, opinions(4, 0), glue="sst2", **where).examples
    assert [len(examples.train), len(examples.validation), len(examples.test)] == [4, 8, 6]


def test_splits_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        return opinions(20, len(asked))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    examples = TextClassification(data(glue="sst2")).examples
    assert sorted(asked) == [("nyu-mll/glue", "sst2", "train"), ("nyu-mll/glue", "sst2", "validation")]
    assert [len(examples.train), len(examples.validation), len(examples.test)] == [18, 2, 20]


def test_pairs_become_one_sequence_of_two_types(tmp_path):
    rows = [{"sentence1": "the dog", "sentence2": "a cat is in it", "label": i % 2} for i in range(9)]
    example = task(tmp_path, rows, glue="rte").datasets(bert_tokenizer()).train.inputs[0]
    assert example["token_type_ids"].tolist() == [0] * 4 + [1] * 6
    words = bert_tokenizer().decode(example["input_ids"])
    assert words == "[CLS] the dog [SEP] a cat is in it [SEP]"


@pytest.mark.parametrize("labels", [["0", "1"], ["negative", "positive"], [0.0, 1.0], [False, True]])
def test_labels_are_numbers_or_names(tmp_path, labels):
    rows = [{"sentence": f"{i}", "label": labels[i % 2]} for i in range(8)]
    found = task(tmp_path, rows, glue="sst2")
    kept = {example.texts[0]: example.label for part in vars(found.examples).values() for example in part}
    assert kept == {f"{i}": i % 2 for i in range(8)}
    assert found.num_labels == 2


def test_numbers_to_predict(tmp_path):
    rows = [{"sentence1": chr(98 + i), "sentence2": "b", "label": i / 4} for i in range(20)]
    found = task(tmp_path, rows, glue="stsb")
    assert found.num_labels == 1 and found.network_options == {"num_labels": 1}
    train = found.datasets(bert_tokenizer()).train
    assert train.targets.shape == (16, 1) and train.targets.dtype == torch.float32
    law = found.likelihood(torch.zeros(16, 1))
    assert law.batch_shape == (16,) and law.event_shape == (1,)

    class Fixed(nn.Module):
        def forward(self, input_ids, **rest):
            return (input_ids.sum(1, keepdim=True) % 7).float()

    loader = TokenLoader(train, 4, 0)
    measured = found.measure(Fixed(), loader)
    predicted = np.concatenate([(x["input_ids"].sum(1) % 7).numpy() for x, _ in loader])
    assert measured["pearson"] == pytest.approx(pearsonr(predicted, train.targets[:, 0].numpy()).statistic)
    squares = (torch.tensor(predicted) - train.targets[:, 0]).square()
    assert measured["nll"] == pytest.approx(float((squares / 2 + 0.5 * np.log(2 * np.pi)).mean()), rel=1e-5)


class TestSaysWhatIsWrong:
    @pytest.mark.parametrize(
        ("label", "sentence"),
        [
            (2, r"Labels in column 'label' run from 0 to 2, but classes are 0 to 1: correct them"),
            (-1, r"run from -1 to 1, but .* give a split whose labels are not hidden \(-1\)"),
            ("good", r"has 'good' in column 'label' of row 9, but a label is a .* one of negative, positive"),
            (0.5, r"has 0\.5 in column 'label' of row 9"),
            (None, r"has None in column 'label' of row 9"),
            ("nan", r"has 'nan' in column 'label' of row 9"),
            ([1], r"has \[1\] in column 'label' of row 9"),
        ],
    )
    def test_a_label(self, tmp_path, label, sentence):
        rows = [*opinions(8, 0), {"sentence": "the dog", "label": label}, *opinions(8, 1)]
        with pytest.raises(DataError, match=sentence):
            task(tmp_path, rows, glue="sst2")

    def test_a_column(self, tmp_path):
        with pytest.raises(DataError, match=r"no column 'text' in row 1: its columns are sentence, label, idx"):
            task(tmp_path, opinions(8, 0))
        with pytest.raises(DataError, match=r"no column 'gold' in row 1"):
            task(tmp_path, opinions(8, 0), glue="sst2", label="gold")
        with pytest.raises(DataError, match=r"has 3 in column 'sentence' of row 1, which is no text"):
            task(tmp_path, [{"sentence": 3, "label": 0}], glue="sst2")

    def test_too_little(self, tmp_path):
        with pytest.raises(
            DataError, match=r"has 2 examples, too few to hold some out .* `validation` and `test`"
        ):
            task(tmp_path, opinions(2, 0), glue="sst2")
        (tmp_path / "empty.json").write_text("[]")
        with pytest.raises(DataError, match=r"empty\.json' has no example"):
            TextClassification(data(glue="sst2", source=str(tmp_path / "empty.json")))

    def test_a_file(self, tmp_path):
        with pytest.raises(DataError, match=r"Text file '.*nothing\.csv' was not found: correct the path"):
            TextClassification(data(glue="sst2", source=str(tmp_path / "nothing.csv")))
        with pytest.raises(DataError, match=r"'validation' is no file .* has no splits: give a file"):
            task(tmp_path, opinions(20, 0), glue="sst2", test="validation")
        (tmp_path / "a.txt").write_text("text")
        with pytest.raises(DataError, match=r"a\.txt' has no rows that can be read here: give a file in \.json"):
            TextClassification(data(glue="sst2", source=str(tmp_path / "a.txt")))

    def test_a_task_of_glue(self):
        with pytest.raises(
            RecipeError, match=r"'data\.glue' is 'sst3', but should be 'cola', 'sst2', .* or 'wnli'"
        ):
            data(glue="sst3")
        with pytest.raises(RecipeError, match="should be a section with a source, or with glue, a task of GLUE"):
            data(columns=["a"])
