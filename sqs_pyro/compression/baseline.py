"""Training of the uncompressed network that everything else is measured against."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from sqs_pyro.compression.checkpoint import check_same, read_checkpoint, write_checkpoint
from sqs_pyro.compression.patience import Kept, best_of, is_over
from sqs_pyro.compression.precision import training_autocast, training_dtype, warn_of_slow_precision
from sqs_pyro.errors import DataError, DivergenceError, RecipeError
from sqs_pyro.evaluation.classification import evaluate
from sqs_pyro.evaluation.first_minibatch import try_loader
from sqs_pyro.evaluation.input_checks import check_labels, check_minibatch
from sqs_pyro.evaluation.judging import Judge, judged
from sqs_pyro.fingerprint import Fingerprint, described, fingerprint, loader_fingerprint, network_fingerprint
from sqs_pyro.isolation import isolated
from sqs_pyro.models.likelihoods import Categorical, categorical
from sqs_pyro.networks.calling import device_of, move_to, predictions
from sqs_pyro.networks.checks import check_network
from sqs_pyro.networks.loaders import Loader, check_repeatable, undisturbed
from sqs_pyro.networks.minibatches import minibatches
from sqs_pyro.recipes import MAX_SEED, RecipeSection
from sqs_pyro.resources import enough_resources
from sqs_pyro.shipping.shipped import copied

_STATE_KEYS = frozenset({"fingerprint", "network", "optimizer", "history", "loader_epoch", "rng", "cuda_rng"})
_LOSS_CHECK_STEPS = 25  # a look at the loss waits for the device; this often is cheap and early enough


class BaselineRecipe(RecipeSection):
    """Gradient descent with linear warm-up and cosine decay to 0.

    Attributes:
        epochs: passes over the training data.
        learning_rate: the highest; `lr` is its older name.
        optimizer: `sgd`, with Nesterov momentum, or `adamw`, which transformers need.
        momentum: of the gradients of `sgd`.
        weight_decay: of tensors with two or more dimensions; norms and biases have none.
        warmup: epochs (or a fraction of one) over which the learning rate rises.
        label_smoothing: share of the target spread over all classes.
        precision: of the multiplications in training; weights and evaluation are always float32.
        channels_last: memory layout of images and convolutions while training; the faster one on CPUs.
        seed: of dropout and other noise within the network.
        patience: epochs without improvement on the validation data after which training stops; the weights of the
            best epoch are kept, also where it does not stop. None trains to the end and keeps the last.
    """

    older_names: ClassVar[Mapping[str, str]] = {"lr": "learning_rate"}
    later_keys: ClassVar[frozenset[str]] = frozenset({"patience"})

    epochs: int = Field(default=30, ge=1)
    learning_rate: float = Field(default=0.1, gt=0)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = Field(default=0.9, gt=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    warmup: float = Field(default=1.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = True
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    patience: int | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: mean training loss and accuracy while it ran, validation after it, seconds for both.

    Of what is no classification, ``accuracy`` and ``validation_loss`` are None. ``validation_score`` is what
    the judge gave, by default the accuracy.
    """

    epoch: int  # from 1
    loss: float
    accuracy: float | None  # 0..1, on augmented minibatches
    validation_loss: float | None
    validation_score: float | None
    seconds: float

    @property
    def validation_accuracy(self) -> float | None:
        """The older name of ``validation_score``."""
        return self.validation_score


@enough_resources("Training", "lower the batch size, or raise the limit")
def train_baseline(
    net: nn.Module,
    train: Loader,
    validation: Loader | None,
    recipe: BaselineRecipe,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    judge: Judge | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[EpochRecord], None] | None = None,
) -> list[EpochRecord]:
    """Train `net` in place, on the device where it is.

    Args:
        net: classifier, minibatch to logits; with `loss` and `judge`, anything.
        train: training minibatches; labels as :class:`~sqs_pyro.models.likelihoods.Categorical` reads them.
        validation: minibatches to evaluate on after each epoch, or None.
        recipe: how to train.
        loss: (predictions, targets) -> mean over the minibatch; by default a classifier's cross-entropy.
        judge: of the network on the validation data; by default a classifier's loss and accuracy.
        checkpoint: file to write after each epoch and, if it is there already, to go on from. Interrupted and
            resumed training ends with the same weights, bit for bit, as training in one go. A finished
            checkpoint only loads its weights.
        progress: called with each epoch's record.

    Returns:
        The records of all epochs, those before the resumption included.

    Raises:
        DivergenceError: the loss or a weight is not finite; the last good checkpoint stays.
        RecipeError: the checkpoint was made with another recipe; there is patience, but no validation data.
        NetworkError: the checkpoint is damaged, or made of another network or other first weights; the network or
            the judge fails on the first minibatch.
        OutputError: the checkpoint cannot be written.
        DataError: there are no minibatches to train on, labels do not fit the network's classes, or the
            checkpoint was made with other data.
    """
    check_network(net)
    if len(train) == 0:
        raise DataError("There is no minibatch to train on: lower `batch_size` or add examples.")
    if recipe.patience is not None and validation is None:
        raise RecipeError("Recipe key 'baseline.patience' needs validation data: give it, or remove the key.")
    with isolated(net, seed=recipe.seed):
        try:
            if recipe.channels_last:
                _lay_out(net, torch.channels_last)
            kept = None if checkpoint is None else Path(checkpoint)
            return _Training(net, train, validation, recipe, loss, judge).run(kept, progress)
        finally:
            if recipe.channels_last:  # the caller's network has the layout that others expect again
                _lay_out(net, torch.contiguous_format)


