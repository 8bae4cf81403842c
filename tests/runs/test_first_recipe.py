"""`sqs init`: what was asked for, with a comment above each key, is a recipe that says just that."""

import re

import pytest
from typer.testing import CliRunner

from sqs_pyro import cli
from sqs_pyro.cli import compressing
from sqs_pyro.recipes import meanings
from sqs_pyro.runs.front.asked import asked_recipe
from sqs_pyro.runs.front.first_recipe import FIRST_CHANGED, commented
from sqs_pyro.runs.kinds import load_any_recipe
from sqs_pyro.runs.recipe import Goal, RunRecipe


def sqs(*arguments, **options):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], **options)


@pytest.mark.parametrize(
    ("network", "data", "options"),
    [
        ("resnet20", "fashion_mnist", {}),
        ("nets.py:net", "a: b.csv", {"task": "regression"}),
        ("timm/vit_tiny", "mine:load", {"trained": True, "changes": ["data.options.deep={a: [1, x]}"]}),
    ],
)
def test_written_and_read_it_is_the_same_recipe(network, data, options, tmp_path):
    recipe = asked_recipe(network, data, Goal(ratio=20), **options)
    text = commented(recipe)
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_any_recipe(tmp_path / "recipe.yaml") == recipe
    # A comment above every key, and the keys that people change first.
    lines = text.splitlines()
    for line, before in zip(lines[1:], lines, strict=False):
        assert line.lstrip().startswith("#") or before.lstrip().startswith("#"), line
    assert max(map(len, lines)) <= 115
    trains = recipe.baseline.trained is False
    assert ("\n  learning_rate: 0.1" in text) == trains and "\n  learning_rate: 0.02" in text


def test_keys_that_are_changed_first_are_keys():
    for name, keys in FIRST_CHANGED.items():
        section = RunRecipe if not name else RunRecipe.model_fields[name].annotation
        assert {*keys} <= section.model_fields.keys() and {*keys} <= meanings(section).keys()


def test_questions_are_asked_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = sqs("init", "--network", "resnet20")
    assert refused.exit_code == 2 and "no terminal to ask on: give --data" in refused.stderr

    monkeypatch.setattr(compressing, "_has_terminal", lambda: True)
    answered = sqs("init", input="resnet20\nfashion_mnist\n12\n")
    assert answered.exit_code == 0, answered.output
    assert len(re.findall(r"Network|Data|How many", answered.stderr)) == 3 and "Network" not in answered.stdout
    assert load_any_recipe("recipe.yaml") == asked_recipe("resnet20", "fashion_mnist", Goal(ratio=12))
    again = sqs("init", "--network", "resnet20", "--data", "digits", "--ratio", 3)
    assert again.exit_code == 2 and "'recipe.yaml' is there already" in again.stderr
