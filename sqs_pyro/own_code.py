"""Functions of the user's own, by name: ``module:function``, or ``path/file.py:function``.

A name makes code run. So only names come here that a user gave, in a recipe, on the command line or in a call:
never one that a packed file holds.
"""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from sqs_pyro.documents import shown
from sqs_pyro.errors import RecipeError, SQSError, said

_FORM = "give module:function or path/file.py:function"


def is_own(name: str) -> bool:
    """Whether a name is that of a user's function, and not one that the library knows."""
    return ":" in name


def own_function(name: str, what: str) -> Callable[..., Any]:
    """Import and return a user's function, or class.

    A module is looked for in the working directory, too, and a file may import its neighbours.

    Args:
        name: as above; dots after the colon lead into classes.
        what: it is for, for sentences: "Network".

    Raises:
        RecipeError: there is no such file, module or function, importing it fails, or it cannot be called.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not all(part.isidentifier() for part in attribute.split(".")):
        raise RecipeError(f"{what} {shown(name)} does not name a function: {_FORM}.")
    try:
        module = _file(Path(place)) if place.endswith(".py") else _module(place)
    except SQSError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):  # of an import inside it
            raise RecipeError(f"{what} {name!r} cannot be imported ({said(error)}): install it.") from error
        raise RecipeError(
            f"{what} {name!r} names a module that is not there: correct it, start in its directory, or {_FORM}."
        ) from None
    except Exception as error:  # whatever the user's code ends in
        raise RecipeError(f"{what} {name!r} cannot be imported ({said(error)}): correct the module.") from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, [n for n in vars(found) if not n.startswith("_")], n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"correct the name, or define it in {place!r}."
            raise RecipeError(f"{what} {name!r} is not there: {place!r} has no {part!r}; {hint}")
        found = getattr(found, part)
    if not callable(found):
        raise RecipeError(f"{what} {name!r} is {shown(found)}, which cannot be called: name a function or class.")
    return found


def _module(name: str) -> ModuleType:
    with _first_in_path(Path.cwd()):  # where `python -m` would look; a console script does not
        return importlib.import_module(name)


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RecipeError(f"'{path}' is not there: {_FORM} of a file that is.")
    path = path.resolve()
    # Known by its place, so that the same file is the same module, and two of one name are two.
    name = f"{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look for it there
    try:
        with _first_in_path(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _first_in_path(directory: Path) -> Iterator[None]:
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        if str(directory) in sys.path:  # the module may have rearranged it
            sys.path.remove(str(directory))
