"""What a logger is, and how a training calls several of them."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import Any, Literal

from sqs_pyro.errors import OutputError, SQSError, said

Outcome = Literal["finished", "interrupted", "failed"]
Figures = Mapping[str, float | None]

_NAMES = {"score": "validation_score"}  # of the records of a compression; a baseline's say it themselves


class Logger(ABC):
    """Where training is told to.

    Its methods are called in this order: ``start``, often ``record``, ``finish`` where training got that far, and
    ``close`` in any case. One that goes on after an interruption is made and started anew, with what it kept. What
    is missing (a package, say) is found out when a logger is made, and nothing is written before ``start``.
    """

    @abstractmethod
    def start(self, name: str, recipe: Mapping[str, Any]) -> None:
        """Begin, or go on.

        Args:
            name: of the run.
            recipe: all that was asked for, plain data.
        """

    @abstractmethod
    def record(self, stage: str, step: int, figures: Figures) -> None:
        """Take figures of a step.

        Args:
            stage: what is going on: ``"baseline"``, ``"compression"``.
            step: of the stage, rising; after an interruption it may begin below the last one.
            figures: by name, the same names throughout a stage; None: not measured at this step.
        """

    @abstractmethod
    def finish(self, metrics: Mapping[str, float]) -> None:
        """Take the figures of what has come out, by dotted name."""

    @abstractmethod
    def close(self, outcome: Outcome) -> None:
        """Write what is not written, and let go of files and connections."""


class Log:
    """Several loggers as one; one that fails while training goes on is left behind with a warning."""

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self._waiting, self._started = list(loggers), list[Logger]()

    def start(self, name: str, recipe: Mapping[str, Any]) -> None:
        """Start all; errors of one that cannot become one sentence, an OutputError."""
        while self._waiting:
            logger = self._waiting.pop(0)
            self._started.append(logger)  # what has started half is closed, too
            try:
                logger.start(name, recipe)
            except SQSError:
                raise
            except Exception as error:
                raise OutputError(
                    f"Logger {type(logger).__name__} cannot start ({said(error)}): correct its settings, or leave "
                    "it out."
                ) from error

    def record(self, stage: str, step: int, figures: Figures) -> None:
        """Tell all of figures of a step, see :meth:`Logger.record`."""
        self._each(lambda logger: logger.record(stage, step, figures))

    def steps(self, stage: str) -> Callable[[Any], None]:
        """Return what takes records of a stage: ``progress`` of ``compress`` or ``train_baseline``."""
        return lambda record: self.record(stage, *figures_of(record))

    def finish(self, document: Mapping[str, Any]) -> None:
        """Tell all of the figures in a document, nested or not: its finite numbers, lists left out."""
        self._each(lambda logger: logger.finish(dict(_numbers(document))))

    def close(self, outcome: Outcome) -> None:
        """Close all that have started."""
        self._each(lambda logger: logger.close(outcome))
        self._started.clear()

    def _each(self, call: Callable[[Logger], None]) -> None:
        for logger in list(self._started):
            try:
                call(logger)
            except Exception as error:  # of anybody's package, server or disk: training does not end with it
                self._started.remove(logger)
                with suppress(Exception):
                    logger.close("failed")
                sentence = (
                    f"Logger {type(logger).__name__} has failed ({said(error)}): training goes on without it."
                )
                warnings.warn(sentence, RuntimeWarning, stacklevel=3)


@contextmanager
def logged(loggers: Sequence[Logger], name: str = "", recipe: Mapping[str, Any] | None = None) -> Iterator[Log]:
    """Start loggers, yield them as one, and close them, whatever the body ends with.

    Args:
        loggers: to start.
        name: of the run.
        recipe: plain data.

    Raises:
        OutputError: one cannot start.
    """
    log = Log(loggers)
    outcome: Outcome = "failed"
    try:
        log.start(name, recipe or {})
        yield log
        outcome = "finished"
    except KeyboardInterrupt:
        outcome = "interrupted"
        raise
    finally:
        log.close(outcome)


def figures_of(record: Any) -> tuple[int, dict[str, float | None]]:
    """Return what a record, a dataclass, counts by (its first field), and its figures (all floats, or None)."""
    first, *rest = [(field.name, getattr(record, field.name)) for field in fields(record)]
    return first[1], {_NAMES.get(name, name): v for name, v in rest if v is None or isinstance(v, float)}


def flat(document: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings by dotted name."""
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _numbers(document: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in flat(document):
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield name, float(value)
