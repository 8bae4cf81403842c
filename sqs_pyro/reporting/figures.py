"""How figures of networks are called and written: label, factor and form; a task has some of them."""

from collections.abc import Iterable, Mapping
from typing import Any

FIGURES = {
    "r2": ("R²", 1, ".4f"),
    "rmse": ("root mean square error", 1, ".4g"),
    "mae": ("mean absolute error", 1, ".4g"),
    "mean_iou": ("mean intersection over union, %", 100, ".2f"),
    "average_precision": ("mean average precision, %", 100, ".2f"),
    "matthews": ("Matthews correlation", 1, ".4f"),
    "pearson": ("Pearson correlation", 1, ".4f"),
    "spearman": ("Spearman correlation", 1, ".4f"),
    "f1": ("F1, %", 100, ".2f"),
    "exact_match": ("exact match, %", 100, ".2f"),
    "cosine": ("mean cosine to fp32", 1, ".4f"),
    "recall_at_1": ("recall@1, %", 100, ".2f"),
    "accuracy": ("accuracy, %", 100, ".2f"),
    "nll": ("NLL, nats", 1, ".4f"),
    "ece": ("ECE, %", 100, ".2f"),
    "brier": ("Brier score", 1, ".4f"),
    "entropy": ("mean entropy, nats", 1, ".4f"),
}


def figures_of(networks: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, int, str]]:
    """Return all figures that networks may have, those first that users have named (``metric``)."""
    named = [network["metric"]["name"] for network in networks if "metric" in network]
    # Of code the function is what tells; where it is stands in the recipe.
    return {name: (name.rpartition(":")[2], 1, ".4f") for name in named} | FIGURES
