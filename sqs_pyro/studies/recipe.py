"""The recipe of a study: one base run, variants of it, grids of values, seeds; every combination is a cell."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from sqs_pyro.documents import read_yaml, shown
from sqs_pyro.errors import RecipeError
from sqs_pyro.recipes import MAX_SEED, RecipeSection, key_parts, parse
from sqs_pyro.runs.kinds import RunKind, kind_of
from sqs_pyro.runs.recipe import WholeRecipe, changed, with_value

STUDY_KEYS = frozenset({"base", "variants", "grid", "seeds"})
_LONGEST_NAME = 120  # of a directory, in characters: with suffixes it fits into 255 bytes of most alphabets
_GIVEN_ELSEWHERE = {"seed": "in the study's `seeds`", "name": "by the variants' labels"}

Grid = dict[str, list[Any]]


class VariantRecipe(RecipeSection):
    """One variant of a study.

    Attributes:
        set: keys of a run recipe and the values they have in this variant, in place of the base's. Keys are
            dotted or nested: `compression.num_components: 4`, or `compression: {num_components: 4}`.
        grid: dotted keys and the values each runs through; every combination is a point. None takes the
            study's `grid`, an empty mapping none.
    """

    set: dict[str, Any] = Field(default_factory=dict)
    grid: Grid | None = None


class StudyRecipe(RecipeSection):
    """What `sqs compare` and `sqs sweep` run.

    Attributes:
        name: shown in tables and pictures.
        base: the run that variants change: a whole run recipe, or the path of one, relative to this file.
        seeds: every point is run with each of them.
        variants: labels and what each changes; without any, the base alone is the variant.
        reference: label of the variant that the others are compared with; None is the first.
        grid: dotted keys and the values that every variant without a grid of its own runs through.
    """

    name: str = Field(min_length=1)
    base: dict[str, Any]
    seeds: tuple[Annotated[int, Field(ge=0, le=MAX_SEED)], ...] = (0,)
    variants: dict[str, VariantRecipe] = Field(default_factory=dict)
    reference: str | None = None
    grid: Grid = Field(default_factory=dict)

    def as_yaml(self) -> str:
        """Return this recipe, with its base written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        variant: label.
        values: dotted keys of the grid and their values here.
        seed: of the run.
        recipe: the whole run.
    """

    variant: str
    values: dict[str, Any]
    seed: int
    recipe: WholeRecipe

    @property
    def kind(self) -> RunKind[Any]:
        """What the run is of."""
        return kind_of(self.recipe)

    @property
    def name(self) -> str:
        """Variant, point and seed in a line."""
        return f"{self.recipe.name}, seed {self.seed}"

    @property
    def directory(self) -> str:
        """The cell's name, fit for a directory."""
        return f"{_slug(self.recipe.name)[:_LONGEST_NAME]}-seed{self.seed}"


def load_study(path: str | Path, changes: Sequence[str] = ()) -> StudyRecipe:
    """Read and validate a study; the recipe of a single run is a study of one variant.

    Args:
        path: YAML file.
        changes: ``"seeds=[0, 1]"``, ``"base.compression.epochs=2"``: values to put in place of the file's.

    Raises:
        RecipeError: a file is missing or is no YAML, or a key or value in it, or in one of its cells, is wrong.
    """
    path = Path(path)
    values = read_yaml(path)
    if isinstance(values, Mapping) and not STUDY_KEYS & set(values):
        values = {"name": values.get("name") or path.stem, "base": values, "seeds": [values.get("seed", 0)]}
    elif isinstance(values, Mapping) and isinstance(values.get("base"), str):
        # From the study's own directory, wherever the command is called.
        values = {**values, "base": read_yaml(path.parent / values["base"])}
    study = parse(StudyRecipe, changed(values, changes))
    cells(study)  # every cell's recipe is validated before the first is run
    return study


