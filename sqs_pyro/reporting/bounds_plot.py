"""Picture of how far the bounds on the KL are from the KL, over temperatures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sqs_pyro.extras import needed_for
from sqs_pyro.reporting.layers import Floats
from sqs_pyro.reporting.style import BLUE, GREY, INK, SKY, VERMILION, new_figure, tidy, write_figure

with needed_for("Pictures"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

Document = Mapping[str, Any]
_WORST = 3  # panels of single sites: with that of all, four fit into a page's width


def write_bounds_picture(path: Path, report: Document) -> None:
    """Draw :func:`bounds_figure` into a PNG file."""
    write_figure(bounds_figure(report), path)


def bounds_figure(report: Document) -> Figure:
    """KL a weight over τ: bracket, Monte Carlo with 3 standard errors, dominant value; all sites and the worst.

    The worst sites are those whose dominant value is farthest from the Monte Carlo estimate, a weight, at any
    temperature.

    Args:
        report: ``ElboReport.to_dict()``.
    """
    ordered = sorted(report["temperatures"], key=lambda at: at["temperature"] or 0.0)
    temperatures = np.array([_value(at["temperature"]) for at in ordered])
    worst = _worst_sites(ordered)
    panels = [("all sites", [at["total"] for at in ordered])]
    panels += [(name, [_site(at, name) for at in ordered]) for name in worst]
    figure = new_figure(3.3 * len(panels), 3.4)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for place, (title, kls) in zip(axes, panels, strict=True):
        _draw(place, temperatures, kls)
        shown = title if len(title) <= 30 else "…" + title[-29:]
        place.set_title(
            f"{shown}, {kls[0]['num_weights']:,} weights", loc="left", fontsize=8.5, color=INK, fontweight="bold"
        )
    axes[0].set_ylabel("KL, nats a weight", fontsize=8, color=INK)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=8)
    return figure


def _draw(axes: Axes, temperatures: Floats, kls: Sequence[Document]) -> None:
    def each(key: str) -> Floats:
        return np.array([_value(kl[key]) / max(kl["num_weights"], 1) for kl in kls])

    axes.set_xscale("log")
    axes.fill_between(temperatures, each("lower"), each("jensen"), color=SKY, alpha=0.3, label="certified bracket")
    axes.plot(temperatures, each("jensen"), color=BLUE, linewidth=1.2, label="Jensen")
    axes.plot(temperatures, each("lower"), color=BLUE, linewidth=0.8)
    axes.plot(temperatures, each("dominant"), "--", color=VERMILION, linewidth=1.2, label="dominant (no bound)")
    error = 3 * each("monte_carlo_error")
    axes.errorbar(
        temperatures,
        each("monte_carlo"),
        yerr=error,
        fmt="o",
        color=INK,
        ecolor=GREY,
        markersize=3.5,
        capsize=2,
        label="Monte Carlo, ± 3 standard errors",
    )
    tidy(axes)
    axes.xaxis.set_major_locator(FixedLocator(list(temperatures)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.margins(x=0.06)
    axes.set_xlabel("temperature τ", fontsize=8, color=INK)


def _worst_sites(ordered: Sequence[Document]) -> list[str]:
    def gap(name: str) -> float:
        kls = [_site(at, name) for at in ordered]
        gaps = [abs(_value(kl["dominant"]) - _value(kl["monte_carlo"])) / max(kl["num_weights"], 1) for kl in kls]
        return float(np.nan_to_num(gaps, nan=-1.0).max())  # sites without an estimate come last

    names = [site["name"] for site in ordered[0]["sites"] if site["dominant"] is not None]
    return sorted(names, key=gap, reverse=True)[:_WORST] if len(names) > 1 else []


def _site(at: Document, name: str) -> Document:
    return next(site for site in at["sites"] if site["name"] == name)


def _value(number: float | None) -> float:
    return np.nan if number is None else float(number)
