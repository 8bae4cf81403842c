"""What files hold: arrays of NumPy's .npz, columns of tables in .csv, .jsonl, .json and .parquet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqs_pyro.data.recipe import DataRecipe
from sqs_pyro.data.rows import rows_in_file
from sqs_pyro.documents import shown
from sqs_pyro.errors import DataError, first_line
from sqs_pyro.extras import needed_for

Array = NDArray[Any]


@dataclass(frozen=True)
class Examples:
    """Inputs and targets as a file has them, both with examples first, and what their columns are called.

    Attributes:
        inputs: arrays ``[N, ...]``, or columns ``[N]`` beside each other.
        targets: likewise.
    """

    inputs: dict[str, Array]
    targets: dict[str, Array]

    def __len__(self) -> int:
        """Number of examples."""
        return len(next(iter(self.inputs.values())))


def read_examples(recipe: DataRecipe) -> tuple[Examples, Examples | None]:
    """Return what a file holds for training and, if it says so or another file does, for the final figures.

    Raises:
        DataError: a file, array or column is missing, or they differ in length.
    """
    path = _place(recipe.root, recipe.name)
    other = None if recipe.test is None else _place(recipe.root, recipe.test)
    if path.suffix.lower() == ".npz":
        return _of_arrays(path, other, recipe)
    return _of_table(path, recipe), None if other is None else _of_table(other, recipe)


def _place(root: Path | None, name: str | Path) -> Path:
    path = Path(name) if root is None else root / name
    if not path.is_file():
        raise DataError(f"Data file '{path}' is not there: correct the path, or give the directory as `root`.")
    return path


# ---- arrays ----

_NAMES = (("x", "y"), ("X", "Y"), ("X", "y"), ("inputs", "targets"), ("images", "labels"), ("data", "labels"))


def _of_arrays(path: Path, other: Path | None, recipe: DataRecipe) -> tuple[Examples, Examples | None]:
    arrays = _read_npz(path)
    x, y = _array_names(path, arrays, recipe)
    suffixes = [suffix for suffix in ("", "_train") if f"{x}{suffix}" in arrays]
    if not suffixes:
        raise _missing(path, x, arrays, "inputs")
    train = _pair(path, arrays, f"{x}{suffixes[0]}", f"{y}{suffixes[0]}")
    if other is not None:
        return train, _pair(other, _read_npz(other), x, y)
    return train, _pair(path, arrays, f"{x}_test", f"{y}_test") if f"{x}_test" in arrays else None


def _array_names(path: Path, arrays: dict[str, Array], recipe: DataRecipe) -> tuple[str, str]:
    for key in ("inputs", "targets"):
        if len(getattr(recipe, key) or ("one",)) > 1:
            raise DataError(f"`{key}` of '{path}' names {shown(getattr(recipe, key))}, but is one array: name it.")
    if recipe.inputs and recipe.targets:
        return recipe.inputs[0], recipe.targets[0]
    for x, y in _NAMES:
        x, y = (recipe.inputs or (x,))[0], (recipe.targets or (y,))[0]
        for suffix in ("", "_train"):
            if {f"{x}{suffix}", f"{y}{suffix}"} <= arrays.keys():
                return x, y
    raise DataError(
        f"'{path}' has the arrays {listed(arrays)}, of which it does not tell inputs and targets: name them as "
        "`inputs` and `targets`, or save them as x_train, y_train, x_test and y_test."
    )


def _pair(path: Path, arrays: dict[str, Array], x: str, y: str) -> Examples:
    for name, key in ((x, "inputs"), (y, "targets")):
        if name not in arrays:
            raise _missing(path, name, arrays, key)
        if not arrays[name].ndim:
            raise DataError(
                f"Array '{name}' of '{path}' is a single value, but should be [N, ...], examples first."
            )
    if len(arrays[x]) != len(arrays[y]):
        raise DataError(
            f"'{path}' has {len(arrays[x])} examples in '{x}', but {len(arrays[y])} in '{y}': give each a target."
        )
    return Examples({x: arrays[x]}, {y: arrays[y]})


def _read_npz(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as file:  # pickles could run code
            return {name: file[name] for name in file.files}
    except Exception as error:  # zip's, NumPy's and the system's own
        raise DataError(
            f"'{path}' cannot be read as NumPy's .npz ({first_line(error)}): write it with np.savez, of arrays of "
            "numbers."
        ) from None


# ---- tables ----


def _of_table(path: Path, recipe: DataRecipe) -> Examples:
    columns = _read_parquet(path) if path.suffix.lower() == ".parquet" else _columns(rows_in_file(path), path)
    targets = recipe.targets or tuple(list(columns)[-1:])
    inputs = recipe.inputs or tuple(name for name in columns if name not in targets)
    for key, names in (("inputs", inputs), ("targets", targets)):
        if not names:
            raise DataError(f"'{path}' has no column left for `{key}`: its columns are {listed(columns)}.")
        for name in names:
            if name not in columns:
                raise _missing(path, name, columns, key)
    return Examples({name: columns[name] for name in inputs}, {name: columns[name] for name in targets})


def _columns(rows: Sequence[Any], path: Path) -> dict[str, Array]:
    names = list(rows[0]) if rows and isinstance(rows[0], dict) else []
    if not names:
        raise DataError(f"'{path}' has no rows of named columns: give the names in its first line.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or list(row) != names or None in row.values():
            raise DataError(
                f"Row {number} of '{path}' has not the columns of the first one ({listed(names)}), or not a value "
                "in each: correct it."
            )
    return {name: np.array([row[name] for row in rows]) for name in names}


def _read_parquet(path: Path) -> dict[str, Array]:
    with needed_for("Parquet files"):
        from pyarrow import parquet  # heavy, and only needed here

    try:
        table = parquet.read_table(path)
    except Exception as error:  # pyarrow's and the system's own
        raise DataError(f"'{path}' cannot be read as Parquet ({first_line(error)}): write it anew.") from None
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.null_count:
            raise DataError(
                f"Column '{name}' of '{path}' has {column.null_count} rows without a value: fill them."
            )
    return {name: table[name].to_numpy() for name in table.column_names}


def _missing(path: Path, name: str, there: Any, key: str) -> DataError:
    return DataError(f"'{path}' has no '{name}', which `{key}` asks for: it has {listed(there)}.")


def listed(names: Any) -> str:
    """Return the first names of many, for a sentence."""
    return ", ".join(map(str, list(names)[:20]))[:200] or "none"
