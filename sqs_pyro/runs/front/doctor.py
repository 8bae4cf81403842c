"""What a machine has of all that makes packed networks fast and commands complete, and what follows from it."""

import importlib.util
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sqs_pyro.compiling import KernelWarning, cache_directory, compiler
from sqs_pyro.data import DataRecipe, load_data
from sqs_pyro.errors import DataError, MissingPackageError
from sqs_pyro.extras import EXTRAS
from sqs_pyro.kernels.native import SOURCES, bfloat16_products, native_kernels
from sqs_pyro.kernels.processor import multiplies_bfloat16
from sqs_pyro.runs.bookkeeping import machine, versions

_WIDEST = (
    ("avx512f", "AVX-512", "packed products take the widest kernels"),
    ("avx2", "AVX2", "packed products take kernels half as wide as AVX-512's"),
)


@dataclass(frozen=True)
class Check:
    """One thing that was looked for.

    Attributes:
        what: it is.
        found: in a few words.
        good: whether nothing is to be done.
        follows: what that means, and if something is missing, what brings it.
    """

    what: str
    found: str
    good: bool
    follows: str


def examine() -> dict[str, Any]:
    """Look over this machine; CPU kernels are compiled if they are not there yet.

    Returns:
        ``machine``, ``versions`` and ``checks``, each with the attributes of :class:`Check`.
    """
    checks = [_compiler(), _kernels(), _instructions(), _bfloat16(), _gpu(), *_packages(), *_data(), _cache()]
    return {"machine": machine(), "versions": versions(), "checks": [asdict(check) for check in checks]}


def _compiler() -> Check:
    try:
        command = compiler()
    except RuntimeError as error:
        return Check(
            "C++ compiler", str(error), False, "no CPU kernels, no torch.compile: install g++ 11 or newer"
        )
    return Check("C++ compiler", command[0], True, "CPU kernels and torch.compile")


def _kernels() -> Check:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", KernelWarning)
        good = all(native_kernels(form) for form in SOURCES)
    if good:
        follows = f"packed networks multiply from their codes, bfloat16 by {bfloat16_products()}"
        return Check("CPU kernels", "compiled", True, follows)
    said = next((str(each.message) for each in told if issubclass(each.category, KernelWarning)), "left out")
    return Check("CPU kernels", said, False, "packed networks decode their weights: slower, and larger in memory")


def _instructions() -> Check:
    there = machine()["instructions"]
    for flag, name, follows in _WIDEST:
        if flag in there:
            return Check("instructions", name, True, follows)
    return Check("instructions", "neither AVX-512 nor AVX2", True, "packed products take portable kernels")


def _bfloat16() -> Check:
    if multiplies_bfloat16(torch.device("cpu")):
        return Check("bfloat16", "by instructions", True, "training may use it on the CPU")
    return Check("bfloat16", "no instructions", True, "train in float32 on the CPU: it is ten times as fast")


def _gpu() -> Check:
    if not torch.cuda.is_available():
        return Check("GPU", "torch sees none", True, "everything runs on the CPU")
    name = torch.cuda.get_device_properties(torch.cuda.current_device()).name
    if importlib.util.find_spec("triton") is None and shutil.which("nvcc") is None:
        return Check("GPU", name, False, "packed networks decode their weights there: install triton")
    return Check("GPU", name, True, "packed products take kernels of CUDA or Triton")


def _packages() -> Iterator[Check]:
    for extra in dict.fromkeys(EXTRAS.values()):
        packages = [package for package, of in EXTRAS.items() if of == extra]
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        follows = f"pip install 'sqs-pyro[{extra}]'" if missing else ""
        found = f"without {', '.join(missing)}" if missing else "installed"
        yield Check(f"extra {extra}", found, not missing, follows)


def _data() -> Iterator[Check]:
    for name in ("fashion_mnist", "cifar10", "cifar100"):
        try:
            found = len(load_data(DataRecipe(name=name)).train.dataset)
        except (DataError, MissingPackageError) as error:
            yield Check(name, "not found", False, str(error))
        else:
            yield Check(name, f"{found:,} images to train on", True, "")


def _cache() -> Check:
    directory = cache_directory()
    size = sum(file.stat().st_size for file in directory.glob("*") if file.is_file()) if directory.is_dir() else 0
    return Check(
        "cache", f"{directory}, {size / 1e6:.1f} MB", True, "compiled kernels; SQS_CACHE names another place"
    )
