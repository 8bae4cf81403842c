"""Records as curves in TensorBoard."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqs_pyro.extras import needed_for
from sqs_pyro.loggers.logger import Figures, Logger, Outcome

_FLUSH = 10  # seconds until a curve shows a step


class TensorBoard(Logger):
    """Writes scalars ``STAGE/FIGURE`` and ``metrics/FIGURE``, and the recipe as text.

    Args:
        directory: of the events, with one for each stage in it. After an interruption the same one goes on: events
            that are told again hide those of before.

    Raises:
        MissingPackageError: TensorBoard is not installed.
    """

    def __init__(self, directory: str | Path) -> None:
        with needed_for("Logs in TensorBoard", otherwise="pip install tensorboard alone"):
            from torch.utils.tensorboard import SummaryWriter
        self.directory, self._writer = Path(directory), SummaryWriter
        self._writers: dict[str, Any] = {}

    def start(self, name: str, recipe: Mapping[str, Any]) -> None:
        """Write the recipe."""
        text = "\n".join(f"    {line}" for line in json.dumps(recipe, indent=2).splitlines())  # code, to Markdown
        self._of_stage("metrics", 0).add_text("recipe", text, 0)

    def record(self, stage: str, step: int, figures: Figures) -> None:
        """Write the figures that were measured."""
        for name, value in figures.items():
            if value is not None:
                self._of_stage(stage, step).add_scalar(f"{stage}/{name}", value, step)

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Write them, each a curve of one point."""
        for name, value in metrics.items():
            self._of_stage("metrics", 0).add_scalar(f"metrics/{name}", value, 0)

    def close(self, outcome: Outcome) -> None:
        """Write what is waiting."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _of_stage(self, stage: str, step: int) -> Any:
        if stage not in self._writers:
            where = str(self.directory / stage)
            self._writers[stage] = self._writer(where, purge_step=step, flush_secs=_FLUSH)
        return self._writers[stage]
