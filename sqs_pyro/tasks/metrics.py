"""A metric by name, torchmetrics' or a user's: told beside a task's own figures, and by it networks are chosen."""

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.data import Data, DataRecipe
from sqs_pyro.documents import shown
from sqs_pyro.errors import NetworkError, RecipeError, SQSError, said
from sqs_pyro.evaluation.classification import predict
from sqs_pyro.extras import needed_for
from sqs_pyro.models.observation import Likelihood
from sqs_pyro.networks.loaders import Loader
from sqs_pyro.own_code import is_own, own_function
from sqs_pyro.tasks.objectives import Loss, Objective, objective
from sqs_pyro.tasks.outputs import outputs

LIBRARY = "torchmetrics"
_PLACES = (LIBRARY, f"{LIBRARY}.classification", f"{LIBRARY}.regression")
_KINDS = {"classification": "multiclass", "segmentation": "multiclass", "multilabel": "multilabel"}


def data_objective(recipe: DataRecipe, data: Data) -> Objective:
    """Return what is learned from the data that a recipe names, judged by the recipe's metric if it has one.

    Raises:
        RecipeError: there is no such metric, or it does not take its options.
        MissingPackageError: torchmetrics is not installed.
    """
    task = objective(data, recipe.ignore_index)
    return task if recipe.metric is None else Measured(task, recipe, data)


class Measured:
    """A task with a metric beside its own figures; the metric is the one by which networks are compared.

    A function takes what the network says, ``[N, ...]``, and labels, and returns a number. A metric of
    torchmetrics, or of its kind, takes probabilities of classes ``[n, C]`` and classes ``[n]``, those that count
    for nothing left out; probabilities of several labels ``[N, L]``; or numbers in their units, as functions do.

    Args:
        task: without the metric.
        recipe: names the metric.
        data: for what the metric has to know: how many classes, what numbers were divided by.
    """

    def __init__(self, task: Objective, recipe: DataRecipe, data: Data) -> None:
        assert recipe.metric is not None
        self.task, self.data, self.headline = task, data, recipe.metric
        found = _found(recipe.metric)
        self._function: Callable[..., Any] | None = None
        if _is_metric(found):
            self._metric = _made(found, recipe, data)
        else:
            self._function, self._options = found, recipe.metric_options
        told = getattr(found, "higher_is_better", None) if self._function else self._metric.higher_is_better
        #: Whether networks are better with more of it; so it is where nothing is said.
        self.higher_is_better = told is not False

    @property
    def likelihood(self) -> Likelihood:
        """The task's."""
        return self.task.likelihood

    @property
    def loss(self) -> Loss | None:
        """The task's."""
        return self.task.loss

    def check(self, output: Tensor, data: Data) -> None:
        """Check a network's output as the task does."""
        self.task.check(output, data)

    def measure(self, net: nn.Module, loader: Loader) -> dict[str, Any]:
        """Return the metric, under its name, and the task's figures."""
        own = {"name": self.headline, "higher_is_better": self.higher_is_better}
        return {self.headline: self.value(net, loader), "metric": own, **self.task.measure(net, loader)}

    def score(self, net: nn.Module, loader: Loader) -> float:
        """Return the metric as networks are compared by it, the more the better.

        Raises:
            NetworkError: it is above one, and so no share of anything.
        """
        value = self.value(net, loader)
        if self.higher_is_better and value > 1 + 1e-6:
            raise NetworkError(
                f"Metric {self.headline!r} is {value:g}, but networks are chosen by a number of at most 1, the "
                "more the better: divide it, or where less is better give it an attribute higher_is_better, False."
            )
        return value if self.higher_is_better else -value

    @torch.no_grad()
    def value(self, net: nn.Module, loader: Loader) -> float:
        """Return what the metric says of a network on a loader.

        Raises:
            NetworkError: it fails, or does not give one finite number.
        """
        given = self._outputs(net, loader) if self._function else self._probabilities(net, loader)
        try:
            found: Any = self._function(*given, **self._options) if self._function else self._computed(*given)
        except SQSError:
            raise
        except Exception as error:  # of the user's metric
            raise NetworkError(
                f"Metric {self.headline!r} fails on outputs ({shown(given[0])}) and labels ({shown(given[1])}) "
                f"with {said(error)}: correct it, or its metric_options."
            ) from error
        try:
            value = float(found)
        except (TypeError, ValueError, RuntimeError):
            value = math.nan
        if not math.isfinite(value):
            raise NetworkError(
                f"Metric {self.headline!r} gives {shown(found)}, but should give one finite number: correct it, "
                "or its metric_options (average: macro, say)."
            )
        return value

    def _outputs(self, net: nn.Module, loader: Loader) -> tuple[Tensor, Tensor]:
        found, y = outputs(net, loader)
        if self.data.task != "regression":
            return found, y
        shape = () if self.data.num_classes == 1 else (-1,)  # one number an example is [N], several are [N, T]
        return self._in_units(found).reshape(len(y), *shape), self._in_units(y).reshape(len(y), *shape)

    def _in_units(self, numbers: Tensor) -> Tensor:
        about = self.data.about
        mean, std = (
            torch.tensor(about.get(key, other)) for key, other in (("target_mean", 0.0), ("target_std", 1.0))
        )
        return numbers.reshape(len(numbers), -1).double() * std + mean  # [N, T]

    def _probabilities(self, net: nn.Module, loader: Loader) -> tuple[Tensor, Tensor]:
        if self.data.task == "regression":
            return self._outputs(net, loader)
        if self.data.task == "multilabel":
            found, labels = outputs(net, loader)
            return found.sigmoid(), labels.long()
        log_p, labels = predict(net, loader, self.task.likelihood)
        return log_p.exp().cpu(), (labels.argmax(-1) if labels.dim() == 2 else labels).cpu()

    def _computed(self, found: Tensor, labels: Tensor) -> Any:
        self._metric.reset()
        self._metric.update(found, labels)
        return self._metric.compute()


