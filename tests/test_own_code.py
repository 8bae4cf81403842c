"""Functions by name: found where users have them, refused in a sentence where they are not."""

import sys

import pytest

from sqs_pyro.errors import RecipeError
from sqs_pyro.own_code import is_own, own_function

CODE = """
from neighbour_of_own import base

class Maker:
    @staticmethod
    def made(a=1):
        return base() + a

def made(a=1):
    return base() + a

number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "neighbour_of_own.py").write_text("def base():\n    return 40\n")
    (tmp_path / "own_of_a_test.py").write_text(CODE)
    (tmp_path / "broken_of_a_test.py").write_text("1 / 0\n")
    (tmp_path / "needy_of_a_test.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield tmp_path
    assert sys.path == before
    for name in [name for name in sys.modules if "_of_own" in name or "_of_a_test" in name]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["own_of_a_test:made", "own_of_a_test.py:made", "./own_of_a_test.py:Maker.made"])
def test_modules_and_files_are_found_beside_the_user(here, name):
    assert is_own(name) and own_function(name, "Network")(a=2) == 42


def test_a_file_is_one_module_wherever_it_is_named_from(here, monkeypatch):
    first = own_function("own_of_a_test.py:made", "Network")
    monkeypatch.chdir(here.parent)
    assert own_function(f"{here}/own_of_a_test.py:made", "Network") is first


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("own_of_a_test:mode", "has no 'mode'; did you mean 'made'"),
        ("own_of_a_test:zzz", "has no 'zzz'; correct the name"),
        ("own_of_a_test:number", "is 3, which cannot be called"),
        ("own_of_a_test:", "does not name a function: give module:function"),
        (":made", "does not name a function"),
        ("nowhere_at_all:made", "names a module that is not there"),
        ("nowhere.py:made", "'nowhere.py' is not there"),
        ("broken_of_a_test:made", r"cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("broken_of_a_test.py:made", r"cannot be imported \(ZeroDivisionError"),
        ("needy_of_a_test:made", "cannot be imported .*a_package_that_nobody_has.*: install it"),
    ],
)
def test_what_is_refused(here, name, sentence):
    with pytest.raises(RecipeError, match=sentence) as refused:
        own_function(name, "Network")
    assert "\n" not in str(refused.value)


def test_known_names_are_no_code():
    assert not is_own("resnet20") and not is_own("torchvision/mobilenet_v3_small")
