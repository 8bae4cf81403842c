"""Ways to damage a file: at random bytes, and at random places of the document that it holds."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]


def damaged(content: bytes, random: Random) -> bytes:
    """The content after one to three mutations of bytes."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        content = random.choice(_BYTES)(content, random)
    return content


def _flip(content: bytes, random: Random) -> bytes:
    if not content:
        return b"\0"
    place = random.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << random.randrange(8)]) + content[place + 1 :]


def _set(content: bytes, random: Random) -> bytes:
    place = random.randrange(len(content) + 1)
    return content[:place] + random.randbytes(1) + content[place + 1 :]


def _run(content: bytes, random: Random) -> bytes:
    place, length = random.randrange(len(content) + 1), random.choice((2, 8, 64, 512))
    what = random.choice((bytes(length), b"\xff" * length, random.randbytes(length)))
    return content[:place] + what + content[place + length :]


def _cut(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content) + 1)]


def _extend(content: bytes, random: Random) -> bytes:
    return content + random.choice((b"\0", b"\n", random.randbytes(random.randrange(1, 100)), content[:64]))


def _splice(content: bytes, random: Random) -> bytes:
    start, stop = sorted(random.randrange(len(content) + 1) for _ in range(2))
    place = random.randrange(len(content) + 1)
    return content[:place] + content[start:stop] + content[place:]


def _remove(content: bytes, random: Random) -> bytes:
    start = random.randrange(len(content) + 1)
    return content[:start] + content[start + random.choice((1, 4, 32)) :]


_BYTES: tuple[Mutation, ...] = (_flip, _flip, _flip, _set, _run, _cut, _extend, _splice, _remove)


def deep(depth: int) -> Any:
    """Lists within each other."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


#: What a value of a document is replaced by: other types, sizes that are believed too easily, what is no number.
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 256, 10**5, 2**31, 2**40, 2**62, 2**64, 10**80, 0.5, -0.0, 1e308),
    *(
        "",
        "0",
        "NaN",
        "float16",
        "float32",
        "dense",
        "entropy",
        "bitmap",
        "conditional",
        "x" * 1000,
        "../../x",
        "\0",
    ),
    *([], {}, [[]], [2**40, 2**40], [0, 2**40], {"a": 1}, [None] * 1000, deep(30), deep(500)),
)


def changed(value: Any, random: Random) -> Any:
    """A document with one value replaced, removed, repeated or nudged."""
    places = list(_places(value))
    if not places:
        return random.choice(_VALUES)
    holder, key = random.choice(places)
    old, how = holder[key], random.random()
    if how < 0.15:
        del holder[key]
    elif how < 0.25 and isinstance(holder, list):
        holder.insert(key, old)
    elif how < 0.25:
        holder[random.choice(("a", "name", "weights", "x" * 10_000))] = old
    elif how < 0.5 and isinstance(old, int) and not isinstance(old, bool):
        holder[key] = old + random.choice((-1, 1, 8, old, 1000, 2**20))
    elif how < 0.6:
        other, place = random.choice(places)
        holder[key] = json.loads(json.dumps(other[place]))
    elif how < 0.63:
        holder[key] = [old] * 3000
    else:
        holder[key] = random.choice(_VALUES)
    return value


def _places(value: Any) -> Any:
    keys = range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def json_text(value: Any, random: Random) -> bytes:
    """A document as JSON; now and then with what JSON has not, or with a key twice."""
    text = json.dumps(value, separators=(",", ":"))
    how = random.random()
    if how < 0.05:
        text = text.replace(":1", random.choice((":NaN", ":Infinity", ":1e999", ":" + "9" * 5000)), 1)
    elif how < 0.08:
        text = text.replace("{", '{"name":1,"name":2,', 1)
    elif how < 0.1:
        text = text.replace(":", ":" + "[" * 3000, 1)
    return text.encode()


#: What lines of a YAML file are replaced by.
YAML_LINES = (
    *(
        "name: 2024-02-30",
        "name: 2024-02-28",
        "seed: 18446744073709551616",
        "seed: 010",
        "seed: 1:30",
        "task: [1]",
    ),
    *("seed: " + "9" * 5000, "seed: !!int x", "seed: !!python/object/apply:os.system ['true']", "seed: true"),
    *(
        "name: !!binary x",
        "seed: .nan",
        "seed: .inf",
        "name: &a [*a]",
        "<<: 3",
        "<<: [*x]",
        "? [1, 2]\n: 3",
        "? {a: b}",
    ),
    *(
        "seed: !!float x",
        "name: !!timestamp x",
        "name: !!set {a, b}",
        "1: 2",
        "null: 3",
        "true: x",
        "\tname: x",
        "- 1",
    ),
    *(
        "seed: 1\nseed: 2",
        "name: " + "[" * 2000 + "]" * 2000,
        "name: [",
        "...",
        "---\nname: x",
        "%YAML 9.9",
        "@",
        "{}",
    ),
    "a: &a [x,x,x,x,x,x,x,x]\n" + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)),
    *(
        "network: x",
        "network: {name: 3}",
        "data: []",
        "compression: 3",
        "blockwise: 3",
        "options: {width: 1.0e+300}",
    ),
)


def yaml_text(content: bytes, random: Random) -> bytes:
    """A YAML file with one line replaced, indented as it was, repeated or removed."""
    lines = content.decode().split("\n")
    place = random.randrange(len(lines))
    line = lines[place]
    indent = line[: len(line) - len(line.lstrip())]
    how = random.random()
    if how < 0.6:
        lines[place] = "\n".join(indent + part for part in random.choice(YAML_LINES).split("\n"))
    elif how < 0.8 and ":" in line:
        values = ("true", "3", "x", "[1, 2]", "{a: b}", "1e400", "-1", "'3'", "2024-02-30", "!!int z", "~", "1e-3")
        lines[place] = f"{line.partition(':')[0]}: {random.choice(values)}"
    elif how < 0.9:
        lines.insert(place, line)
    else:
        del lines[place]
    text = "\n".join(lines).encode()
    return random.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0")) + text if random.random() < 0.05 else text
