"""Records as the history of a run in Weights & Biases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from sqs_pyro.atomic import write_text
from sqs_pyro.extras import needed_for
from sqs_pyro.loggers.logger import Figures, Logger, Outcome

_EXIT = {"finished": 0, "interrupted": 255, "failed": 1}  # as wandb itself ends a run of a script


class WandB(Logger):
    """Writes ``STAGE/FIGURE`` over ``STAGE/step``, the summary, and the recipe as configuration.

    Args:
        directory: where the run's ID is kept, by which it goes on after an interruption.
        project: that the run belongs to.
        mode: ``"online"``, or ``"offline"``: written for a later ``wandb sync``; None: what ``WANDB_MODE`` says,
            or online.
        place: where wandb writes, into ``wandb/``; by default the directory.

    Raises:
        MissingPackageError: wandb is not installed.
    """

    def __init__(
        self,
        directory: str | Path,
        project: str = "sqs-pyro",
        mode: Literal["online", "offline"] | None = None,
        place: str | Path | None = None,
    ) -> None:
        with needed_for("Logs in Weights & Biases", otherwise="pip install wandb alone"):
            import wandb
        self._wandb = wandb
        self.directory, self.project, self.mode = Path(directory), project, mode
        self.place = self.directory if place is None else Path(place)
        self._run: Any = None
        self._stages: set[str] = set()

    def start(self, name: str, recipe: Mapping[str, Any]) -> None:
        """Make the run, or go on with the one that was interrupted."""
        kept = self.directory / "run_id"
        if not kept.is_file():
            self.directory.mkdir(parents=True, exist_ok=True)
            write_text(kept, f"{uuid4().hex[:12]}\n")
        self._run = self._wandb.init(
            project=self.project,
            name=name or None,
            id=kept.read_text(encoding="utf-8").strip(),
            resume="allow",
            mode=self.mode,
            dir=str(self.place),
            config=dict(recipe),
            settings=self._wandb.Settings(console="off"),  # stderr has our bars
        )

    def record(self, stage: str, step: int, figures: Figures) -> None:
        """Write the figures that were measured."""
        if stage not in self._stages:  # each stage counts its own steps
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        said = {f"{stage}/{name}": value for name, value in figures.items() if value is not None}
        self._run.log({f"{stage}/step": step, **said})

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Write them into the summary."""
        self._run.summary.update(dict(metrics))

    def close(self, outcome: Outcome) -> None:
        """Send or write what is waiting, and say how the run ended."""
        if self._run is not None:
            self._run.finish(exit_code=_EXIT[outcome])
