"""Pictures that are made, not painted, which is half of a small run: tests/reporting looks at what is on them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from matplotlib.figure import Figure


@contextmanager
def blank() -> Iterator[None]:
    """Write an empty figure in the place of every figure that is written."""
    paint = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda _, place, **options: paint(Figure(figsize=(1, 1)), place))
        yield
