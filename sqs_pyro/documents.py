"""Documents of people and other programs, JSON and YAML: read with bounds, never executed, never guessed.

One function reads every YAML file and one every JSON file. Both refuse what no honest document holds and what
would take memory or time out of proportion to the file: deep nesting, numbers of hundreds of digits, aliases that
grow, a key that is given twice (one of the values would be lost without a word), NaN in JSON. Each refusal is one
sentence.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sqs_pyro.errors import RecipeError, SQSError

MAX_DEPTH = 64  # of lists and mappings within each other
MAX_DIGITS = 100  # of a whole number; Python itself refuses more than 4,300 with an error of its own
MAX_YAML_BYTES = 1 << 18  # of a recipe: a thousand times what one takes, and read in seconds
MAX_JSON_BYTES = 1 << 26  # 64 MiB: metrics of a network of thousands of layers take a few
_MAX_YAML_NODES = 100_000  # aliases written out
_LONGEST_SHOWN = 200
_WRITTEN_OUT = ("builtins", "datetime")  # modules of classes whose ``repr`` says what a value is

_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def shown(value: Any, most: int = _LONGEST_SHOWN) -> str:
    """Return a value for a message, in at most ``most`` characters; of a longer one the beginning.

    Numbers, texts and what is made of them are as Python writes them, tensors and arrays their dtype and shape,
    other objects their class. What is written out is bounded, too: a list of a million entries is not formatted
    to be cut.
    """
    text = repr(_Beginning(most).of(value))
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def parse_json(
    text: str | bytes, error: type[SQSError], what: str, repair: str, most: int = MAX_JSON_BYTES
) -> Any:
    """Return what a JSON text says.

    Args:
        text: of UTF-8, if bytes.
        error: class of what is raised.
        what: begins the sentence: ``"'metrics.json'"``.
        repair: ends it: ``"run it again"``.
        most: bytes, or characters.

    Raises:
        SQSError: of class ``error``; it is too large or no JSON, or holds what the module's text says.
    """
    if len(text) > most:
        raise error(f"{what} has {len(text)} bytes, and {most} are allowed: {repair}.")
    try:
        content = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(content, object_pairs_hook=_unique, parse_int=_integer, parse_constant=_no_constant)
        _check_depth(value)
    except json.JSONDecodeError as wrong:
        place = f"line {wrong.lineno}, column {wrong.colno}"
        raise error(f"{what} is no JSON ({wrong.msg}, {place}): {repair}.") from None
    except RecursionError:
        raise error(
            f"{what} is no JSON that is read here (nested more than {MAX_DEPTH} deep): {repair}."
        ) from None
    except UnicodeDecodeError as wrong:
        raise error(f"{what} is no JSON (byte {wrong.start} is not UTF-8): {repair}.") from None
    except ValueError as wrong:  # of the functions below
        raise error(f"{what} {wrong}: {repair}.") from None
    return value


def read_json(path: Path, error: type[SQSError], repair: str, most: int = MAX_JSON_BYTES) -> Any:
    """Return what a JSON file says; arguments and errors as :func:`parse_json`.

    Raises:
        SQSError: of class ``error``; besides, there is no such file.
        OSError: the file cannot be read.
    """
    return parse_json(_content(path, error, repair, most), error, f"'{path}'", repair, most)


def read_json_object(path: Path, error: type[SQSError], repair: str, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return what a JSON file says, which must be an object; arguments and errors as :func:`read_json`."""
    value = read_json(path, error, repair, most)
    if not isinstance(value, dict):
        raise error(f"'{path}' holds {_kind(value)}, but should hold an object: {repair}.")
    return value


def read_yaml(path: Path) -> Any:
    """Return what a YAML file says; an empty one says ``{}``.

    Raises:
        RecipeError: the file is missing, or as :func:`parse_yaml`.
    """
    if not path.is_file():
        raise RecipeError(f"Recipe '{path}' is not there: give the path of a YAML file.")
    try:
        content = _content(path, RecipeError, "is it another file?", MAX_YAML_BYTES)
    except OSError as error:
        raise RecipeError(f"Recipe '{path}' cannot be read: {error.strerror}.") from None
    if content[:2] in _BOMS:
        raise RecipeError(f"Recipe '{path}' is {_BOMS[content[:2]]}: save it as UTF-8.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"Recipe '{path}' is no text (byte {error.start} is not UTF-8): save it as UTF-8."
        ) from None
    found = parse_yaml(text, f"Recipe '{path}'")
    return {} if found is None else found


