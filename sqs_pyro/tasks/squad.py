"""SQuAD 1.1 (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250): its rows, exact match and F1."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqs_pyro.data.rows import cell, text_cell
from sqs_pyro.documents import parse_json, shown
from sqs_pyro.errors import DataError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Answer:
    """A span of a context: ``context[start : end]`` is the text."""

    text: str
    start: int

    @property
    def end(self) -> int:
        """Behind the last character."""
        return self.start + len(self.text)


@dataclass(frozen=True)
class Question:
    """A question, where its answer stands, and every answer that counts as right, the first to learn from."""

    text: str
    context: str
    answers: tuple[Answer, ...]


def normalised(answer: str) -> str:
    """Bring to lower case, without punctuation, articles and extra space, as the official script does."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(predicted: str, answers: Sequence[str]) -> float:
    """Return 1 if an answer, normalised, is the predicted one, else 0."""
    return float(any(normalised(predicted) == normalised(answer) for answer in answers))


def f1(predicted: str, answers: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of words, repetitions counted; of the best answer."""
    return max(_word_f1(normalised(predicted).split(), normalised(answer).split()) for answer in answers)


def _word_f1(predicted: Sequence[str], answer: Sequence[str]) -> float:
    # 2 P R / (P + R) with P = same / predicted, R = same / answer.
    same = sum((Counter(predicted) & Counter(answer)).values())
    return 2 * same / (len(predicted) + len(answer)) if same else 0.0


def questions(rows: Iterable[Any], what: str, columns: tuple[str, str, str]) -> list[Question]:
    """Make questions from rows, or from the articles of the official JSON files.

    Args:
        rows: mappings; answers are ``{"text": [...], "answer_start": [...]}``, a list of ``{"text": ...,
            "answer_start": ...}``, or either of them as JSON in a text. Without starts an answer stands where
            it is found first.
        what: name of their source, for messages.
        columns: of question, context and answers.

    Raises:
        DataError: a column is missing, or an answer is no answer, or not in its context.
    """
    found = []
    for number, row in enumerate(_without_articles(rows), 1):
        question, context = (text_cell(row, column, number, what) for column in columns[:2])
        answers = _answers(cell(row, columns[2], number, what), number, what)
        found.append(Question(question, context, tuple(_checked(a, context, number, what) for a in answers)))
    return found


def _without_articles(rows: Iterable[Any]) -> Iterable[Any]:
    """Return the questions of the official files' articles as rows; rows as they are."""
    for row in rows:
        if isinstance(row, Mapping) and "paragraphs" in row:
            for paragraph in row["paragraphs"]:
                yield from ({**asked, "context": paragraph["context"]} for asked in paragraph["qas"])
        else:
            yield row


def _answers(value: Any, number: int, what: str) -> list[tuple[str, int | None]]:
    """Return texts and starts, None where a start is not given."""
    try:
        given = parse_json(value, DataError, what, "") if isinstance(value, str) else value
        if isinstance(given, Mapping):
            # The hub's form, two lists side by side; strict: of unequal length they are damaged.
            starts = given.get("answer_start") or [None] * len(given["text"])
            given = [{"text": t, "answer_start": s} for t, s in zip(given["text"], starts, strict=True)]
        found = [(str(each["text"]), _start(each.get("answer_start"))) for each in given]
    except (ValueError, TypeError, KeyError, AttributeError):
        found = []
    if not found or not all(text.strip() for text, _ in found):
        raise DataError(
            f"{what} has {shown(value)} as answers of row {number}: give "
            '{"text": [...], "answer_start": [...]} with '
            "at least one answer (SQuAD 1.1 has no question without)."
        )
    return found


def _start(value: Any) -> int | None:
    return None if value is None else int(value)


def _checked(given: tuple[str, int | None], context: str, number: int, what: str) -> Answer:
    text, start = given
    answer = Answer(text, context.find(text) if start is None else start)
    if answer.start < 0 or context[answer.start : answer.end] != text:
        where = "nowhere" if start is None else f"not at character {start}"
        raise DataError(
            f"{what} has the answer {text!r} in row {number}, which stands {where} in its context: correct the "
            "row; starts count characters of the context from 0."
        )
    return answer


def figures(predicted: Sequence[str], asked: Sequence[Question]) -> dict[str, float]:
    """Return the mean ``f1`` and ``exact_match`` over questions, from 0 to 1."""
    pairs = [(p, [answer.text for answer in q.answers]) for p, q in zip(predicted, asked, strict=True)]
    return {
        "f1": sum(f1(*pair) for pair in pairs) / len(pairs),
        "exact_match": sum(exact_match(*pair) for pair in pairs) / len(pairs),
    }