def kept_epoch(history: Sequence[EpochRecord], recipe: BaselineRecipe) -> Kept | None:
    """Return which epoch's weights a finished training has kept; None: the last one's, without patience."""
    if recipe.patience is None:
        return None
    return Kept(best_of(_scores(history)) + 1, len(history), recipe.epochs)


def _scores(history: Sequence[EpochRecord]) -> list[float]:
    return [record.validation_score for record in history if record.validation_score is not None]


def learning_rate(step: float, total: float, warmup: float, highest: float) -> float:
    """Return the learning rate of `step` (from 0) out of `total`: linear in `warmup` steps, then half a cosine."""
    if step < warmup:  # not 0 at the first step, and the highest not before the warm-up is over
        return highest * (step + 1) / (math.floor(warmup) + 1)
    return highest * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


class _Training:
    """The state of a training run: network, optimiser, data order, records."""

    def __init__(
        self,
        net: nn.Module,
        train: Loader,
        validation: Loader | None,
        recipe: BaselineRecipe,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        judge: Judge | None = None,
    ) -> None:
        self.net, self.train, self.validation, self.recipe = net, train, validation, recipe
        self.loss, self.judge = loss, judge
        self.labels: Categorical = categorical  # until the first minibatch settles which axis has the classes
        self.device = device_of(net)
        self.optimizer = _optimizer(net, recipe)
        self._fingerprint: Fingerprint = {}
        self.history: list[EpochRecord] = []
        self.best: dict[str, Tensor] | None = None  # with patience: state of the network after its best epoch

    def run(self, checkpoint: Path | None, progress: Callable[[EpochRecord], None] | None) -> list[EpochRecord]:
        warn_of_slow_precision(self.recipe.precision, self.device)
        if checkpoint is not None:
            self._fingerprint = self._of_this_call()  # before weights are restored: of what is given
        if checkpoint is not None and checkpoint.exists():
            self._restore(read_checkpoint(checkpoint, _STATE_KEYS), checkpoint)
        else:
            self._try_validation()
        for epoch in range(len(self.history), self.recipe.epochs):  # none if the checkpoint is a finished one
            if is_over(_scores(self.history), self.recipe.patience):
                break
            record = self._epoch(epoch)
            self.history.append(record)
            if self.recipe.patience is not None and best_of(_scores(self.history)) == epoch:
                self.best = {name: t.detach().clone() for name, t in self.net.state_dict().items()}
            if checkpoint is not None:
                write_checkpoint(checkpoint, self._state())
            if progress is not None:
                progress(record)
        if self.best is not None:
            self.net.load_state_dict(self.best)
        return self.history

    def _try_validation(self) -> None:
        """Try labels and judge, before anything is trained."""
        if self.validation is None:
            return
        check_repeatable(self.validation, "validation")
        if self.judge is None:
            try_loader(self.net, self.validation, self.labels, "validation")
            return
        with undisturbed(self.validation):
            judged(self.judge, copied(self.net).eval(), self.validation)

    def _try(self, x: Any, y: Tensor) -> None:
        """Try the first minibatch, before the network is trained on it."""
        if self.loss is None:
            dtype = training_dtype(self.recipe.precision)
            self.labels = check_minibatch(  # type: ignore[assignment]
                self.net, self.labels, x, y.to(self.device), dtype=dtype
            )

    def _epoch(self, epoch: int) -> EpochRecord:
        start = time.perf_counter()
        steps = len(self.train)
        self.net.train()
        # Sums stay on the device: reading one at each step would wait for it.
        losses: list[Tensor] = []
        correct = torch.zeros((), device=self.device)
        count = torch.zeros((), device=self.device)
        for i, (x, y) in enumerate(minibatches(self.train, self.net, "training")):
            step = epoch * steps + i
            x = move_to(x, self.device)
            if step == 0:
                self._try(x, y)
            loss, hits, labelled = self._step(x, y, step)
            losses.append(loss)
            correct += hits
            count += labelled
            if len(losses) % _LOSS_CHECK_STEPS == 0 or i + 1 == steps:
                self._check_losses(losses, epoch * steps)
        self._check_weights(epoch)  # before the epoch is kept: the last checkpoint stays a good one
        validation_loss, validation_score = self._validation()
        return EpochRecord(
            epoch=epoch + 1,
            loss=float(torch.stack(losses).mean()),
            accuracy=float(correct / count) if self.loss is None else None,
            validation_loss=validation_loss,
            validation_score=validation_score,
            seconds=time.perf_counter() - start,
        )

    def _validation(self) -> tuple[float | None, float | None]:
        if self.validation is None:
            return None, None
        if self.judge is not None:
            return None, judged(self.judge, self.net, self.validation)
        held_out = evaluate(self.net, self.validation, self.labels)
        return held_out.nll, held_out.accuracy

    def _step(self, x: Any, y: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        steps = len(self.train)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(step, steps)
        if self.recipe.channels_last and isinstance(x, Tensor) and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with training_autocast(self.recipe.precision, self.device):
            logits = predictions(self.net, x).float()  # the loss in float32, whatever the precision
        loss, hits, labelled = self._loss(logits, y, step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), hits, labelled

    def _loss(self, logits: Tensor, y: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean loss, how many classes are right, and of how many labels."""
        if self.loss is not None:
            nothing = torch.zeros((), device=self.device)
            return self.loss(logits, y.to(self.device)), nothing, nothing
        ignored = self.labels.ignore_index
        if not y.is_floating_point() and y.shape != logits.shape:
            # Before they move: no wait for the device.
            check_labels(y[y != ignored], logits.shape[self.labels.axis(logits, y)], f"Labels at step {step + 1}")
        rows, y = self.labels.rows(logits, y.to(self.device))
        # Rows [N, C] and classes [N], or probabilities [N, C].
        rows, y = rows.flatten(0, -2), y.flatten() if not y.is_floating_point() else y.flatten(0, -2)
        loss = F.cross_entropy(rows, y, ignore_index=ignored, label_smoothing=self.recipe.label_smoothing)
        predicted, wanted = rows.detach().argmax(dim=1), y.argmax(1) if y.dim() == 2 else y
        return loss, (predicted == wanted).sum(), (wanted != ignored).sum()

    def _learning_rate(self, step: int, steps: int) -> float:
        total = self.recipe.epochs * steps
        warmup = min(self.recipe.warmup * steps, total / 2)  # a short training must come down again
        return learning_rate(step, total, warmup, self.recipe.learning_rate)

    def _check_losses(self, losses: list[Tensor], first_step: int) -> None:
        finite = torch.isfinite(torch.stack(losses[-_LOSS_CHECK_STEPS:]))
        if not finite.all():
            i = int((~finite).nonzero()[0]) + max(0, len(losses) - _LOSS_CHECK_STEPS)
            raise DivergenceError(
                f"The training loss is {float(losses[i])} at step {first_step + i + 1} (epoch "
                f"{first_step // len(self.train) + 1}) with learning_rate={self.recipe.learning_rate}: lower it, "
                f"lengthen `warmup`, or look for values that are not finite in the training data."
            )

    def _check_weights(self, epoch: int) -> None:
        for name, parameter in self.net.named_parameters():
            if not torch.isfinite(parameter).all():
                raise DivergenceError(
                    f"Weights of '{name}' are not finite after epoch {epoch + 1} with learning_rate="
                    f"{self.recipe.learning_rate}: lower it, or lengthen `warmup`."
                )

    def _state(self) -> dict[str, Any]:
        best = {} if self.best is None else {"best": _contiguous(self.best)}
        return {
            "fingerprint": self._fingerprint,
            "network": _contiguous(self.net.state_dict()),
            **best,
            "optimizer": self.optimizer.state_dict(),
            "history": [asdict(record) for record in self.history],
            "loader_epoch": getattr(self.train, "epoch", None),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def _of_this_call(self) -> Fingerprint:
        """Return what this call is made of, before it has trained anything."""
        return fingerprint(
            self.recipe.model_dump(mode="json"),
            network_fingerprint(self.net),
            loader_fingerprint(self.train),
            {"loss": described(self.loss)},
        )

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        check_same(state["fingerprint"], self._fingerprint, path)
        self.net.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = [EpochRecord(**_renamed(record)) for record in state["history"]]
        self.best = state.get("best")
        if state["loader_epoch"] is not None and hasattr(self.train, "epoch"):
            self.train.epoch = state["loader_epoch"]
        torch.set_rng_state(state["rng"])  # last: nothing may draw between here and the next epoch
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)


def _lay_out(net: nn.Module, memory_format: torch.memory_format) -> None:
    """Store the convolutions' weights in another order; their values stay, and so does every reference."""
    for parameter in net.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


def _optimizer(net: nn.Module, recipe: BaselineRecipe) -> torch.optim.Optimizer:
    parameters = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate)
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=True)


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state to be kept: whoever reads it need not know that training had another memory layout."""
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _renamed(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record that was kept before its score was called so."""
    return {"validation_score" if key == "validation_accuracy" else key: value for key, value in record.items()}
