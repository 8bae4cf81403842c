"""A kind of file: how good ones are made, how one is damaged, and how it is read."""

from abc import ABC, abstractmethod
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from fuzz.mutations import damaged


class Kind(ABC):
    """One kind of file that is read.

    ``prepare`` is called once, before processes are forked; then, for each case, ``damage`` writes a file and
    ``read`` reads it as users do.
    """

    name: ClassVar[str]
    #: How many cases a run has beside 10,000 of packed files.
    share: ClassVar[float] = 0.2

    @abstractmethod
    def prepare(self, directory: Path) -> None:
        """Make good files, and remember what reading them gives."""

    @abstractmethod
    def damage(self, directory: Path, random: Random) -> bool:
        """Write a damaged file; returns whether other content than the original's may be read from it."""

    @abstractmethod
    def read(self, directory: Path) -> Any:
        """Read the file, and use what is read; raises SQSError where it is refused."""

    def is_right(self, value: Any) -> bool:
        """Whether what was read is what the good file holds."""
        return True


class Documents(Kind):
    """One file of text that people may edit: what can be read from a changed one is right."""

    def __init__(self) -> None:
        self.good: list[bytes] = []

    def damage(self, directory: Path, random: Random) -> bool:
        """Damage bytes, or the document."""
        good = random.choice(self.good)
        made = damaged(good, random) if random.random() < 0.5 else self.changed(good, random)
        (directory / self.file).write_bytes(made)
        return True

    file: ClassVar[str]

    @abstractmethod
    def changed(self, content: bytes, random: Random) -> bytes:
        """The document with another value somewhere."""
