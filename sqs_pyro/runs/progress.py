"""How long work tells of itself, without knowing who listens."""

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""Called as ``progress(stage, done, total, text)``, often: a stage is a word, its text one short line."""


def silent(stage: str, done: int, total: int, text: str) -> None:
    """Tell nobody."""
