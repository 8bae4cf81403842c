"""A small share of the fuzzers; `make fuzz` runs all of them."""

import json

from kits import forks

from fuzz.kinds import KINDS


def test_damaged_files_are_refused_in_one_sentence_or_read_right(tmp_path):
    """In a process of its own, which forks: threads and kernels of this one stay out of it."""
    fuzz = "import runpy; runpy.run_module('fuzz', run_name='__main__')"
    options = ["--cases", 20, "--seed", 1, "--out", tmp_path / "found.json"]
    done = forks.run(fuzz, *options, environment={"SQS_KERNELS": "reference", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == [kind.name for kind in KINDS]
    for name, each in found.items():
        assert sum(each["counts"].values()) == 20, name
        assert each["counts"].get("refused", 0) + each["counts"].get("right", 0) > 0, name
