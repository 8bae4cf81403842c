"""The whole recipe of a run on a task: which network, on which text, how it is fine-tuned and compressed."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from sqs_pyro.compression.baseline import BaselineRecipe
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.compression.finetune.search import SearchRecipe, check_searchable
from sqs_pyro.integrations.pretrained_recipe import PretrainedRecipe
from sqs_pyro.recipes import RecipeSection
from sqs_pyro.runs.recipe import BoundsRecipe, WholeRecipe, with_bounds
from sqs_pyro.tasks.classification import ClassificationData, TextClassification
from sqs_pyro.tasks.embedding import SentenceData, SentenceEmbedding
from sqs_pyro.tasks.parts import TextData
from sqs_pyro.tasks.question_answering import QuestionAnswering, QuestionData
from sqs_pyro.tasks.task import Task


class FineTuning(RecipeSection):
    """How the fp32 network is fine-tuned first (AdamW): then its checkpoint needs no head for the task.

    Attributes:
        epochs: passes over the training data.
        learning_rate: the highest; `lr` is its older name.
        weight_decay: of tensors with two or more dimensions; norms and biases have none.
        warmup: epochs (or a fraction of one) over which the learning rate rises.
        precision: of the multiplications in training.
        patience: epochs without improvement on the validation data after which training stops; the weights of the
            best epoch are kept, also where it does not stop. None trains to the end and keeps the last.
    """

    older_names: ClassVar[Mapping[str, str]] = {"lr": "learning_rate"}
    later_keys: ClassVar[frozenset[str]] = frozenset({"patience"})

    epochs: int = Field(default=3, ge=1)
    learning_rate: float = Field(default=2e-5, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.1, ge=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    patience: int | None = Field(default=None, ge=1)

    def as_baseline(self, seed: int) -> BaselineRecipe:
        """Return this as the section of a baseline."""
        # Transformers have no convolutions whose memory layout would matter.
        return BaselineRecipe(optimizer="adamw", channels_last=False, seed=seed, **self.model_dump())


class TaskRecipe(WholeRecipe):
    """A run of `sqs compress` on a task.

    Attributes:
        seed: of everything random: a new head, order of the data, compression.
        task: `classification`, `question_answering` or `embedding`. This key tells a task's recipe from others.
        network: which network.
        data: which text, and how it is cut into minibatches.
        parts: of the network that are compressed: `blocks` (the linear layers of all blocks), `embedding`,
            `pooler`, `classifier`. `compression.include` takes their place.
        baseline: how it is fine-tuned first; None takes it as the checkpoint has it.
        compression: how it is compressed.
        search: for the smallest file that loses at most so much, in place of a size that `compression` says.
        bounds: how `bounds.json` and its picture are measured; `true` takes the defaults, `false` leaves them out.
    """

    task: str
    network: PretrainedRecipe
    data: TextData
    parts: tuple[str, ...] = Field(default=("blocks",), min_length=1)
    baseline: FineTuning | None = None
    compression: CompressionRecipe = Field(default_factory=CompressionRecipe)
    search: SearchRecipe | None = None
    bounds: BoundsRecipe | None = None

    def build(self) -> Task:
        """Return the task, with its examples read."""
        raise NotImplementedError(f"{type(self).__name__} is no kind of its own: use one of its subclasses.")

    def no_classes(self) -> str:
        """Return why there is nothing to distil; empty where there is."""
        return ""

    @model_validator(mode="before")
    @classmethod
    def _bounds_are_a_section(cls, values: Any) -> Any:
        return with_bounds(values)

    @model_validator(mode="after")
    def _a_search_decides_the_size(self) -> "TaskRecipe":
        check_searchable(self.search, self.compression)
        return self

    @model_validator(mode="after")
    def _distillation_is_for_classes(self) -> "TaskRecipe":
        if self.compression.distillation is not None and (why := self.no_classes()):
            raise ValueError(f"no compression.distillation, which is for classes: {why}")
        return self


class ClassificationRecipe(TaskRecipe):
    """A run of `sqs compress` on classes, or numbers, of texts.

    Attributes:
        task: of this kind.
        data: which texts and labels.
    """

    task: Literal["classification"]
    data: ClassificationData

    def build(self) -> TextClassification:
        """Return the task, with its examples read."""
        return TextClassification(self.data)

    def no_classes(self) -> str:
        """Return why, if numbers are to be predicted."""
        return "this task's labels are numbers" if self.data.metric in ("pearson", "spearman") else ""


class QuestionRecipe(TaskRecipe):
    """A run of `sqs compress` on extractive question answering.

    Attributes:
        task: of this kind.
        data: which questions.
    """

    task: Literal["question_answering"]
    data: QuestionData = Field(default_factory=QuestionData)

    def build(self) -> QuestionAnswering:
        """Return the task, with its examples read."""
        return QuestionAnswering(self.data)

    def no_classes(self) -> str:
        """Return why: there are never any."""
        return "answers are positions in a text"


class EmbeddingRecipe(TaskRecipe):
    """A run of `sqs compress` on sentence embedding; the fp32 network is the teacher.

    Attributes:
        task: of this kind.
        data: which sentences.
    """

    task: Literal["embedding"]
    data: SentenceData = Field(default_factory=SentenceData)

    def build(self) -> SentenceEmbedding:
        """Return the task, with its examples read."""
        return SentenceEmbedding(self.data)

    def no_classes(self) -> str:
        """Return why: there are never any."""
        return "the fp32 network's embedding is what is observed anyway"

    @model_validator(mode="after")
    def _the_fp32_network_is_the_teacher(self) -> "EmbeddingRecipe":
        if self.baseline is not None:  # with what it says itself as its targets it would learn nothing
            raise ValueError("no baseline: the network of the checkpoint is the teacher")
        return self


TASK_RECIPES: dict[str, type[TaskRecipe]] = {
    "classification": ClassificationRecipe,
    "question_answering": QuestionRecipe,
    "embedding": EmbeddingRecipe,
}
