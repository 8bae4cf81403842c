"""`sqs compress` on ranks: one writes, all compute, and what they cannot share is refused."""

from pathlib import Path

import pytest
from kits.ranks import run_on_ranks, start_ranks

COMMAND = """
import sys
from sqs_pyro.cli import main

sys.argv[0] = "sqs"
main()
"""
RECIPE = """
network: {name: digits_net}
data: {name: digits, batch_size: 256}
baseline: {epochs: 1}
bounds: null
compression: {epochs: 2, num_components: 4, batch_norm_batches: 2, shards: 3}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_more_ranks_than_shards_are_refused_before_anything_is_written(recipe: Path):
    command = ["compress", recipe, "--out", recipe.with_name("run"), "--set", "compression.shards=1"]
    for each in [started.wait() for started in start_ranks(2, COMMAND, *command)]:
        assert each.returncode == 2
        assert each.stderr.startswith("error: 2 ranks share the 1 unit of compression.shards: start as many, or")
    assert list(recipe.parent.iterdir()) == [recipe]


def test_other_commands_are_refused(recipe: Path):
    for each in [started.wait() for started in start_ranks(2, COMMAND, "inspect", recipe)]:
        assert each.returncode == 2
        assert each.stderr.startswith(
            "error: 2 processes of this command were started by torchrun (WORLD_SIZE), but"
        )


@pytest.mark.slow
def test_the_file_is_that_of_one_and_one_writes(recipe: Path):
    files = []
    for size in (1, 2):
        place = recipe.with_name(f"on {size}")
        _, *others = run_on_ranks(size, COMMAND, "compress", recipe, "--out", place, "--baselines", f"{place}/..")
        assert not any(others)
        assert not list(recipe.parent.glob("*.partial"))
        files.append((place / "packed.safetensors").read_bytes())
    assert files[0] == files[1]
