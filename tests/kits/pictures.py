"""Pictures that are not painted or not even made, which is half of a small run: tests/reporting looks at them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from matplotlib.figure import Figure

from sqs_pyro.reporting import plots


@contextmanager
def unpainted() -> Iterator[None]:
    """Make every figure, and write an empty one in its place."""
    paint = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda _, place, **options: paint(Figure(figsize=(1, 1)), place))
        yield


@contextmanager
def blank() -> Iterator[None]:
    """Write empty figures, and make none of a run's: for a kind of runs whose figures another run has made."""

    def empty(*_: object) -> Figure:
        return Figure(figsize=(1, 1))

    with unpainted(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "layer_figures", lambda _: [empty()])
        patch.setattr(plots, "bits_figure", empty)
        patch.setattr(plots, "curves_figure", empty)
        yield
