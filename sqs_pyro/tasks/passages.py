"""Questions with long contexts as windows of tokens that overlap, and spans of tokens as texts again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sqs_pyro.data.token_loader import TokenDataset
from sqs_pyro.tasks.squad import Answer, Question

_CONTEXT = 1  # what `sequence_ids` calls the second text


@dataclass(frozen=True, eq=False)
class Window:
    """A part of a question's context.

    Attributes:
        question: its number.
        offsets: of each token, where its characters in the context begin and end, int64 ``[T, 2]``; -1 for tokens
            that are not of the context.
    """

    question: int
    offsets: Tensor

    @property
    def in_context(self) -> Tensor:
        """Which tokens are of the context, bool ``[T]``."""
        return self.offsets[:, 0] >= 0


@dataclass(frozen=True)
class Passages:
    """Questions, and the windows of all their contexts in order."""

    questions: Sequence[Question]
    windows: Sequence[Window]


def passages(
    questions: Sequence[Question], tokenizer: Any, max_length: int, stride: int, question_length: int
) -> TokenDataset:
    """Return tokens of every window, and where the first answer is in it.

    A window is ``question, part of the context``; neighbours share ``stride`` tokens. Where a window does not hold
    the whole answer, its target is the first token, BERT's ``[CLS]``. The dataset counts windows, because each is
    observed on its own; its ``source`` is :class:`Passages`.

    Args:
        questions: with their contexts.
        tokenizer: a fast one, of transformers.
        max_length: tokens of a window, question and special ones included.
        stride: tokens of the context that two neighbours share.
        question_length: tokens of a question at most; what is longer is cut off.
    """
    encoded = tokenizer(
        [_cut(question.text, tokenizer, question_length) for question in questions],
        [question.context for question in questions],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    of_question = encoded.pop("overflow_to_sample_mapping")
    offsets = encoded.pop("offset_mapping")
    windows, inputs, targets = [], [], []
    for i, number in enumerate(of_question):
        of_context = torch.tensor([part == _CONTEXT for part in encoded.sequence_ids(i)])
        # Offsets of the question count from its own beginning, those of special tokens are (0, 0): both become -1.
        window = Window(number, torch.tensor(offsets[i]).masked_fill(~of_context[:, None], -1))
        windows.append(window)
        # One to learn from; all that annotators gave count when answers are judged.
        targets.append(token_span(window, questions[number].answers[0]))
        inputs.append({name: torch.tensor(encoded[name][i]) for name in encoded if name != "attention_mask"})
    return TokenDataset(inputs, torch.tensor(targets), Passages(questions, windows))


def token_span(window: Window, answer: Answer) -> tuple[int, int]:
    """Return first and last token of an answer in a window, ``(0, 0)`` if the window does not hold all of it."""
    starts, ends = window.offsets.T
    # Tokens that touch the answer; one may reach beyond it, as words are not cut at every character.
    inside = window.in_context & (starts < answer.end) & (ends > answer.start)
    tokens = inside.nonzero().flatten()
    whole = len(tokens) and starts[tokens[0]] <= answer.start and ends[tokens[-1]] >= answer.end
    return (int(tokens[0]), int(tokens[-1])) if whole else (0, 0)


def best_span(logits: Tensor, in_context: Tensor, max_tokens: int) -> tuple[float, int, int]:
    """Return the span of the context with the largest sum of both logits.

    Args:
        logits: of starts and ends, ``[2, T]``.
        in_context: which tokens may be in a span, bool ``[T]``, a run of them.
        max_tokens: of a span.

    Returns:
        Sum of its logits, first and last token.
    """
    places = in_context.nonzero().flatten()
    first, count = int(places[0]), len(places)
    starts, ends = logits[:, first : first + count]
    sums = starts[:, None] + ends[None, :]  # [count, count]
    # The end is not before the start, and at most max_tokens - 1 behind it.
    allowed = torch.ones(count, count, dtype=torch.bool).triu().tril(max_tokens - 1)
    best = int(sums.masked_fill(~allowed, -torch.inf).argmax())
    start, end = divmod(best, count)
    return float(sums[start, end]), first + start, first + end


def predicted_texts(logits: Tensor, found: Passages, max_tokens: int) -> list[str]:
    """Return the text of each question's best span in all windows of its context.

    Args:
        logits: of starts and ends, ``[windows, 2, T]``, on the CPU.
        found: questions and windows.
        max_tokens: of an answer.
    """
    best: list[tuple[float, str]] = [(-torch.inf, "")] * len(found.questions)
    for window, each in zip(found.windows, logits, strict=True):
        if not window.in_context.any():  # an empty context
            continue
        length = len(window.offsets)
        # Logits are padded to the longest window of all.
        score, start, end = best_span(each[:, :length], window.in_context, max_tokens)
        context = found.questions[window.question].context
        text = context[int(window.offsets[start, 0]) : int(window.offsets[end, 1])]
        # Sums of logits, not probabilities: each window's would be normalised over that window alone.
        best[window.question] = max(best[window.question], (score, text), key=lambda pair: pair[0])
    return [text for _, text in best]


def _cut(text: str, tokenizer: Any, length: int) -> str:
    """Return the beginning of a text, of at most some tokens."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(offsets) <= length else text[: offsets[length - 1][1]]
