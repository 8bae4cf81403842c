"""Runs on images, and on other data that is no text."""

from sqs_pyro.runs.directory import HISTORY, PACKED
from sqs_pyro.runs.images.kind import Images
from sqs_pyro.runs.images.network import check_fit, give_weights, untrained_network
from sqs_pyro.runs.images.pipeline import run
from sqs_pyro.runs.recipe import RunRecipe, load_recipe

__all__ = [
    "HISTORY",
    "PACKED",
    "Images",
    "RunRecipe",
    "check_fit",
    "give_weights",
    "load_recipe",
    "run",
    "untrained_network",
]
