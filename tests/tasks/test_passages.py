"""Windows against the characters that they came from, and the best span against every span there is."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kits.task_checkpoint import asked, bert_tokenizer, decoder_tokenizer

from sqs_pyro.tasks.passages import best_span, passages, predicted_texts
from sqs_pyro.tasks.squad import Answer, Question, questions

MAX, STRIDE, QUESTION = 24, 6, 8
COLUMNS = ("question", "context", "answers")


@pytest.fixture(scope="module", params=["bert", "decoder"])
def words(request):
    return bert_tokenizer() if request.param == "bert" else decoder_tokenizer()


@pytest.fixture(scope="module")
def dataset(words):
    return passages(questions(asked(40, 5), "here", COLUMNS), words, MAX, STRIDE, QUESTION)


def test_windows_cover_every_context_and_overlap_by_the_stride(dataset, words):
    source = dataset.source
    for number, question in enumerate(source.questions):
        windows = [w for w in source.windows if w.question == number]
        all_tokens = words(question.context, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        seen = [[tuple(o) for o in w.offsets[w.in_context].tolist()] for w in windows]
        assert seen[0][0] == all_tokens[0] and seen[-1][-1] == all_tokens[-1]
        for first, second in itertools.pairwise(seen):
            assert first[-STRIDE:] == second[:STRIDE]
        assert sorted(set(itertools.chain(*seen))) == all_tokens
    assert len(source.windows) == len(dataset) > len(source.questions)
    assert max(len(example["input_ids"]) for example in dataset.inputs) == MAX


def test_targets_are_the_answer_s_characters(dataset):
    whole = 0
    source = dataset.source
    for window, (start, end) in zip(source.windows, dataset.targets.tolist(), strict=True):
        question = source.questions[window.question]
        answer, offsets = question.answers[0], window.offsets
        covered = offsets[window.in_context]
        if (start, end) == (0, 0):
            assert not (covered[0, 0] <= answer.start and covered[-1, 1] >= answer.end)
            continue
        whole += 1
        assert question.context[offsets[start, 0] : offsets[end, 1]].strip() == answer.text
    assert whole >= len(source.questions)  # each answer is whole in one window at least


def test_tokens_of_the_question_and_special_ones_are_not_of_the_context(dataset, words):
    for window, example in zip(dataset.source.windows, dataset.inputs, strict=True):
        question = dataset.source.questions[window.question]
        outside = words.decode(example["input_ids"][~window.in_context], skip_special_tokens=True)
        assert outside.replace(" ", "") == question.text.replace(" ", "")
        inside = example["input_ids"][window.in_context]
        begin, end = window.offsets[window.in_context][[0, -1], [0, 1]].tolist()
        assert words.decode(inside).replace(" ", "") == question.context[begin:end].replace(" ", "")


def test_a_long_question_is_cut_off(words):
    question = Question("what colour was the dog " * 9, "the dog was red .", (Answer("red", 12),))
    found = passages([question], words, MAX, STRIDE, QUESTION)
    length = len(found.inputs[0]["input_ids"])
    assert length <= QUESTION + 8 + 3 and found.targets[0, 0] > 0


def test_an_answer_across_the_border_is_whole_in_no_short_window():
    text = "red blue green black white the dog is in the house and the cat is near it"
    question = Question("what ?", text, (Answer("white the dog is in", text.index("white")),))
    found = passages([question], bert_tokenizer(), 12, 1, 2)
    assert (found.targets == 0).all()


@given(st.data())
def test_best_span_beside_every_span(data):
    length = data.draw(st.integers(1, 9))
    first = data.draw(st.integers(0, length - 1))
    count = data.draw(st.integers(1, length - first))
    most = data.draw(st.integers(1, 10))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    logits = torch.randn(2, length, generator=generator)
    allowed = torch.zeros(length, dtype=torch.bool)
    allowed[first : first + count] = True
    every = [
        (float(logits[0, i] + logits[1, j]), i, j)
        for i in range(first, first + count)
        for j in range(i, min(i + most, first + count))
    ]
    score, start, end = best_span(logits, allowed, most)
    assert (start, end) == max(every)[1:]
    assert score == pytest.approx(max(every)[0])


def test_the_best_window_of_each_question_is_taken(dataset):
    """Logits that point at the first answer, less so where a window does not hold it; padding points elsewhere."""
    source = dataset.source
    logits = torch.full((len(dataset), 2, MAX + 3), -3.0)
    logits[:, :, -3:] = 99.0  # padding
    for i, (start, end) in enumerate(dataset.targets.tolist()):
        high = 5.0 if start else 50.0  # on [CLS], which is no part of a context
        logits[i, 0, start], logits[i, 1, end] = high, high
    found = predicted_texts(logits, source, 10)
    assert [text.strip() for text in found] == [question.answers[0].text for question in source.questions]
