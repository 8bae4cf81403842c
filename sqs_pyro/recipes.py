"""Recipes: validated, frozen sections of a YAML file, and errors that say how to repair one."""

import difflib
import re
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from sqs_pyro.documents import shown
from sqs_pyro.errors import RecipeError

MAX_SEED = 2**62  # torch's seeds have 64 bits with a sign, and seeds of parts are sums
_MOST_SENTENCES = 3


class RecipeSection(BaseModel):
    """Base of every recipe section: unknown keys are errors, values are checked, instances are frozen.

    ``true`` and ``false`` are numbers to Python (1 and 0); in a recipe they are not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    #: What keys were called before. Those names are still taken, and written: files and kept states stay what they
    #: are, and older versions read them.
    older_names: ClassVar[Mapping[str, str]] = {}
    #: Keys that came later and change nothing at their default, at which they are not written: kept states of
    #: before are then still those of the same recipe.
    later_keys: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _by_present_names(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {cls.older_names.get(key, key): value for key, value in values.items()}  # the last one given counts

    @model_serializer(mode="wrap")
    def _by_older_names(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written = {present: older for older, present in self.older_names.items()}
        fields = type(self).model_fields
        unsaid = {key for key in self.later_keys if getattr(self, key) == fields[key].default}
        return {written.get(key, key): value for key, value in write(self).items() if key not in unsaid}

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        given = value if isinstance(value, list | tuple) else [value]  # of a list, its values
        if any(isinstance(each, bool) for each in given):
            annotation = cls.model_fields[info.field_name].annotation  # type: ignore[index]
            if not {bool, Any} & set(_types_in(annotation)):
                raise ValueError("a value of another kind: true and false are no numbers")
        return value


def _types_in(annotation: Any) -> list[Any]:
    """Return all types that an annotation names, itself first."""
    return [annotation, *(each for part in get_args(annotation) for each in _types_in(part))]


Section = TypeVar("Section", bound=RecipeSection)


def parse(section: type[Section], values: Mapping[str, Any] | Section, where: str = "") -> Section:
    """Validate ``values`` as a ``section``.

    Args:
        section: the recipe section to build.
        values: plain data, as read from YAML; a finished section is returned as it is.
        where: prefix of the key path in messages, e.g. ``"compression"``.

    Raises:
        RecipeError: for an unknown key or an impossible value; the sentence names the key, what was given
            and what is allowed.
    """
    if isinstance(values, section):
        return values  # frozen and validated: it may be shared
    if not isinstance(values, Mapping):
        place = f"recipe section '{where}'" if where else "the recipe"
        raise RecipeError(f"{place} must be a mapping of keys to values, but {shown(values)} was given.")
    try:
        return section.model_validate(dict(values))  # any mapping, which pydantic does not take
    except ValidationError as error:
        # A recipe of another kind has dozens of wrong keys: the first few say it.
        found = error.errors(include_url=False)
        said = [_sentence(section, item, where) for item in found[:_MOST_SENTENCES]]
        more = [f"And {len(found) - len(said)} more."] if len(found) > len(said) else []
        raise RecipeError(" ".join([*said, *more])) from None


def key_parts(key: str) -> list[str]:
    """Return the parts of a dotted key; a part that has dots itself is in double quotes.

    ``compression.layers."layer3.*".skip`` has the parts ``compression``, ``layers``, ``layer3.*`` and ``skip``.
    """
    parts = re.findall(r'(?:^|\.)("[^"]*"|[^.]*)', key)
    return [part[1:-1] if part.startswith('"') and part.endswith('"') else part for part in parts]


def meanings(section: type[RecipeSection]) -> dict[str, str]:
    """Return what the docstrings of a section and its bases say of each key, in a line each."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        _, _, attributes = (base.__doc__ or "").partition("Attributes:\n")
        for name, text in re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", attributes, re.MULTILINE):
            found[name] = " ".join(text.split())
    return found


def _sentence(section: type[RecipeSection], item: Any, where: str) -> str:
    location = [shown(part, 80).strip("'") if isinstance(part, str) else str(part) for part in item["loc"]]
    key = ".".join([where, *location] if where else location)
    if item["type"] == "extra_forbidden":
        return _unknown_key_sentence(section, location, key)
    if item["type"] == "missing":
        return f"Recipe key '{key}' is missing: add it."
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if not key:  # what keys of several sections have to do with each other
        return f"The recipe needs {message}."
    return f"Recipe key '{key}' is {shown(item['input'])}, but should be {message}."


def _unknown_key_sentence(section: type[RecipeSection], location: list[str], key: str) -> str:
    allowed = sorted(_section_at(section, location[:-1]).model_fields)
    close = difflib.get_close_matches(location[-1], allowed, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else "."
    return f"Recipe key '{key}' is unknown: allowed here are {', '.join(allowed)}{hint}"


def _section_at(section: type[RecipeSection], path: list[str]) -> type[RecipeSection]:
    for name in path:
        annotation = section.model_fields[name].annotation if name in section.model_fields else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next(
            (c for c in candidates if isinstance(c, type) and issubclass(c, RecipeSection)),
            section,
        )
    return section
