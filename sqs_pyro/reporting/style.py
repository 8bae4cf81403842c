"""What all pictures have in common.

Figures are built without pyplot, so that drawing neither opens a window nor changes matplotlib's global
state. Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from pathlib import Path

from sqs_pyro.atomic import appearing
from sqs_pyro.extras import needed_for

with needed_for("Pictures"):
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

BLUE, ORANGE, VERMILION, GREEN = "#0072B2", "#E69F00", "#D55E00", "#009E73"
SKY, PURPLE, YELLOW, BLACK = "#56B4E9", "#CC79A7", "#F0E442", "#000000"
GREY, LIGHT, INK = "#8A8A8A", "#CFCFCF", "#303030"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this many inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # which the figure keeps: pyplot would choose one by the environment
    return figure


def write_figure(figure: Figure, path: Path) -> None:
    """Draw a figure into a PNG file, which appears whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with appearing(path) as made:
        figure.savefig(made, dpi=150)


def tidy(axes: Axes) -> None:
    """Quiet spines and ticks, plain numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(labelsize=7.5, colors=INK, length=2.5, which="both")
    axes.tick_params(which="minor", length=0)
    axes.margins(x=0.01)
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
