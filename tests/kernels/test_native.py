"""Compiling the CPU kernels: where there is no compiler, a broken one, no place to write, or two at once."""

import stat
import warnings
from pathlib import Path

import pytest
import torch
from kits import forks
from torch import nn

from sqs_pyro.compiling import compiled
from sqs_pyro.kernels.native import DECLARATIONS, compiled_kernels, has_native_kernel, native_kernels
from sqs_pyro.kernels.ops import OPS

SCRIPT = """
import sys, warnings
import torch
from torch import nn
from sqs_pyro.kernels import packed_network
from sqs_pyro.packing import CodedTensor
net, codes = nn.Linear(40, 8), torch.arange(320).remainder(5).to(torch.uint8).view(8, 40)
mask, table = codes > 0, torch.tensor([[0.5, -0.25, 0.125, 1.0, -2.0]])
coded = CodedTensor(codes, mask, table)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    packed = packed_network(net, {"weight": coded}, layout="entropy")
    again = packed_network(net, {"weight": coded}, layout="entropy")
x = torch.randn(3, 40)
torch.testing.assert_close(packed(x), x @ (table[0, codes.long()] * mask).T + net.bias.half().float())
print(packed.packed_weight.form)
print([str(w.message) for w in told if "CPU kernels" in str(w.message)])
"""


def start(tmp_path, **environment):
    cache = {"SQS_CACHE": str(tmp_path / "cache"), **environment}
    return forks.Started(SCRIPT, environment=cache, imported=forks.LIBRARY)


def told(process):
    """The form that the weight has, and the warnings."""
    ended = process.wait()
    assert ended.returncode == 0, ended.stderr
    form, warned = ended.stdout.splitlines()
    return form, warned


def compiler(tmp_path, body):
    path = tmp_path / "compiler"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def quick_compiler(tmp_path):
    """One whose every output is the library that this machine's has made: for tests of what is around it."""
    copied = f'while [ "$1" != -o ]; do shift; done; cp {compiled_kernels("tiled")} "$2"'
    return compiler(tmp_path, f"sleep 0.2; {copied}")


needs_compiler = pytest.mark.skipif(not native_kernels("tiled"), reason="no C++ compiler")


def _cut(content):
    return content[: len(content) // 2]


def _flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [_cut, _flip, lambda content: b"", lambda content: content + b"more"])
def test_a_damaged_library_is_built_again(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("SQS_CACHE", str(tmp_path))

    def build(library):
        library.write_bytes(bytes(range(256)))

    first = compiled("kind", [], ["key"], build)
    whole = first.read_bytes()
    assert compiled("kind", [], ["key"], pytest.fail) == first
    first.write_bytes(damage(whole))
    assert compiled("kind", [], ["key"], build).read_bytes() == whole


def test_no_compiler(tmp_path):
    form, warned = told(start(tmp_path, PATH=str(tmp_path), CXX=""))
    assert form == "dense"
    assert warned.count("CPU kernels could not be compiled") == 1  # one message for two networks
    assert "none of c++, g++, clang++ is there" in warned and "Install a C++20 compiler" in warned


def test_a_compiler_that_is_no_program(tmp_path):
    form, warned = told(start(tmp_path, CXX="/nowhere/c++"))
    assert form == "dense" and "CXX is '/nowhere/c++', which is no program" in warned


def test_a_broken_compiler(tmp_path):
    broken = compiler(tmp_path, 'echo "tiled.cpp:1: error: something is missing" >&2; exit 1')
    form, warned = told(start(tmp_path, CXX=broken))
    assert form == "dense" and "error: something is missing" in warned
    assert not list((tmp_path / "cache").iterdir())


def test_a_compiler_that_makes_no_library(tmp_path):
    form, warned = told(start(tmp_path, CXX=compiler(tmp_path, "exit 0")))
    assert form == "dense" and "CPU kernels could not be compiled" in warned


def test_left_out_by_the_environment(tmp_path):
    assert told(start(tmp_path, SQS_KERNELS="reference")) == ("dense", "[]")
    assert not (tmp_path / "cache").exists()


@needs_compiler
def test_a_cache_that_cannot_be_written_to(tmp_path):
    (tmp_path / "cache").write_text("a file, where no directory can be made")  # root may write everywhere else
    assert told(start(tmp_path, CXX=quick_compiler(tmp_path))) == ("tiled", "[]")


@needs_compiler
def test_two_processes_at_once(tmp_path):
    both = [start(tmp_path, CXX=quick_compiler(tmp_path)) for _ in range(2)]
    assert [told(process) for process in both] == [("tiled", "[]")] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 1


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    ["-march=native -mno-amx-bf16", "-march=x86-64-v3", "-march=x86-64"],
    ids=["no matrix unit", "avx2", "portable"],
)
def test_other_instruction_sets(flags):
    """The same products on what older machines have; the grid of shapes runs there, too."""
    grids = [
        Path(__file__).with_name(f"test_{of}.py") for of in ("matrices", "convolution", "attention", "coding")
    ]
    # The libraries are kept, as this machine's are; optimised for debugging, they compile in half the time.
    environment = {"SQS_CXXFLAGS": f"{flags} -Og"}
    forks.run_tests(*grids, "--hypothesis-profile=few", environment=environment, imported=forks.LIBRARY)


