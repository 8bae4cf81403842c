"""What is told of a machine is so: with a compiler and without, with packages and without."""

import importlib.util
import json

import pytest
from typer.testing import CliRunner

from sqs_pyro import compiling
from sqs_pyro.cli import app
from sqs_pyro.extras import EXTRAS
from sqs_pyro.kernels import native
from sqs_pyro.runs.front.doctor import examine


def found(checks):
    return {check["what"]: check for check in checks["checks"]}


@pytest.fixture
def nothing(monkeypatch, tmp_path):
    """A machine without compiler, optional packages and data."""
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in EXTRAS else there(name))
    monkeypatch.setenv("SQS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    native.native_kernels.cache_clear()
    yield
    native.native_kernels.cache_clear()


def test_a_machine_that_has_nothing(nothing):
    checks = found(examine())
    assert not checks["C++ compiler"]["good"] and "install g++" in checks["C++ compiler"]["follows"]
    assert not checks["CPU kernels"]["good"] and "could not be compiled" in checks["CPU kernels"]["found"]
    for extra in set(EXTRAS.values()):
        check = checks[f"extra {extra}"]
        assert not check["good"] and check["follows"] == f"pip install 'sqs-pyro[{extra}]'"
    assert not checks["cifar10"]["good"] and checks["cifar10"]["follows"].endswith(".")
    assert checks["cache"]["found"].endswith("cache, 0.0 MB")


def test_this_machine():
    checks = found(examine())
    assert checks["CPU kernels"]["good"] == all(native.native_kernels(form) for form in native.SOURCES)
    if checks["CPU kernels"]["good"]:
        ways = {"a matrix unit", "products of pairs", "float32"}
        assert native.bfloat16_products() in ways
        assert checks["CPU kernels"]["follows"].endswith(native.bfloat16_products())
        flags = checks["instructions"]["found"]
        assert native.bfloat16_products() == "float32" or "AVX-512" in flags
    for extra in set(EXTRAS.values()):
        missing = [p for p, of in EXTRAS.items() if of == extra and importlib.util.find_spec(p) is None]
        assert checks[f"extra {extra}"]["good"] == (not missing)


def test_the_command_prints_a_row_a_check():
    document = CliRunner().invoke(app, ["doctor", "--json"])
    assert document.exit_code == 0 and {"machine", "versions", "checks"} == json.loads(document.stdout).keys()
    table = CliRunner().invoke(app, ["doctor"])
    assert all(check["what"] in table.stdout for check in json.loads(document.stdout)["checks"])
