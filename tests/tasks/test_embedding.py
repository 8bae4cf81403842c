"""Sentences, and how near two networks' embeddings of them are."""

import pytest
import torch
from kits.task_checkpoint import bert_tokenizer, write_rows
from torch.nn import functional as F

from sqs_pyro.data.token_loader import TokenLoader
from sqs_pyro.errors import DataError
from sqs_pyro.networks.task_networks import task_network
from sqs_pyro.tasks.embedding import SentenceData, SentenceEmbedding, recall_at_1

transformers = pytest.importorskip("transformers")

TEXT = (
    "The dog is in the house. The cat, and the dog!\n\nThe river is near it? Too short.\nThe dog is in the house."
)


def test_sentences_are_cut_out_of_texts(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    found = SentenceEmbedding(SentenceData(source=str(tmp_path / "text.txt"), min_words=4)).examples
    assert found.train == ["The dog is in the house."]
    assert found.validation == ["The cat, and the dog!"]
    assert found.test == ["The river is near it?"]


def test_rows_are_sentences_if_asked(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"body": f"text {i}. and more of it"} for i in range(20)])
    found = SentenceEmbedding(SentenceData(source=path, column="body", sentences=False)).examples
    assert [len(found.train), len(found.validation), len(found.test)] == [16, 2, 2]
    assert found.test == ["text 18. and more of it", "text 19. and more of it"]


def test_the_python_documentation():
    found = SentenceEmbedding(SentenceData()).examples
    assert len(found.train) > 1000 and not set(found.train) & set(found.test)


def test_nothing_left(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.raises(DataError, match="has no sentence of 30 words: give another text, or lower min_words"):
        SentenceEmbedding(SentenceData(source=str(tmp_path / "text.txt"), min_words=30))


def test_figures_beside_plain_arithmetic(tmp_path):
    path = write_rows(
        tmp_path / "rows.jsonl", [{"text": f"the dog {'is ' * (i % 7)} {chr(98 + i % 20)}."} for i in range(30)]
    )
    task = SentenceEmbedding(SentenceData(source=path, sentences=False, min_words=1, noise=0.5))
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(bert_tokenizer()), **sizes, initializer_range=0.5)
    teacher, student = (task_network(transformers.BertModel(config), "embedding").eval() for _ in range(2))
    observed = task.observed(task.datasets(bert_tokenizer()), teacher)
    targets = observed.train.targets

    def embed(net, example):  # one at a time: no padding
        hidden = net.transformer(**{name: value[None] for name, value in example.items()}).last_hidden_state
        return F.normalize(hidden[0].mean(0), dim=0)

    with torch.no_grad():
        own = torch.stack([embed(student, example) for example in observed.train.inputs])
        expected = torch.stack([embed(teacher, example) for example in observed.train.inputs])
    torch.testing.assert_close(targets, expected, rtol=0, atol=1e-5)
    measured = task.measure(student, TokenLoader(observed.train, 7, pad_token=0))
    assert measured["cosine"] == pytest.approx(float((own * expected).sum(1).mean()), abs=1e-5)
    nearest = (own[:, None] * expected[None]).sum(-1).argmax(1)
    assert measured["recall_at_1"] == pytest.approx(float((nearest == torch.arange(len(own))).float().mean()))
    law = torch.distributions.Normal(own, 0.5 / 16**0.5)
    assert measured["nll"] == pytest.approx(-float(law.log_prob(expected).sum(1).mean()), rel=1e-3)
    of_itself = task.measure(teacher, TokenLoader(observed.train, 4, pad_token=0))
    assert of_itself["cosine"] == pytest.approx(1, abs=1e-5) and of_itself["recall_at_1"] == 1


def test_recall_does_not_depend_on_length():
    targets = torch.randn(50, 8)
    assert recall_at_1(3 * targets, targets) == 1
    assert recall_at_1(targets.roll(1, 0), targets) == 0