@needs_compiler
def test_the_library_is_kept():
    first = compiled_kernels("tiled")
    before = first.stat().st_mtime_ns
    assert compiled_kernels("tiled") == first and first.stat().st_mtime_ns == before


@needs_compiler
def test_a_network_is_no_larger_in_memory_than_its_codes():
    from sqs_pyro.kernels import packed_network
    from sqs_pyro.kernels.decode import decoded_weights
    from sqs_pyro.testing.layouts import random_coded

    before = len(decoded_weights)
    net = nn.Sequential(nn.Embedding(160, 64), nn.Linear(64, 160, bias=False))
    net[1].weight = net[0].weight  # tied
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = packed_network(net, {"0.weight": random_coded((160, 64), 15)})
    packed(torch.randint(0, 160, (2, 5)))
    assert len(decoded_weights) == before  # nothing was decoded
    assert packed[0].packed_weight is packed[1].packed_weight
    assert packed[1].packed_weight.codes.numel() == 160 * 64 // 2
    packed = packed_network(nn.Conv2d(16, 32, 3), {"weight": random_coded((32, 16, 3, 3), 15, groups=32)})
    packed(torch.randn(1, 16, 9, 9))
    assert len(decoded_weights) == before
    assert packed.packed_weight.codes.numel() == 32 * 144 // 2


@needs_compiler
def test_a_weight_is_tiled_where_all_that_use_it_have_a_kernel():
    from sqs_pyro.kernels import packed_network
    from sqs_pyro.testing.layouts import random_coded

    def forms(module, name="weight", groups=1, scales=False):
        coded = random_coded(tuple(module.get_parameter(name).shape), 5, groups=groups, scales=scales)
        packed = packed_network(module, {name: coded})
        return {child.best_form() for child in packed.modules() if hasattr(child, "best_form")}

    tiled = ("tiled", True, "compiled kernels multiply with the codes")
    assert forms(nn.Linear(40, 8)) == forms(nn.Conv1d(4, 8, 3)) == {tiled}
    decoded = ("dense", False, "its module reads the decoded weight")
    assert forms(nn.Conv2d(4, 8, 3, groups=2)) == forms(nn.ConvTranspose2d(4, 8, 3)) == {tiled}
    assert forms(nn.Conv3d(4, 8, 3)) == forms(nn.MultiheadAttention(8, 2), "in_proj_weight") == {decoded}
    assert forms(nn.Linear(40, 8), groups=8) == forms(nn.Linear(64, 8), groups=16) == {("rows", *tiled[1:])}
    assert forms(nn.Linear(40, 8), groups=16) == {("dense", False, "no kernel for 16 codebooks of 20 weights")}
    assert (
        forms(nn.Linear(64, 8), scales=2) == forms(nn.Linear(96, 8), groups=8, scales=3) == {("rows", *tiled[1:])}
    )
    reason = "no kernel for 1 codebooks of 320 weights and 2 scales an output"
    assert forms(nn.Linear(40, 8), scales=2) == {("dense", False, reason)}
    assert not next(iter(forms(nn.Conv1d(4, 8, 3), scales=2))).has_kernels
    shared = nn.ModuleList([nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3)])
    shared[1].weight = shared[0].weight
    assert forms(shared, "0.weight") == {tiled}
    shared = nn.ModuleList([nn.Linear(8, 24), nn.MultiheadAttention(8, 2)])
    shared[1].in_proj_weight = shared[0].weight
    assert forms(shared, "0.weight") == {decoded}
    assert forms(shared[:1], "0.weight") == {tiled}


DECLARED = """
import sys
import torch
torch.ops.load_library(sys.argv[1])
for op in sys.argv[2:]:
    print(getattr(torch.ops.sqs, op).default._schema)
"""


@needs_compiler
def test_every_compiled_operator_is_declared_for_others():
    """And as Python does: an export calls them by these signatures."""
    compiled = sorted(op for op in OPS if has_native_kernel(op))
    assert {"linear_tiled", "embedding_rows"} <= set(compiled) and "weight_tiled" not in compiled
    ended = forks.run(DECLARED, str(compiled_kernels(DECLARATIONS)), *compiled)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [str(OPS[op]._opoverload._schema) for op in compiled]
