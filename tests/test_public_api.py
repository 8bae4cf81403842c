"""What a user of `import sqs_pyro` sees, and what importing it costs."""

import importlib
import inspect
import subprocess
import sys

import pytest
from kits import forks

import sqs_pyro
from sqs_pyro._moved import MOVED
from sqs_pyro.errors import SQSError

CONTRACT = {  # DESIGN.md, section 4
    "SpikeAndSlab",
    "SpikeGMM",
    "BayesianNetwork",
    "SpikeGMMGuide",
    "SQSELBO",
    "PruningSchedule",
    "compress",
    "pack",
    "save",
    "load",
    "size_report",
}
PUBLIC = sorted(sqs_pyro.__all__)


def own_signature(value) -> inspect.Signature:
    return inspect.signature(value.__init__ if inspect.isclass(value) else value)


def test_the_contract_is_there():
    assert set(PUBLIC) >= CONTRACT
    assert all(hasattr(sqs_pyro, name) for name in PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_is_documented(name):
    value = getattr(sqs_pyro, name)
    assert value.__doc__ and len(value.__doc__.split()) > 5
    assert not value.__doc__.startswith(f"{name}(")  # a dataclass's generated signature is no documentation


@pytest.mark.parametrize("name", PUBLIC)
def test_is_annotated(name):
    value = getattr(sqs_pyro, name)
    signature = own_signature(value)
    unannotated = [
        p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")
    ]
    assert unannotated == []
    assert signature.return_annotation is not signature.empty


@pytest.mark.parametrize("name", [n for n in PUBLIC if inspect.isclass(getattr(sqs_pyro, n))])
def test_public_methods_are_documented_and_annotated(name):
    """Those defined in this package; what Pyro and torch hand down is theirs."""
    for cls in getattr(sqs_pyro, name).__mro__:
        if not cls.__module__.startswith("sqs_pyro"):
            continue
        for attribute, value in vars(cls).items():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if attribute.startswith("_") or not inspect.isfunction(function):
                continue
            assert inspect.getdoc(function), f"{cls.__name__}.{attribute} has no docstring"
            signature = inspect.signature(function)
            assert signature.return_annotation is not signature.empty, f"{cls.__name__}.{attribute}"


def test_arguments_go_by_the_same_names_everywhere():
    parameters = {name: set(own_signature(getattr(sqs_pyro, name)).parameters) for name in PUBLIC}
    assert {"num_components", "temperature", "windows"} <= parameters["SpikeGMMGuide"]
    assert {"gates", "loc", "scale", "responsibilities", "logits", "temperature"} <= parameters["SpikeGMM"]
    assert {"net", "prior", "likelihood", "num_data", "include", "exclude"} <= parameters["BayesianNetwork"]
    assert {"kl", "kl_weight", "num_particles"} <= parameters["SQSELBO"]
    assert {"inclusion", "slab"} <= parameters["SpikeAndSlab"]
    assert "net" in parameters["compress"] and {"train_loader", "recipe"} <= parameters["compress"]
    every = set().union(*parameters.values())
    assert not every & {"n_components", "K", "tau", "N", "dataset_size", "lr"}


def test_errors_are_one_family():
    from sqs_pyro import errors

    for value in vars(errors).values():
        if inspect.isclass(value) and value is not SQSError:
            assert issubclass(value, SQSError) and value.__doc__


@pytest.mark.parametrize("old", MOVED)
def test_modules_that_moved_are_found_by_their_old_names(old):
    with pytest.warns(FutureWarning, match=f"sqs_pyro.{old} is sqs_pyro.{MOVED[old]} now"):
        module = importlib.import_module(f"sqs_pyro.{old}")
    assert module is importlib.import_module(f"sqs_pyro.{MOVED[old]}")
    del sys.modules[f"sqs_pyro.{old}"]  # the next import warns again


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_import_is_light_quiet_and_touches_no_gpu():
    found = run_python(
        "import warnings; warnings.filterwarnings('ignore', category=DeprecationWarning)\n"
        "import sys, logging, torch, random\n"
        "state, handlers = torch.get_rng_state(), len(logging.getLogger().handlers)\n"
        "threads = torch.get_num_threads()\n"
        "import sqs_pyro\n"
        "heavy = {'transformers', 'accelerate', 'torchmetrics', 'sklearn', 'matplotlib', 'torchvision', 'typer'}\n"
        "heavy |= {'scipy.optimize', 'scipy.stats'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert torch.equal(state, torch.get_rng_state())\n"
        "assert len(logging.getLogger().handlers) == handlers\n"
        "assert torch.get_num_threads() == threads\n"
        "import pyro; assert list(pyro.get_param_store()) == []\n"
    )
    assert found == ""


def test_torchvision_imports_after_it():
    """Its compiled extension may not fit the installed torch; models must work all the same."""
    done = forks.run(
        "import sqs_pyro, torch\n"
        "from torchvision.models import shufflenet_v2_x0_5\n"
        "print(tuple(shufflenet_v2_x0_5(num_classes=3).eval()(torch.zeros(1, 3, 32, 32)).shape))\n"
    )
    assert (done.stdout, done.stderr) == ("(1, 3)\n", "")
