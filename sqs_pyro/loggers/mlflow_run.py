"""Records as the metrics of a run in MLflow."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqs_pyro.atomic import write_text
from sqs_pyro.extras import needed_for
from sqs_pyro.loggers.logger import Figures, Logger, Outcome, flat

_AT_ONCE = 100  # parameters that MLflow takes in one call
_LONGEST = 6000  # characters of a parameter that MLflow takes
_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class MLflow(Logger):
    """Writes metrics ``STAGE/FIGURE`` and ``FIGURE``, and the recipe's keys as parameters.

    Args:
        directory: where the run's ID is kept, by which it goes on after an interruption.
        experiment: that the run belongs to; made if it is not there.
        uri: of the tracking server or database; by default what ``MLFLOW_TRACKING_URI`` says, or SQLite's
            ``mlflow.db`` in ``place``.
        place: by default the directory.

    Raises:
        MissingPackageError: MLflow is not installed.
    """

    def __init__(
        self,
        directory: str | Path,
        experiment: str = "sqs-pyro",
        uri: str | None = None,
        place: str | Path | None = None,
    ) -> None:
        with needed_for("Logs in MLflow", otherwise="pip install mlflow alone"):
            from mlflow import MlflowClient, entities
        self._client_class, self._entities = MlflowClient, entities
        self._client: Any = None
        self._run: str | None = None
        self.directory, self.experiment = Path(directory), experiment
        database = (self.directory if place is None else Path(place)).resolve() / "mlflow.db"
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{database}"

    def start(self, name: str, recipe: Mapping[str, Any]) -> None:
        """Make the run, or go on with the one that was interrupted."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._client = self._client_class(tracking_uri=self.uri)
        kept = self.directory / "run_id"
        if kept.is_file():
            self._run = kept.read_text(encoding="utf-8").strip()
            self._client.update_run(self._run, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(self.experiment)
        number = found.experiment_id if found else self._client.create_experiment(self.experiment)
        self._run = self._client.create_run(number, run_name=name or None).info.run_id
        write_text(kept, f"{self._run}\n")
        said = [(key, v if isinstance(v, str) else json.dumps(v, default=str)) for key, v in flat(recipe)]
        parameters = [self._entities.Param(key, text[:_LONGEST]) for key, text in said if text]
        for i in range(0, len(parameters), _AT_ONCE):
            self._client.log_batch(self._run, params=parameters[i : i + _AT_ONCE])

    def record(self, stage: str, step: int, figures: Figures) -> None:
        """Write the figures that were measured."""
        self._write({f"{stage}/{name}": value for name, value in figures.items() if value is not None}, step)

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Write them at step 0."""
        self._write(metrics, 0)

    def close(self, outcome: Outcome) -> None:
        """Say how the run ended."""
        if self._run is not None:
            self._client.set_terminated(self._run, _STATUS[outcome])

    def _write(self, figures: Mapping[str, float], step: int) -> None:
        now = round(1000 * time.time())  # MLflow counts milliseconds
        metrics = [self._entities.Metric(name, value, now, step) for name, value in figures.items()]
        for i in range(0, len(metrics), _AT_ONCE):
            self._client.log_batch(self._run, metrics=metrics[i : i + _AT_ONCE])