def parse_yaml(text: str, what: str) -> Any:
    """Return what a YAML text says.

    Dates stay texts, and numbers are decimal as in YAML 1.2: ``1e-3`` is one, ``010`` is ten and ``1:30`` none;
    ``yes``, ``no``, ``on`` and ``off`` are true and false as in YAML 1.1.

    Args:
        text: of one document.
        what: begins the sentence: ``"Recipe 'r.yaml'"``.

    Raises:
        RecipeError: it is no YAML, or holds what the module's text says; with the line, where it has one.
    """
    try:
        return yaml.load(text, Loader=_BoundedLoader)
    except yaml.MarkedYAMLError as error:
        raise RecipeError(f"{what} is no valid YAML ({_reason(error)}): correct it there.") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())[:_LONGEST_SHOWN]
        raise RecipeError(f"{what} is no valid YAML ({reason}): correct it there.") from None
    except RecursionError:
        raise RecipeError(f"{what} is nested more than {MAX_DEPTH} deep: write it flatter.") from None
    except (ValueError, TypeError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{what} is no valid YAML ({shown(str(error))}): correct it there.") from error


class _BoundedLoader(yaml.SafeLoader):
    """Plain data only: no Python objects, no dates; bounded, and every key once."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._nodes: dict[int, int] = {}  # by id of a finished node: how many it stands for, aliases written out

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self._depth += 1
        # Before PyYAML goes down into it, whose recursion would end in Python's own error.
        if self._depth > MAX_DEPTH:
            raise _wrong(f"nested more than {MAX_DEPTH} deep", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if id(node) not in self._nodes:
            if isinstance(event, yaml.AliasEvent):  # to a node that is not finished yet: endless
                raise _wrong("an alias stands inside of what it means", event.start_mark)
            self._nodes[id(node)] = 1 + sum(self._nodes[id(child)] for child in _children(node))
        if self._nodes[id(node)] > _MAX_YAML_NODES:
            raise _wrong(f"aliases stand for more than {_MAX_YAML_NODES:,} values", event.start_mark)
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (yaml.YAMLError, RecipeError, RecursionError):
            raise
        except Exception as error:  # PyYAML hands on whatever a value of another kind ends in
            value = node.value if isinstance(node, yaml.ScalarNode) else node.id
            tag = node.tag.removeprefix("tag:yaml.org,2002:")
            raise _wrong(f"{shown(value, 60)} is no value of the kind !!{tag}", node.start_mark) from error

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            # Keys out of `<<` may be overridden: these two are no repetition.
            is_merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = "<<" if is_merge else self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                raise _wrong("a key is a list or a mapping", key_node.start_mark)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise RecipeError(f"Recipe key {shown(key)} is given twice, again in line {line}: keep one.")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _decimal(loader: _BoundedLoader, node: Any) -> int:
    text = loader.construct_scalar(node)
    if not re.fullmatch(r"[-+]?[0-9][0-9_]*", text):
        raise ValueError(text)
    return _integer(text.replace("_", ""))


def _real(loader: _BoundedLoader, node: Any) -> float:
    text = loader.construct_scalar(node).replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_BoundedLoader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("int", "float", "timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_BoundedLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9][0-9_]*$"), list("-+0123456789")
)
_BoundedLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
_BoundedLoader.add_constructor("tag:yaml.org,2002:int", _decimal)
_BoundedLoader.add_constructor("tag:yaml.org,2002:float", _real)


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, yaml.MappingNode):
        return [each for pair in node.value for each in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _wrong(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _reason(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    said = [text for text in (error.context, error.problem) if text]
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return " ".join(", ".join(said).split())[:_LONGEST_SHOWN] + place


def _content(path: Path, error: type[SQSError], repair: str, most: int) -> bytes:
    """Return the bytes of a file, at most ``most``: what is larger is not read."""
    with path.open("rb") as stream:
        content = stream.read(most + 1)  # not by the file's size, which /dev/zero and pipes do not have
    if len(content) > most:
        raise error(f"'{path}' has more than the {most:,} bytes that are allowed: {repair}.")
    return content


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)  # Python keeps the last of equal keys and says nothing
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"has the key {shown(twice)} twice")
    return found


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"has a number of {len(text)} digits")
    return int(text)


def _no_constant(text: str) -> None:
    raise ValueError(f"has the number {text}, which is not finite")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        # Level by level, for recursion would fail where it is to say that there is too much of it.
        if depth > MAX_DEPTH + 1:  # numbers and texts within the innermost list
            raise RecursionError
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "nothing" if value is None else f"a {type(value).__name__}")


class _Text(str):
    """What ``repr`` writes without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


class _Beginning:
    """As much of a value as some characters can show."""

    def __init__(self, most: int) -> None:
        self._left = most

    def of(self, value: Any, depth: int = MAX_DEPTH) -> Any:
        """Return the value's beginning; lists and mappings deeper than ``depth`` are dots."""
        if isinstance(value, str | bytes):
            value = value[: self._left + 1]  # one more than fits, so that it is seen to be cut
        self._left -= len(value) if isinstance(value, str | bytes) else 2
        if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:  # whose digits take quadratic time
            return f"an integer of {value.bit_length()} bits"
        if isinstance(value, list | tuple | Mapping) and not depth:
            return "..."
        if isinstance(value, Mapping):
            return {
                self.of(name, depth - 1): self.of(each, depth - 1) for name, each in self._first(value.items())
            }
        if type(value) in (list, tuple):
            return type(value)(self.of(each, depth - 1) for each in self._first(value))
        return value if type(value).__module__ in _WRITTEN_OUT else _Text(self._described(value))

    def _described(self, value: Any) -> str:
        if hasattr(value, "dtype") and hasattr(value, "shape"):
            text = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        else:
            text = f"a {type(value).__name__}"
        self._left -= len(text)
        return text

    def _first(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            if self._left <= 0:
                return
            yield value
