"""Loggers by name, as a recipe asks for them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from sqs_pyro.loggers.csv_files import CSVFiles
from sqs_pyro.loggers.logger import Logger
from sqs_pyro.loggers.mlflow_run import MLflow
from sqs_pyro.loggers.tensorboard import TensorBoard
from sqs_pyro.loggers.wandb_run import WandB
from sqs_pyro.recipes import RecipeSection

_ONLY = {"project": ("mlflow", "wandb"), "mode": ("wandb",), "uri": ("mlflow",)}  # keys that not all loggers have
_DEFAULT_PROJECT = "sqs-pyro"


class LoggerRecipe(RecipeSection):
    """Where a run is told to while it goes on; a name alone is one with its defaults.

    Attributes:
        name: `csv`, `tensorboard`, `mlflow` or `wandb`.
        project: of `wandb`, and the experiment of `mlflow`; None is `sqs-pyro`.
        mode: of `wandb`: `online`, or `offline` for a later `wandb sync`; None is what WANDB_MODE says, or
            `online`.
        uri: of `mlflow`, its server or database; None is what MLFLOW_TRACKING_URI says, or `mlflow.db` beside the
            run's directory.
    """

    name: Literal["csv", "tensorboard", "mlflow", "wandb"]
    project: str | None = None
    mode: Literal["online", "offline"] | None = None
    uri: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _a_name_is_enough(cls, values: Any) -> Any:
        return {"name": values} if isinstance(values, str) else values

    @model_validator(mode="after")
    def _keys_are_of_this_logger(self) -> "LoggerRecipe":
        for key, names in _ONLY.items():
            if getattr(self, key) is not None and self.name not in names:
                raise ValueError(f"without {key!r}, which {' and '.join(names)} has, beside name {self.name!r}")
        return self

    def build(self, directory: Path, place: Path) -> Logger:
        """Return the logger.

        Args:
            directory: of its own, for what belongs to one run.
            place: for what runs share.

        Raises:
            MissingPackageError: what it writes to is not installed.
        """
        project = self.project or _DEFAULT_PROJECT
        makers: Mapping[str, Callable[[], Logger]] = {
            "csv": lambda: CSVFiles(directory),
            "tensorboard": lambda: TensorBoard(directory),
            "mlflow": lambda: MLflow(directory, project, self.uri, place),
            "wandb": lambda: WandB(directory, project, self.mode, place),
        }
        return makers[self.name]()
