"""`sqs compress` of a language model where torchrun has started several: one file, from one rank that leads."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
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


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory) -> Path:
    """What one rank has written."""
    return run_of(1, recipe, tmp_path_factory.mktemp("alone") / "run")


def run_of(size: int, recipe: Path, out: Path) -> Path:
    ended = command(size, "compress", recipe, "--out", out)
    assert not any(each.returncode for each in ended), "\n".join(each.stderr[-2000:] for each in ended)
    assert not any(each.stdout for each in ended[1:])
    assert "perplexity" in ended[0].stdout
    return out


def test_a_run_is_the_same(recipe: Path, alone: Path, tmp_path: Path):
    shared = run_of(2, recipe, tmp_path / "run")
    one, two = ((place / "packed.safetensors").read_bytes() for place in (alone, shared))
    assert one == two
    found = [json.loads((place / "metrics.json").read_text()) for place in (alone, shared)]
    for key in ("baseline", "compressed", "search", "size"):
        assert found[0][key] == found[1][key]


def ranks_of(torchrun: int) -> list[int]:
    """The processes that torchrun has started to compress, by what Linux tells of all processes."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end meanwhile
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == torchrun and b"sqs_pyro" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are found in /proc")
def test_ranks_of_torchrun_that_are_killed(recipe: Path, alone: Path, tmp_path: Path):
    """Each time a random one, at a random moment behind the next file that is kept."""
    chance, out = random.Random(0), tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    sqs = [*torchrun, "-m", "sqs_pyro", "compress", str(recipe), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(3):
        before = len(list(tmp_path.rglob("*.pt")))
        with (tmp_path / "said").open("w") as said:
            started = subprocess.Popen(sqs, env=environment, stdout=said, stderr=said)
        while started.poll() is None and len(list(tmp_path.rglob("*.pt"))) <= before:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        os.kill(chance.choice(ranks_of(started.pid)), signal.SIGKILL)
        assert started.wait(60) != 0  # the other one has not waited for it
        assert "SIGKILL" in (tmp_path / "said").read_text()
    assert not (out / "packed.safetensors").exists()
    ended = subprocess.run(sqs, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert (out / "packed.safetensors").read_bytes() == (alone / "packed.safetensors").read_bytes()


def test_more_ranks_than_units(recipe: Path, tmp_path: Path):
    for each in command(2, "compress", recipe, "--out", tmp_path / "run", "--set", "blockwise.units=1"):
        assert each.returncode == 2
        assert each.stderr.startswith("error: 2 ranks share the 1 unit of blockwise.units: start as many, or set")
    assert not list(tmp_path.iterdir())
