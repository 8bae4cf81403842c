"""A recipe to begin with, commented: what was asked for, and the keys that people change first."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sqs_pyro.atomic import check_place, write_text
from sqs_pyro.errors import OutputError
from sqs_pyro.recipes import RecipeSection, meanings

_WIDTH = 100

#: Keys that are written though they have their defaults, by section.
FIRST_CHANGED = {
    "": ("seed", "device"),
    "data": ("batch_size",),
    "baseline": ("epochs", "learning_rate", "optimizer"),
    "compression": ("epochs", "learning_rate", "optimizer", "precision", "distillation"),
}


def write_first_recipe(recipe: RecipeSection, path: Path, *, overwrite: bool = False) -> None:
    """Write a recipe with a comment above each key.

    Raises:
        OutputError: something is there already, or the place takes no file.
    """
    check_place(path)
    if path.exists() and not overwrite:
        raise OutputError(f"'{path}' is there already: choose another name, or replace it with --overwrite.")
    write_text(path, commented(recipe))


def commented(recipe: RecipeSection) -> str:
    """Return a recipe as YAML: what differs from its defaults, and :data:`FIRST_CHANGED`, under its meaning."""
    lines = ["# For `sqs compress`. All keys: docs/recipes.md of sqs-pyro.", *_section(recipe, "")]
    return "\n".join(lines) + "\n"


def _section(section: RecipeSection, name: str) -> Iterator[str]:
    older = {present: name for name, present in type(section).older_names.items()}  # by which it is written
    values = section.model_dump(mode="json")
    given = section.model_dump(mode="json", exclude_defaults=True)
    indent = "  " if name else ""
    # A network that has its weights is not trained: the keys of training would say nothing.
    first = () if {"checkpoint", "trained"} & given.keys() else FIRST_CHANGED.get(name, ())
    for key, meaning in meanings(type(section)).items():
        inner, kept = getattr(section, key) if key in FIRST_CHANGED else None, older.get(key, key)
        if inner is None and key not in first and kept not in given:
            continue
        said = meaning.replace("None", "null").replace("``", "`")
        yield from textwrap.wrap(said, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        if isinstance(inner, RecipeSection):
            yield f"{indent}{key}:"
            yield from _section(inner, key)
        else:  # of a section inside, too, without its defaults
            yield f"{indent}{key}: {_in_a_line(given.get(kept, values[kept]))}"


def _in_a_line(value: Any) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=True, width=10**6)
    return text.removesuffix("...\n").strip()  # which ends a document of one scalar
