"""`sqs compress` of a language model where torchrun has started several: one file, from one rank that leads."""

import json
from pathlib import Path

import pytest
import yaml
from kits.language_checkpoint import recipe_values
from kits.ranks import TRANSFORMERS, start_ranks

pytestmark = pytest.mark.slow  # the command is imported anew, where nothing has run yet

COMMAND = """
import sys
from kits.pictures import blank
from sqs_pyro.cli import main

sys.argv = ["sqs", *sys.argv[1:]]
with blank():
    main()
"""


def command(size: int, *arguments: object):
    started = start_ranks(size, COMMAND, *arguments, imported=f"{TRANSFORMERS}, sqs_pyro.cli")
    return [each.wait() for each in started]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("recipe")
    values = recipe_values(directory) | {"search": {"points": 100, "attempts": 2}}
    values["evaluation"]["tokens"] = 100
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_run_is_the_same(recipe: Path, tmp_path: Path):
    found = {}
    for size in (1, 2):
        ended = command(size, "compress", recipe, "--out", tmp_path / str(size))
        assert not any(each.returncode for each in ended), "\n".join(each.stderr[-2000:] for each in ended)
        assert not any(each.stdout for each in ended[1:])
        assert "perplexity" in ended[0].stdout
        found[size] = json.loads((tmp_path / str(size) / "metrics.json").read_text())
    one, two = ((tmp_path / name / "packed.safetensors").read_bytes() for name in "12")
    assert one == two
    for key in ("baseline", "compressed", "search", "size"):
        assert found[1][key] == found[2][key]


def test_more_ranks_than_units(recipe: Path, tmp_path: Path):
    for each in command(2, "compress", recipe, "--out", tmp_path / "run", "--set", "blockwise.units=1"):
        assert each.returncode == 2
        assert each.stderr.startswith("error: 2 ranks share the 1 unit of blockwise.units: start as many, or set")
    assert not list(tmp_path.iterdir())
