"""JSON and YAML of any content: plain data, or one sentence."""

import json

import pytest
from fuzz.mutations import deep

from sqs_pyro.documents import parse_json, parse_yaml, read_json_object, read_yaml, shown
from sqs_pyro.errors import OutputError, RecipeError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("day: 2024-02-30", {"day": "2024-02-30"}),
        ("rate: 1e-3", {"rate": 1e-3}),
        ("[1_000, 010, +7, -2]", [1000, 10, 7, -2]),
        ("[1.5, .5, 1., -.inf, 1e3, 0.1e+2]", [1.5, 0.5, 1.0, float("-inf"), 1000.0, 10.0]),
        ("[1:30, 0x10, 1.2.3, e3, '3']", ["1:30", "0x10", "1.2.3", "e3", "3"]),
        ("[true, off, ~]", [True, False, None]),
        ("a: &a {b: 1}\nc: {<<: *a, d: 2}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
        ("", None),
    ],
)
def test_what_yaml_says(text, value):
    assert parse_yaml(text, "It") == value


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "\n".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]"
    for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: !!int x", "'x' is no value of the kind !!int, line 2, column 4"),
        ("a: !!timestamp x", "'x' is no value of the kind !!timestamp, line 1"),
        ("a: " + "9" * 5000, "is no value of the kind !!int, line 1"),
        ("a: !!python/object/apply:os.getpid []", "could not determine a constructor"),
        ("a: 1\na: 2", "'a' is given twice, again in line 2"),
        ("[" * 2000, "nested more than 64 deep, line 1"),
        ("&a [*a]", "an alias stands inside of what it means, line 1"),
        (BOMB, "stand for more than 100,000 values"),
        ("? [1]\n: 2", "a key is a list or a mapping, line 1"),
        ("a:\n\tb: 1", "cannot start any token, line 2"),
        ("a: \x00", "unacceptable character"),
    ],
)
def test_what_yaml_may_not_say(text, sentence):
    with pytest.raises(RecipeError, match=f"^.*{sentence}") as error:
        parse_yaml(text, "It")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("name: x".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (b"\x89PNG\xff", "is no text"),
        (b"#" * (1 << 19), "more than the 262,144 bytes"),
    ],
)
def test_what_is_no_recipe(content, sentence, tmp_path):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=sentence):
        read_yaml(tmp_path / "a.yaml")


def test_a_byte_order_mark_is_left_out(tmp_path):
    (tmp_path / "a.yaml").write_text("name: x", encoding="utf-8-sig")
    assert read_yaml(tmp_path / "a.yaml") == {"name": "x"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", r"It is no JSON \(.*line 1, column 2\): write it anew"),
        ('{"a": NaN}', "has the number NaN, which is not finite"),
        ('{"a": ' + "9" * 5000 + "}", "has a number of 5000 digits"),
        ('{"a": 1, "a": 2}', "has the key 'a' twice"),
        ("[" * 10**5, "nested more than 64 deep"),
        (json.dumps(deep(65)), "nested more than 64 deep"),
        (b'"\xff"', "byte 1 is not UTF-8"),
    ],
)
def test_what_json_may_not_say(text, sentence):
    with pytest.raises(OutputError, match=sentence):
        parse_json(text, OutputError, "It", "write it anew")


def test_an_object_is_needed(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(OutputError, match=r"holds a list, but should hold an object: write it anew\."):
        read_json_object(tmp_path / "a.json", OutputError, "write it anew")


def test_messages_show_the_beginning():
    for value in ("x" * 10**6, [0] * 10**6, {"a": ["y" * 10**6] * 10}, deep(900), 10**5000):
        assert len(shown(value)) <= 200


def test_short_values_are_shown_whole():
    value = {"a": [1, "b", None], "c": {"d": (2.5, True)}}
    assert shown(value) == repr(value)