def cells(study: StudyRecipe) -> list[Cell]:
    """Return all runs of a study: seed after seed, so that an unfinished study has whole seeds.

    Raises:
        RecipeError: the base is of a kind that studies do not take, a variant or grid names an unknown key or an
            impossible value, a list is empty or has a value twice, or two cells cannot be told apart.
    """
    kind = kind_of(study.base)
    if not kind.in_studies:
        raise RecipeError(
            f"Recipe key 'base' is {kind.said}, which studies do not take: run each variant with `sqs compress`."
        )
    kind.check_comparable(
        kind.parse(study.base, "base")
    )  # alone, so that its mistakes are not told as a variant's
    _check_values("seeds", study.seeds)
    variants = study.variants or {study.name: VariantRecipe()}
    if study.reference not in {None, *variants}:
        raise RecipeError(
            f"Recipe key 'reference' is {shown(study.reference)}, which is no variant: take one of "
            f"{', '.join(variants)}."
        )
    found = [
        _cell(study, kind, label, variant, values, seed)
        for seed in study.seeds
        for label, variant in variants.items()
        for values in _points(label, variant, study.grid)
    ]
    _check_distinct(found)
    return found


def point_label(values: Mapping[str, Any]) -> str:
    """Write a point of a grid in a line, ``nonzero_rate=0.1, num_components=4``; keys of equal ends whole."""
    ends = [key_parts(key)[-1] for key in values]
    short = {key: end if ends.count(end) == 1 else key for key, end in zip(values, ends, strict=True)}
    return ", ".join(f"{short[key]}={value}" for key, value in values.items())


def _points(label: str, variant: VariantRecipe, shared: Grid) -> Iterator[dict[str, Any]]:
    """Yield every combination of a grid's values, the last key running fastest."""
    grid = shared if variant.grid is None else variant.grid
    for key, values in grid.items():
        _check_values(f"grid.{key}", values)
        if key in variant.set:
            raise RecipeError(f"Variant '{label}' has '{key}' both in `set` and in its grid: keep one.")
    for combination in itertools.product(*grid.values()):
        yield dict(zip(grid, combination, strict=True))


def _cell(
    study: StudyRecipe,
    kind: RunKind[Any],
    label: str,
    variant: VariantRecipe,
    values: dict[str, Any],
    seed: int,
) -> Cell:
    for key in [*variant.set, *values]:
        if key in _GIVEN_ELSEWHERE:
            raise RecipeError(
                f"Variant '{label}' changes '{key}', which is given {_GIVEN_ELSEWHERE[key]}: remove it."
            )
    name = f"{label} ({point_label(values)})" if values else label
    asked = {**variant.set, **values, "seed": seed, "name": name}
    try:
        recipe = kind.parse(_merged(study.base, asked))
    except RecipeError as error:
        raise RecipeError(f"Variant '{name}': {error}") from None
    return Cell(label, values, seed, recipe)


def _merged(values: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with dotted or nested keys changed, and everything else kept."""
    for key, value in changes.items():
        # A mapping changes the keys that it has; an empty one is a value (a section with its defaults).
        if isinstance(value, Mapping) and value:
            # Below `layers` keys are patterns, whose dots part nothing.
            form = '{}."{}"' if key_parts(key)[-1] == "layers" else "{}.{}"
            values = _merged(values, {form.format(key, inner): each for inner, each in value.items()})
        else:
            values = with_value(values, key, value)
    return values


def _check_values(key: str, values: Sequence[Any]) -> None:
    if not values:
        raise RecipeError(f"Recipe key '{key}' is empty: give a list of at least one value, or remove the key.")
    for i, value in enumerate(values):
        if value in values[:i]:  # not by a set: values may be lists
            raise RecipeError(f"Recipe key '{key}' has the value {shown(value)} twice: keep one.")


def _check_distinct(found: Sequence[Cell]) -> None:
    names: dict[str, str] = {}
    for cell in found:
        if cell.directory in names:
            raise RecipeError(
                f"'{names[cell.directory]}' and '{cell.name}' would have the same directory '{cell.directory}': "
                "give the variants labels that differ in letters or digits."
            )
        names[cell.directory] = cell.name


def _slug(text: str) -> str:
    # Lower case, as some file systems do not tell cases apart; `_check_distinct` finds what has become equal.
    return re.sub(r"[^\w.=+-]+", "-", text.lower()).strip("-") or "cell"
