"""Records as CSV files that grow: one for each stage, and one of what has come out."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from sqs_pyro.atomic import write_text
from sqs_pyro.loggers.logger import Figures, Logger, Outcome

METRICS = "metrics"


class CSVFiles(Logger):
    """Writes ``STAGE.csv``, a row a record, and ``metrics.csv``.

    Args:
        directory: of the files; those of an interrupted training are gone on with.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._files: dict[str, TextIO] = {}

    def start(self, name: str, recipe: Mapping[str, Any]) -> None:
        """Make the directory; who reads the files has the recipe elsewhere."""
        self.directory.mkdir(parents=True, exist_ok=True)

    def record(self, stage: str, step: int, figures: Figures) -> None:
        """Write a row."""
        columns = ["step", *figures]
        if stage not in self._files:
            self._files[stage] = self._opened(self.directory / f"{stage}.csv", columns, step)
        writer = csv.DictWriter(self._files[stage], columns, lineterminator="\n")
        writer.writerow({"step": step, **figures})
        self._files[stage].flush()  # for those who look on

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Write ``metrics.csv``."""
        write_text(self.directory / f"{METRICS}.csv", _text(["name", "value"], list(metrics.items())))

    def close(self, outcome: Outcome) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _opened(self, path: Path, columns: list[str], step: int) -> TextIO:
        """Open a stage's file behind its last row before a step: what comes after it is told again."""
        kept: list[list[str]] = []
        if path.exists():
            rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
            # A row that a killed process has cut is not before anything.
            kept = [row for row in rows[1:] if len(row) == len(columns) and int(row[0]) < step]
        write_text(path, _text(columns, kept))
        return path.open("a", encoding="utf-8", newline="")


def _text(columns: list[str], rows: Any) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
