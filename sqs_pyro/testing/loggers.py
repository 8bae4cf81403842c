"""Contract kit: any logger inherits these tests; it says how it is made, and how what it was told is read."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from sqs_pyro.loggers.logger import Figures, Logger, Outcome

#: Of each step of a stage, the figures that were measured.
Told: TypeAlias = dict[int, dict[str, float]]

_FIRST: dict[int, Figures] = {
    1: {"loss": 0.5, "validation_score": None},
    2: {"loss": 0.25, "validation_score": 0.75},
    4: {"loss": 0.125, "validation_score": None},
}
_AGAIN: dict[int, Figures] = {  # of a process that was killed after step 4, and goes on from what it kept at 3
    4: {"loss": 0.0625, "validation_score": None},
    6: {"loss": 0.03125, "validation_score": 1.0},
}
_RECIPE = {"seed": 3, "compression": {"epochs": 2, "include": None, "exclude": ["a", "b"]}}


def _measured(figures: dict[int, Figures]) -> Told:
    return {step: {k: v for k, v in each.items() if v is not None} for step, each in figures.items()}


class LoggerContract(ABC):
    """Inherit it, and say how the logger is made and read."""

    @abstractmethod
    def make(self, directory: Path) -> Logger:
        """Return the logger; all it keeps is in a directory."""

    @abstractmethod
    def told(self, directory: Path, stage: str) -> Told:
        """Return what was told of a stage; of a step that was told twice, the last."""

    @abstractmethod
    def metrics(self, directory: Path) -> dict[str, float]:
        """Return what was told of the end."""

    def _tell(
        self, directory: Path, figures: dict[int, Figures], outcome: Outcome, stage: str = "compression"
    ) -> None:
        logger = self.make(directory)
        logger.start("mine", _RECIPE)
        for step, each in figures.items():
            logger.record(stage, step, each)
        if outcome == "finished":
            logger.finish({"size.ratio": 20.5, "compressed.accuracy": 0.875})
        logger.close(outcome)

    def test_nothing_is_written_before_it_starts(self, tmp_path: Path) -> None:
        self.make(tmp_path / "logs")
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize("outcome", ["finished", "interrupted", "failed"])
    def test_what_it_is_told_is_there_however_training_ends(self, tmp_path: Path, outcome: Outcome) -> None:
        self._tell(tmp_path, _FIRST, outcome)
        assert self.told(tmp_path, "compression") == _measured(_FIRST)

    def test_stages_count_by_themselves(self, tmp_path: Path) -> None:
        logger = self.make(tmp_path)
        logger.start("mine", _RECIPE)
        for step, figures in _FIRST.items():
            logger.record("baseline", step, figures)
        for step, figures in _AGAIN.items():
            logger.record("try 1", step, figures)
        logger.close("finished")
        assert self.told(tmp_path, "baseline") == _measured(_FIRST)
        assert self.told(tmp_path, "try 1") == _measured(_AGAIN)

    def test_it_goes_on_after_an_interruption(self, tmp_path: Path) -> None:
        self._tell(tmp_path, _FIRST, "interrupted")
        self._tell(tmp_path, _AGAIN, "finished")
        assert self.told(tmp_path, "compression") == _measured({**_FIRST, **_AGAIN})
        assert self.metrics(tmp_path) == {"size.ratio": 20.5, "compressed.accuracy": 0.875}

    def test_closed_before_anything_it_has_told_nothing(self, tmp_path: Path) -> None:
        self._tell(tmp_path, {}, "failed")
        assert self.told(tmp_path, "compression") == {}

    def test_it_is_closed_though_it_has_not_started(self, tmp_path: Path) -> None:
        logger: Any = self.make(tmp_path)
        logger.close("failed")
