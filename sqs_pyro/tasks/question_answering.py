"""Extractive question answering, as SQuAD 1.1 has it: an answer is a span of the context."""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from pyro.distributions import TorchDistribution
from torch import nn

from sqs_pyro.data.rows import is_file
from sqs_pyro.data.token_loader import TokenDataset
from sqs_pyro.errors import DataError
from sqs_pyro.models.likelihoods import categorical_last
from sqs_pyro.tasks.outputs import outputs
from sqs_pyro.tasks.parts import TextData, read_parts
from sqs_pyro.tasks.passages import passages, predicted_texts
from sqs_pyro.tasks.squad import Question, figures, questions
from sqs_pyro.tasks.task import Parts

SQUAD_ON_THE_HUB = "rajpurkar/squad"
_SPECIAL = 8  # tokens around question and context, at most


class QuestionData(TextData):
    """Which questions, and how their contexts are cut into windows and minibatches.

    Attributes:
        source: a file (.json, .jsonl, .csv; SQuAD's own JSON files, too), or the name of a data set on the Hugging
            Face hub, whose split `validation` is then the `test` unless another is named.
        question: column with the question.
        context: column with the text that it is asked about.
        answers: column with `{"text": [...], "answer_start": [...]}`, in a .csv file as JSON.
        max_length: tokens of a window, question included.
        stride: tokens of the context that two neighbouring windows share.
        question_length: tokens of a question; what is longer is cut off.
        answer_length: tokens of a predicted answer, at most.
        batch_size: windows in a training minibatch.
    """

    source: str = Field(default=SQUAD_ON_THE_HUB, min_length=1)
    question: str = Field(default="question", min_length=1)
    context: str = Field(default="context", min_length=1)
    answers: str = Field(default="answers", min_length=1)
    max_length: int = Field(default=384, ge=16)
    stride: int = Field(default=128, ge=0)
    question_length: int = Field(default=64, ge=1)
    answer_length: int = Field(default=30, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _the_hub_s_validation_is_the_test(cls, values: Any) -> Any:
        if not isinstance(values, dict) or is_file(str(values.get("source") or SQUAD_ON_THE_HUB)):
            return values
        return {"test": "validation", **values}  # SQuAD's own test answers are not public

    @model_validator(mode="after")
    def _windows_move_on(self) -> "QuestionData":
        room = self.max_length - self.question_length - _SPECIAL
        if self.stride >= room:
            raise ValueError(
                f"a stride below {room}: max_length less question_length less {_SPECIAL} special tokens, so that "
                "windows move on"
            )
        return self


class QuestionAnswering:
    """Where the answer begins and ends: two categoricals over the tokens of a window.

    Args:
        data: which questions; they are read here.

    Raises:
        DataError: a file, split or column is missing, or an answer is not in its context.
    """

    name = "question_answering"
    headline = "f1"

    def __init__(self, data: QuestionData) -> None:
        columns = data.question, data.context, data.answers
        self.data = data
        self.examples: Parts[list[Question]] = read_parts(data, lambda rows, what: questions(rows, what, columns))

    @property
    def network_options(self) -> dict[str, Any]:
        """``num_labels``: two logits a token, which BERT's head takes from there."""
        return {"num_labels": 2}

    def datasets(self, tokenizer: Any) -> Parts[TokenDataset]:
        """Return a window an example, targets ``[N, 2]``; see :func:`~sqs_pyro.tasks.passages.passages`.

        Raises:
            DataError: the tokenizer does not know where in a text its tokens stand.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{type(tokenizer).__name__} does not say where in a text its tokens stand, which answers need: "
                "give a fast tokenizer (tokenizer.json)."
            )
        data = self.data

        def dataset(examples: Sequence[Question]) -> TokenDataset:
            return passages(examples, tokenizer, data.max_length, data.stride, data.question_length)

        return self.examples.each(dataset)

    def observed(self, datasets: Parts[TokenDataset], net: nn.Module) -> Parts[TokenDataset]:
        """Return them as they are: answers are given."""
        return datasets

    def likelihood(self, output: Any) -> TorchDistribution:
        """Return the distribution of starts and ends, from logits ``[B, 2, T]``."""
        return categorical_last(output)

    def measure(self, net: nn.Module, loader: Any) -> dict[str, Any]:
        """Return F1 and exact match over questions, NLL in nats a window."""
        # -inf: padding of shorter minibatches has no share of the probability.
        logits, targets = outputs(net, loader, fill=-torch.inf)  # [windows, 2, T], [windows, 2]
        source = loader.dataset.source
        nll = -self.likelihood(logits).log_prob(targets).mean()
        found = predicted_texts(logits, source, self.data.answer_length)
        counts = {"num_examples": len(source.questions), "num_windows": len(targets)}
        return figures(found, source.questions) | {"nll": float(nll)} | counts
