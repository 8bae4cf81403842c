"""AOTInductor packages: a network that runs on its codes without our Python, or without any."""

import copy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from sqs_pyro.atomic import merging
from sqs_pyro.errors import NetworkError
from sqs_pyro.exporting.exported import Exported, check_one_network
from sqs_pyro.exporting.suffixes import check_suffix
from sqs_pyro.exporting.trace import NETWORK, input_tensors, one_sentence, trace
from sqs_pyro.kernels.native import DECLARATIONS, compiled_kernels, has_native_kernel
from sqs_pyro.kernels.placing import unpack_weights
from sqs_pyro.packing.stored import StoredWeight, stored_weights

PACKAGE, RUNNER, CPP_RUNNER = "model.pt2", "run.py", "run.cpp"


def export_aoti(packed: nn.Module, inputs: Any, directory: str | Path) -> Exported:
    """Compile a packed network for this machine's CPU, into a directory that needs nothing but PyTorch.

    It holds the package ``model.pt2``, the operators that it calls, ``libsqs_<form>.so`` of each form of weights
    in it beside what declares them, and two programs that load all: ``run.py``, which needs only torch, and
    ``run.cpp``, which needs no Python. Weights whose operators have no compiled kernel are decoded first.

    Args:
        packed: a packed network on the CPU.
        inputs: an example of a minibatch, two rows or more; the batch stays dynamic.
        directory: made if it is missing; other files in it stay.

    Returns:
        Which parameters the package calls an operator for, and which it has as numbers.

    Raises:
        NetworkError: an ensemble, a network that cannot be traced or compiled, or no compiler.
        OutputError: its name has a file's suffix, or it cannot be written.
    """
    check_suffix(directory, "aoti", directory=True)
    check_one_network(packed)
    program, exported = native_program(packed, inputs)
    # "linear_tiled, embedding_tiled" -> tiled: only libraries that the package calls.
    forms = sorted({op.rpartition("_")[2] for said in exported.packed.values() for op in said.split(", ")})
    # The package last, and old libraries removed: what is there at any moment fits together.
    with merging(directory, last=PACKAGE, stale=("libsqs_*.so",)) as made:
        with one_sentence("compiled"):
            torch._inductor.aoti_compile_and_package(program, package_path=str(made / PACKAGE))
        for form in (DECLARATIONS, *forms) if forms else ():
            shutil.copyfile(_library(form), made / f"libsqs_{form}.so")
        for name in (RUNNER, CPP_RUNNER):
            shutil.copyfile(Path(__file__).with_name(f"aoti_{name}"), made / name)
    return exported


def run_aoti(directory: str | Path, inputs: Any) -> tuple[Tensor, ...]:
    """Run what :func:`export_aoti` has written, in a process of its own that imports only torch.

    Args:
        directory: of the export.
        inputs: a minibatch.

    Returns:
        The network's outputs.

    Raises:
        NetworkError: the process failed; the message has its error.
    """
    with tempfile.TemporaryDirectory() as place:
        given, found = Path(place) / "inputs.pt", Path(place) / "outputs.pt"
        # Through files: the process shares nothing with this one, which is what the run is to show.
        torch.save(input_tensors(inputs), given)
        command = [sys.executable, str(Path(directory) / RUNNER), str(given), str(found)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            said = _error(result.stderr) or f"it ended with {result.returncode}"
            raise NetworkError(f"The compiled network does not run ({said}).")
        return torch.load(found)


def _error(said: str) -> str:
    """Return the line of a traceback that names the error: what C++ tells of its own frames comes behind it."""
    lines = said.rpartition("Traceback (most recent call last):")[2].splitlines()
    return next((line for line in lines if line.strip() and not line.startswith(" ")), "")


def native_program(packed: nn.Module, inputs: Any) -> tuple[ExportedProgram, Exported]:
    """Return the graph of a network in which every packed weight belongs to compiled operators."""
    # Traced packed first: only the graph tells which operators a network calls for each weight.
    program = trace(packed, inputs)
    used = operators(program, packed)
    python = {weight: [op for op in ops if not has_native_kernel(op)] for weight, ops in used.items()}
    # Inductor cannot compile our Python references, and the package would call Python at run time.
    decoded = _whole_modules(packed, {weight for weight, ops in python.items() if ops})
    names = stored_weights(packed)
    why = {
        name: f"no compiled {', '.join(python[weight])}" if python.get(weight) else "stands beside one without"
        for name, weight in names.items()
        if weight in decoded
    }
    how = {n: ", ".join(used[weight]) for n, weight in names.items() if weight in used and weight not in decoded}
    if why:
        plain = copy.deepcopy(packed)  # the caller's network stays packed
        weights = stored_weights(plain)
        program = trace(unpack_weights(plain, only={weights[name] for name in why}), inputs)
    return program, Exported(how, why)


def operators(program: ExportedProgram, packed: nn.Module) -> dict[StoredWeight, list[str]]:
    """Return the names of the operators in a graph that take each packed weight.

    Args:
        program: of a module whose child ``network`` is the packed network.
        packed: the packed network.
    """
    # Graph inputs go by names of their own; the signature leads back to the buffers.
    buffers = program.graph_signature.inputs_to_buffers
    owners = {
        f"{NETWORK}.{path}.codes": module
        for path, module in packed.named_modules(remove_duplicate=False)
        if isinstance(module, StoredWeight)
    }
    used: dict[StoredWeight, set[str]] = {}
    for node in program.graph.nodes:
        for operand in node.args if str(node.target).startswith("sqs.") else ():
            owner = owners.get(buffers.get(getattr(operand, "name", ""), ""))
            if owner is not None:
                used.setdefault(owner, set()).add(str(node.target).split(".")[1])
    return {weight: sorted(ops) for weight, ops in used.items()}


def _whole_modules(net: nn.Module, chosen: set[StoredWeight]) -> set[StoredWeight]:
    """Return the weights to decode and those that stand in one module with them: it is packed or it is not."""
    for module in net.modules():
        held = {child for child in module.children() if isinstance(child, StoredWeight)}
        if held & chosen and not held <= chosen:
            # Again from the start: a weight that was added may stand in other modules, too.
            return _whole_modules(net, chosen | held)
    return chosen


def _library(form: str) -> Path:
    try:
        return compiled_kernels(form)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise NetworkError(
            f"The library of operators could not be compiled ({error}): install a C++20 compiler, or set CXX."
        ) from None
