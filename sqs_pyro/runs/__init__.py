"""Whole runs: from a recipe to a directory with the packed file, its measurements and its pictures.

This package and ``cli`` join everything else; nothing imports them.
"""

from sqs_pyro.runs.images import run
from sqs_pyro.runs.recipe import RunRecipe, load_recipe

__all__ = ["RunRecipe", "load_recipe", "run"]
