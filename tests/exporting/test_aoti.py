"""AOTInductor packages: they run on packed weights where there is no sqs_pyro, and no Python."""

import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from kits.exported import run_without_us
from kits.packed_exports import INPUTS, first_rows, packed

import sqs_pyro.exporting.aoti
from sqs_pyro.errors import NetworkError
from sqs_pyro.exporting import export_aoti
from sqs_pyro.exporting.aoti import PACKAGE, native_program, run_aoti
from sqs_pyro.kernels.native import has_native_kernel, native_kernels
from sqs_pyro.packing.stored import stored_weights

needs_compiler = pytest.mark.skipif(not native_kernels("tiled"), reason="no C++ compiler")

SCRIPT = """
from pathlib import Path
import torch

_, directory, place = map(Path, sys.argv)
for library in directory.glob("libsqs_*.so"):
    torch.ops.load_library(library)
network = torch._inductor.aoti_load_package(str(directory / "model.pt2"))
for rows in (1, 4, 7):
    with torch.inference_mode():
        torch.save(network(torch.load(place / f"x{rows}.pt")), place / f"y{rows}.pt")
"""


def operators(program):
    return {str(node.target).split(".")[1] for node in program.graph.nodes if str(node.target).startswith("sqs.")}


@needs_compiler
@pytest.mark.parametrize(("kind", "codes"), [("residual", "scales"), ("words", "scales of parts")])
def test_only_compiled_operators_are_left(kind, codes):
    net = packed(kind, codes)
    program, exported = native_program(net, INPUTS[kind])
    assert set(exported.packed) | set(exported.decoded) == set(stored_weights(net))
    assert exported.packed and all(map(has_native_kernel, operators(program)))
    assert operators(program) == {op for said in exported.packed.values() for op in said.split(", ")}
    torch.testing.assert_close(program.module()(INPUTS[kind]), net(INPUTS[kind]), rtol=1e-4, atol=1e-4)


@needs_compiler
def test_a_weight_is_decoded_for_all_of_its_modules_if_for_one(monkeypatch):
    """The dispatcher decides, operator by operator: here only that of rows is compiled."""
    net = packed("words", "4 bits")
    monkeypatch.setattr(sqs_pyro.exporting.aoti, "has_native_kernel", lambda op: op == "embedding_tiled")
    program, exported = native_program(net, INPUTS["words"])
    assert not exported.packed and not operators(program)
    assert exported.decoded["words.weight"] == "no compiled linear_tiled"
    assert stored_weights(net) and net.words.packed_weight is net.head.packed_weight  # the network is as it was


def test_without_kernels_everything_is_decoded(monkeypatch):
    monkeypatch.setattr("sqs_pyro.kernels.form.native_kernels", lambda form: False)
    monkeypatch.setattr("sqs_pyro.kernels.native.native_kernels", lambda form: False)
    program, exported = native_program(packed("residual", "4 bits"), INPUTS["residual"])
    assert not exported.packed and not operators(program)
    assert exported.decoded["head.weight"] == "no compiled linear_dense"


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "codes"),
    [
        ("residual", ("codebooks of channels", "256 values and zeros")),
        ("words", ("scales of parts", "256 values and zeros")),
    ],
)
def test_it_runs_without_us(kind, codes, tmp_path):
    net, directory = packed(kind, *codes), tmp_path / "out"
    directory.mkdir()
    exported = export_aoti(net, INPUTS[kind], directory)
    forms = {op.split("_")[-1] for said in exported.packed.values() for op in said.split(", ")}
    libraries = {f"libsqs_{form}.so" for form in forms | {"declarations"}}
    assert {path.name for path in directory.glob("*.so")} == libraries
    moved = directory.rename(tmp_path / "moved")  # nothing in it may depend on where it was made
    for rows in (1, 4, 7):
        torch.save(first_rows(INPUTS[kind], rows), tmp_path / f"x{rows}.pt")
    run_without_us(SCRIPT, moved, tmp_path)
    for rows in (1, 4, 7):
        expected = net(first_rows(INPUTS[kind], rows)).detach()
        torch.testing.assert_close(torch.load(tmp_path / f"y{rows}.pt"), expected, rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.slow
def test_it_runs_without_python(tmp_path):
    net, x = packed("words", "4 bits"), first_rows(INPUTS["words"], 3)
    export_aoti(net, INPUTS["words"], tmp_path)
    said = (tmp_path / "run.cpp").read_text().splitlines()
    start = next(i for i, line in enumerate(said) if line.startswith("//   c++ "))
    command = " ".join(line.removeprefix("//") for line in said[start : start + 2])  # as the file itself says
    command = command.replace("$TORCH", str(Path(torch.__file__).parent))
    subprocess.run([*shlex.split(command), "-w"], cwd=tmp_path, check=True, timeout=300)
    torch.save((x,), tmp_path / "x.pt")
    subprocess.run([tmp_path / "run", tmp_path, tmp_path / "x.pt", tmp_path / "y.pt"], check=True, timeout=60)
    (y,) = torch.load(tmp_path / "y.pt")
    torch.testing.assert_close(y, net(x).detach(), rtol=1e-4, atol=1e-4)
    (again,) = run_aoti(tmp_path, x)
    assert torch.equal(again, y)
    (tmp_path / "libsqs_tiled.so").unlink()
    with pytest.raises(NetworkError, match=r"The compiled network does not run \(.*sqs"):
        run_aoti(tmp_path, x)


@needs_compiler
def test_a_compiler_that_fails_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *_, package_path: Path(package_path))
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(
        NetworkError, match=r"library of operators could not be compiled \(CXX is '/nowhere/c\+\+'"
    ):
        export_aoti(packed("words", "4 bits"), INPUTS["words"], tmp_path)
    assert not (tmp_path / PACKAGE).exists()