def _is_metric(found: Any) -> bool:
    """Whether it is a metric of torchmetrics' kind, or the class of one, and no function."""
    return all(callable(getattr(found, name, None)) for name in ("update", "compute", "reset"))


def _found(name: str) -> Any:
    if is_own(name):
        return own_function(name, "Metric")
    short = name.removeprefix(f"{LIBRARY}/")
    with needed_for("Metrics by name"):
        modules = [importlib.import_module(place) for place in _PLACES]  # heavy
    for module in modules:
        if _is_metric(getattr(module, short, None)):
            return getattr(module, short)
    known = sorted({key for module in modules for key, value in vars(module).items() if _is_metric(value)})
    close = difflib.get_close_matches(short[:80], known, n=3)
    hint = (
        f"did you mean {' or '.join(map(repr, close))}?"
        if close
        else "give one of its classes or module:function."
    )
    raise RecipeError(f"Recipe key 'data.metric' is {shown(name, 80)}, which torchmetrics has not: {hint}")


def _made(found: Any, recipe: DataRecipe, data: Data) -> Any:
    """Return a metric that begins with nothing, of a class with what it has to know of the data."""
    if not isinstance(found, type):
        return found
    known: Mapping[str, Any] = {
        "task": _KINDS.get(data.task),
        "num_classes": data.num_classes,
        "num_labels": data.num_classes,
    }
    taken = inspect.signature(found).parameters
    fitting = {key: known[key] for key in known if key in taken} if data.task != "regression" else {}
    options = {**fitting, **recipe.metric_options}
    try:
        return found(**options)
    except Exception as error:
        raise RecipeError(
            f"Metric {recipe.metric!r} cannot be made with the options {shown(options)} ({said(error)}): correct "
            "data.metric_options."
        ) from error
