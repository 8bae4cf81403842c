"""The method is known to transformers whichever library is imported first, at no cost for those who have none."""

import importlib
import sys
from pathlib import Path

import pytest
from kits import forks
from kits.tiny_transformers import packed_tiny

from sqs_pyro.integrations import save_pretrained
from sqs_pyro.integrations.post_import import after_import

QUIET = (
    "import sys, warnings\n"
    "warnings.simplefilter('error')\n"
    "warnings.filterwarnings('ignore', category=DeprecationWarning)\n"
)
LOAD = (
    "net = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
    "print(type(net.model.layers[0].self_attn.q_proj).__name__)\n"
)


def run(code: str, *arguments: object) -> str:
    done = forks.run(QUIET + code, *arguments, imported=forks.UNDER_TRANSFORMERS)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    save_pretrained(packed_tiny("llama"), directory)
    return directory


@pytest.mark.parametrize(
    "imports",
    [
        "import sqs_pyro\nfrom transformers import AutoModelForCausalLM\n",
        "from transformers import AutoModelForCausalLM\nimport sqs_pyro\n",
        pytest.param(
            "import transformers.quantizers.auto, sqs_pyro\nfrom transformers import AutoModelForCausalLM\n",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "import sqs_pyro.packing\nfrom transformers import AutoModelForCausalLM\n", marks=pytest.mark.slow
        ),
    ],
)
def test_either_order(imports, checkpoint):
    assert run(imports + LOAD, checkpoint) == "PackedLinear\n"


@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModel", "LlamaForCausalLM"])
def test_without_us_a_checkpoint_is_refused_and_not_drawn_at_random(auto, checkpoint, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from transformers.quantizers import auto as known

    for methods in (known.AUTO_QUANTIZATION_CONFIG_MAPPING, known.AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(methods, "sqs")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        getattr(transformers, auto).from_pretrained(checkpoint)


def test_our_own_function_needs_no_import_of_transformers(checkpoint):
    code = (
        "import sqs_pyro\nassert 'transformers' not in sys.modules\n"
        "print(type(sqs_pyro.from_pretrained(sys.argv[1])).__name__)\n"
    )
    assert run(code, checkpoint) == "LlamaForCausalLM\n"


def test_without_transformers():
    code = (
        "sys.modules['transformers'] = None  # as if it were not installed\n"
        "import sqs_pyro\n"
        "from sqs_pyro.integrations import save_pretrained\n"
        "for function in (sqs_pyro.from_pretrained, lambda path: save_pretrained(None, path)):\n"
        "    try: function('somewhere')\n"
        "    except ModuleNotFoundError as error: print(error)\n"
    )
    said = run(code).splitlines()
    assert len(said) == 2
    assert {*said} == {
        "Hugging Face checkpoints need the package 'transformers', which is not installed: "
        "pip install 'sqs-pyro[transformers]'."
    }


def test_a_release_that_is_too_old_still_works(tmp_path):
    """Registration fails with a warning, not with an error in somebody else's import."""
    package = tmp_path / "transformers"
    (package / "quantizers").mkdir(parents=True)
    for name in ("__init__.py", "quantizers/__init__.py", "quantizers/auto.py"):
        (package / name).write_text("")
    code = (
        "sys.path.insert(0, sys.argv[1])\n"
        "import sqs_pyro\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import transformers.quantizers.auto\n"
        "print(*[warning.message for warning in caught])\n"
    )
    assert "install transformers 5 or later" in run(code, tmp_path)


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "watched_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    yield "watched_module"
    sys.modules.pop("watched_module", None)
    sys.meta_path[:] = before


def test_an_action_waits_for_the_module_and_runs_once(module):
    seen = []
    finders = len(sys.meta_path)
    after_import(module, lambda: seen.append(sys.modules[module].value))
    assert not seen
    imported = importlib.import_module(module)
    assert seen == [1] and len(sys.meta_path) == finders
    assert Path(imported.__file__).read_text() == imported.__loader__.get_source(module)
    importlib.reload(imported)
    assert seen == [1]


def test_an_action_for_a_module_that_is_there_runs_at_once(module):
    importlib.import_module(module)
    seen = []
    after_import(module, lambda: seen.append(1))
    assert seen == [1]


def test_two_actions_for_one_module(module):
    seen = []
    for number in (1, 2):
        after_import(module, lambda number=number: seen.append(number))
    importlib.import_module(module)
    assert sorted(seen) == [1, 2]


def test_a_module_that_fails_is_tried_again(module, tmp_path):
    path, seen = tmp_path / f"{module}.py", []
    after_import(module, lambda: seen.append(1))
    path.write_text("raise ValueError('no')\n")
    with pytest.raises(ValueError, match="no"):
        importlib.import_module(module)
    assert seen == []
    path.write_text("value = 22\n")
    importlib.invalidate_caches()
    importlib.import_module(module)
    assert seen == [1]


def test_a_module_that_is_not_there(module):
    after_import("not_a_module_at_all", lambda: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("not_a_module_at_all")
