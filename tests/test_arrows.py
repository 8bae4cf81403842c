"""Rooms import in one direction, and what is private to a module stays in it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "sqs_pyro").rglob("*.py"))


@pytest.mark.slow  # `make lint` says the same, and comes first
def test_arrows():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def foreign_private_names(tree: ast.Module) -> list[str]:
    """Names with an underscore that a module takes from another one of the library, by import or by attribute."""
    ours, found = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "sqs_pyro":
            ours |= {alias.asname or alias.name for alias in node.names}
            found += [
                f"line {node.lineno}: {node.module}.{alias.name}"
                for alias in node.names
                if _private(alias.name)
                and node.module != "sqs_pyro"  # import order: `from sqs_pyro import _command`
            ]
    found += [
        f"line {node.lineno}: {node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id in ours and _private(node.attr)
    ]
    return found


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_private_name_of_another_module():
    found = {str(path.relative_to(ROOT)): foreign_private_names(ast.parse(path.read_text())) for path in MODULES}
    assert {path: names for path, names in found.items() if names} == {}


def test_private_names_are_found():
    taken = "from sqs_pyro.data import load as loading, _rows\nloading._first()\nself._own()\n"
    assert foreign_private_names(ast.parse(taken)) == ["line 1: sqs_pyro.data._rows", "line 2: loading._first"]


def test_only_the_registry_asks_what_kind_a_recipe_is():
    asked = re.compile(r"isinstance\([^)]*Recipe\b")
    assert [path.name for path in MODULES if asked.search(path.read_text())] == []
    assert all(len(list((ROOT / "sqs_pyro" / room).glob("*.py"))) <= 15 for room in ("runs", "inference"))
