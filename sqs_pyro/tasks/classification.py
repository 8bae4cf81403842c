"""Classes, or a number, of texts and of pairs of texts: SST-2 and all of GLUE, or rows of one's own."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from sqs_pyro.data.rows import cell, is_file, text_cell
from sqs_pyro.data.splits import SPLIT_SEED, stratified_split
from sqs_pyro.data.token_loader import TokenDataset
from sqs_pyro.errors import DataError
from sqs_pyro.evaluation.classification import figures_of_classes, predict
from sqs_pyro.models.likelihoods import Gaussian, categorical
from sqs_pyro.models.observation import Likelihood
from sqs_pyro.networks.loaders import Loader
from sqs_pyro.tasks.glue import GLUE, Metric, metric
from sqs_pyro.tasks.outputs import outputs
from sqs_pyro.tasks.parts import TextData, read_parts
from sqs_pyro.tasks.task import Parts

GLUE_ON_THE_HUB = "nyu-mll/glue"


class ClassificationData(TextData):
    """Which texts with their labels, and how they are cut into minibatches.

    Attributes:
        source: a file (.json, .jsonl, .csv), or the name of a data set on the Hugging Face hub; with `glue`, by
            default GLUE on the hub.
        glue: a task of GLUE, which says what columns, labels and metrics are, of a file, too.
        columns: with the text, or with the two texts of a pair.
        label: column with the class (its number, or its name in `labels`), or with the number to predict.
        labels: names of the classes in the order of their numbers; None where labels are numbers from 0.
        metric: to compare networks by; `pearson` is for numbers to predict. None takes the task's of GLUE, or
            accuracy.
    """

    source: str = Field(default=GLUE_ON_THE_HUB, min_length=1)
    glue: Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"] | None = None
    columns: tuple[str, ...] = Field(default=("text",), min_length=1, max_length=2)
    label: str = Field(default="label", min_length=1)
    labels: tuple[str, ...] | None = Field(default=None, min_length=2)
    metric: Metric | None = None

    @model_validator(mode="before")
    @classmethod
    def _glue_says_the_rest(cls, values: Any) -> Any:
        """Return what a task of GLUE is made of, where the recipe does not say it itself."""
        task = GLUE.get(str(values.get("glue"))) if isinstance(values, dict) else None
        if task is None:
            return values
        said: dict[str, Any] = {"columns": task.columns, "labels": task.labels or None, "metric": task.metrics[0]}
        if not is_file(str(values.get("source") or GLUE_ON_THE_HUB)):  # a file has neither subsets nor splits
            said |= {"subset": values["glue"], "test": task.judged_on}
        # null in a recipe asks for the default, so it does not take the place of what GLUE says.
        return {**said, **{key: value for key, value in values.items() if value is not None}}

    @model_validator(mode="after")
    def _says_what_data(self) -> "ClassificationData":
        if self.source == GLUE_ON_THE_HUB and self.glue is None:
            raise ValueError("a section with a source, or with glue, a task of GLUE")
        return self


@dataclass(frozen=True)
class LabelledText:
    """One or two texts and their label: a class, or a number to predict."""

    texts: tuple[str, ...]
    label: float


class TextClassification:
    """Labels of texts.

    A class is a categorical given the network's logits, a number is Gaussian around its only output.

    Args:
        data: which texts; they are read here.

    Raises:
        DataError: a file, split or column is missing, a text is no text, a label is none, or there is no example.
    """

    name = "classification"

    def __init__(self, data: ClassificationData) -> None:
        self.data = data
        self.headline = data.metric or "accuracy"
        self.is_regression = self.headline in ("pearson", "spearman")
        #: Of classes, or of numbers ``[1]`` with unit noise.
        self.likelihood: Likelihood = Gaussian() if self.is_regression else categorical
        self.examples = read_parts(data, self._read, self._hold_out)
        self.num_labels = 1 if self.is_regression else self._num_classes()
        if not self.is_regression:
            self.examples.each(self._check_labels)

    @property
    def network_options(self) -> dict[str, Any]:
        """``num_labels``, of the head."""
        return {"num_labels": self.num_labels}

    def datasets(self, tokenizer: Any) -> Parts[TokenDataset]:
        """Return tokens, and targets ``[N]`` (of numbers ``[N, 1]``)."""

        def dataset(examples: Sequence[LabelledText]) -> TokenDataset:
            texts = [[example.texts[i] for example in examples] for i in range(len(examples[0].texts))]
            encoded = tokenizer(*texts, truncation=True, max_length=self.data.max_length)
            columns = {name: [torch.tensor(row) for row in rows] for name, rows in encoded.items()}
            columns.pop("attention_mask", None)  # made anew when minibatches are padded
            inputs = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            labels = torch.tensor([example.label for example in examples])
            return TokenDataset(inputs, labels[:, None] if self.is_regression else labels.long())

        return self.examples.each(dataset)

    def observed(self, datasets: Parts[TokenDataset], net: nn.Module) -> Parts[TokenDataset]:
        """Return them as they are: labels are given."""
        return datasets

    def measure(self, net: nn.Module, loader: Loader) -> dict[str, Any]:
        """Return accuracy, NLL, calibration and GLUE's metrics of classes; correlations and NLL of numbers."""
        metrics = GLUE[self.data.glue].metrics if self.data.glue else (self.headline,)
        if not self.is_regression:
            log_p, y = predict(net, loader)  # [n, C], [n]
            predicted, true = log_p.argmax(-1).cpu().numpy(), y.cpu().numpy()
            return figures_of_classes(log_p, y) | {name: metric(name, predicted, true) for name in metrics}
        found, targets = outputs(net, loader)
        predicted, true = found[:, 0].double().numpy(), targets[:, 0].double().numpy()
        correlations: tuple[Metric, ...] = ("pearson", "spearman")
        nll = -self.likelihood(found).log_prob(targets).mean()
        figures: dict[str, Any] = {name: metric(name, predicted, true) for name in correlations}
        return figures | {"nll": float(nll), "num_examples": len(targets)}

    def _read(self, rows: Iterable[Any], what: str) -> list[LabelledText]:
        found = []
        for number, row in enumerate(rows, 1):
            texts = tuple(text_cell(row, column, number, what) for column in self.data.columns)
            found.append(LabelledText(texts, self._label(cell(row, self.data.label, number, what), number, what)))
        return found

    def _label(self, value: Any, number: int, what: str) -> float:
        names = self.data.labels or ()
        if value in names:  # names first: a class may be called "1"
            return names.index(value)
        try:
            label = float(value)
            if math.isfinite(label) and (self.is_regression or label == int(label)):
                return label
        except (TypeError, ValueError):
            pass
        classes = f"a class's number or one of {', '.join(names) or '`labels`'}"
        raise DataError(
            f"{what} has {value!r} in column '{self.data.label}' of row {number}, but a label is "
            f"{'a number' if self.is_regression else classes}: correct the row, or name the classes as `labels`."
        )

    def _num_classes(self) -> int:
        # Of training data alone: a class that is only met later cannot have been learned, and is refused.
        highest = max(int(example.label) for example in self.examples.train)
        return len(self.data.labels) if self.data.labels else max(highest + 1, 2)

    def _check_labels(self, examples: Sequence[LabelledText]) -> None:
        labels = [int(example.label) for example in examples]
        if min(labels) < 0 or max(labels) >= self.num_labels:
            raise DataError(
                f"Labels in column '{self.data.label}' run from {min(labels)} to {max(labels)}, but classes are "
                f"0 to {self.num_labels - 1}: correct them, or give a split whose labels are not hidden (-1)."
            )

    def _hold_out(
        self, examples: Sequence[LabelledText], held_out: int
    ) -> tuple[list[LabelledText], list[LabelledText]]:
        """Return some of every class; of numbers some at random."""
        # Numbers as one class: a stratified split of it is a random one.
        labels = torch.tensor([0 if self.is_regression else int(example.label) for example in examples])
        kept, held = stratified_split(labels, held_out, SPLIT_SEED)
        return [examples[i] for i in kept.tolist()], [examples[i] for i in held.tolist()]
