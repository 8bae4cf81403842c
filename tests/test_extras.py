"""What is missing is told in one sentence with the line that installs it, by a process that has not got it."""

import re
import tomllib
from pathlib import Path

import pytest
from kits import forks

from sqs_pyro.errors import MissingPackageError, SQSError
from sqs_pyro.extras import EXTRAS, needed_for

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL = PROJECT["optional-dependencies"]
#: What brings a package, where the name is not that of the import.
DISTRIBUTIONS = {
    "compressed_tensors": "compressed-tensors",
    "laplace": "laplace-torch",
    "lm_eval": "lm-eval",
    "onnx_ir": "onnxscript",
    "PIL": "torchvision",
    "sklearn": "scikit-learn",
}

WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({missing!r}))  # as if they were not installed
sys.argv = {argv!r}
{code}
"""
COMMAND = "import runpy; runpy.run_module('sqs_pyro', run_name='__main__')"


def without(missing: list[str], code: str, *arguments: object) -> forks.Ended:
    return forks.run(WITHOUT.format(missing=missing, argv=["sqs", *map(str, arguments)], code=code))


def distributions(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def test_every_optional_package_is_in_its_extra():
    for package, extra in EXTRAS.items():
        assert DISTRIBUTIONS.get(package, package) in distributions(OPTIONAL[extra]), package


def test_the_whole_is_every_extra_that_users_need():
    whole = set(re.findall(r"[\w-]+", OPTIONAL["all"][0].partition("[")[2]))
    others = {
        "all",
        "dev",
        "docs",
        "testing",
        "peers",
        "loggers",
        "torchao",
        "executorch",
    }  # the last four: to compare with, with servers, what transformers would import unasked, and what brings that
    assert whole == {*OPTIONAL} - others == {*EXTRAS.values()} - others


def test_the_quickstart_tells_every_extra():
    section = (
        (ROOT / "docs/quickstart.md").read_text(encoding="utf-8").partition("\n## Extras")[2].partition("\n## ")[0]
    )
    assert {*re.findall(r"^\| `([\w-]+)`", section, re.MULTILINE)} == {*OPTIONAL} - {"dev", "docs", "testing"}


def test_nothing_optional_is_required():
    assert not distributions(PROJECT["dependencies"]) & {DISTRIBUTIONS.get(name, name) for name in EXTRAS}


def test_the_library_needs_nothing_optional(tmp_path):
    code = """
import torch
import sqs_pyro
net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(0, 3, (64,)))
loader = torch.utils.data.DataLoader(data, batch_size=16)
result = sqs_pyro.compress(net, loader, {"epochs": 1, "num_components": 4}, validation=loader)
path = sys.argv[1]
sqs_pyro.save(result.network, path)
print(result, sqs_pyro.size_report(path), sqs_pyro.load(path, net)(torch.randn(2, 8)).shape)
print(sqs_pyro.elbo_report(result.model, result.guide, *next(iter(loader))))
"""
    done = without([*EXTRAS], code, tmp_path / "packed.safetensors")
    assert done.returncode == 0, done.stderr
    assert "ratio of the whole file" in done.stdout


@pytest.mark.parametrize(
    ("package", "extra", "arguments"),
    [
        ("typer", "cli", ["--help"]),
        ("matplotlib", "plots", ["compress", "recipes/digits.yaml"]),
        ("matplotlib", "plots", ["compare", "recipes/compare_priors.yaml"]),
        ("sklearn", "vision", ["compress", "recipes/digits.yaml"]),
        ("transformers", "transformers", ["plan", "anywhere"]),
    ],
)
def test_commands_say_what_they_need(package, extra, arguments, tmp_path):
    out = [] if arguments[0] in ("--help", "plan") else ["--out", tmp_path / "out"]
    done = without([package], COMMAND, *arguments, *out)
    assert done.returncode == 2 and done.stdout == ""
    said = f"need the package '{package}', which is not installed: pip install 'sqs-pyro[{extra}]'.\n"
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert not list(tmp_path.iterdir())  # before anything is done


@pytest.mark.parametrize(
    ("package", "extra", "call"),
    [
        ("matplotlib", "plots", "import sqs_pyro.reporting.plots"),
        ("matplotlib", "plots", "import sqs_pyro.reporting.bounds_plot"),
        ("sklearn", "vision", "from sqs_pyro.data import *; load_data(DataRecipe(name='digits'))"),
        ("torchvision", "vision", "from sqs_pyro.networks.registry import *; build_network('resnet18')"),
        ("transformers", "transformers", "import sqs_pyro; sqs_pyro.from_pretrained('anywhere')"),
    ],
)
def test_calls_say_what_they_need(package, extra, call):
    code = (
        f"import sqs_pyro\ntry:\n    {call}\nexcept ImportError as error:\n    print(type(error).__name__, error)"
    )
    done = without([package], code)
    assert done.returncode == 0, done.stderr
    said = f"need the package '{package}', which is not installed: pip install 'sqs-pyro[{extra}]'.\n"
    assert done.stdout.startswith("MissingPackageError ") and said in done.stdout


def test_what_else_would_do_is_said():
    sentence = r"pip install 'sqs-pyro\[text\]', or give a file\.$"
    with pytest.raises(MissingPackageError, match=sentence), needed_for("Data sets", otherwise="give a file"):
        raise ModuleNotFoundError("none", name="datasets.load")


def test_another_version_is_not_called_missing():
    sentence = r"'onnx', but another version of it \(cannot import name 'x'\): pip install"
    with pytest.raises(SQSError, match=sentence), needed_for("ONNX models"):
        raise ImportError("cannot import name 'x'", name="onnx.helper")


def test_other_errors_keep_their_own_words():
    with pytest.raises(ModuleNotFoundError, match="broken"), needed_for("Pictures"):
        raise ModuleNotFoundError("broken", name="matplotlib_of_another")
