"""The CUDA C++ kernels without a GPU: run on the CPU, thread by thread; compiled by nvcc; and without nvcc."""

import ctypes
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kits.gpu import random_packed

from sqs_pyro.compiling import KernelWarning
from sqs_pyro.kernels.gpu import cuda

SHIM = Path(__file__).parents[1] / "kits" / "cuda_on_cpu"
TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def has_nvcc():
    try:
        cuda.nvcc_command("90")
    except RuntimeError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="no nvcc")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """The kernels' source as a library for CPUs."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    path = tmp_path_factory.mktemp("cuda") / "dense.so"
    flags = ["-x", "c++", "-std=c++20", "-O1", "-shared", "-fPIC", "-w", f"-I{SHIM}"]
    subprocess.run(["g++", *flags, str(cuda.SOURCE), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    cuda.declare(library)
    library.sqs_readable.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    return library


def multiply(library, packed, x, bias, outputs):
    codes, table = packed.codes.clone(), packed.table.clone().view(torch.float32)
    scales = None if packed.scales is None else packed.scales.clone().view(torch.float32)
    out = torch.full((len(x), outputs), float("nan"), dtype=x.dtype)
    for tensor, clear in ((x, 1), (codes, 0)):
        library.sqs_readable(tensor.data_ptr(), tensor.nbytes, clear)
    pointers = [None if t is None else t.data_ptr() for t in (x, codes, table, scales, bias, out)]
    sizes = (x.dtype == torch.bfloat16, packed.bits, len(x), outputs, x.shape[1], table.numel())
    return out, library.sqs_linear(0, None, *sizes, *pointers)


@st.composite
def products(draw):
    bits = draw(st.integers(1, 4))
    shape = draw(st.integers(1, 70)), 32 * draw(st.sampled_from([1, 2, 3, 4, 5, 7, 9, 31, 33, 64, 70]))
    scales, zeros = draw(st.booleans()), draw(st.sampled_from([0.0, 0.5, 1.0]))
    size, seed = draw(st.integers(1, 2**bits)), draw(st.integers(0, 2**31))
    packed, weight = random_packed(shape, bits, scales=scales, zeros=zeros, size=size, seed=seed, device="cpu")
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16]))
    x = torch.randn(draw(st.integers(1, 16)), shape[1]).to(dtype)
    return packed, weight, x, torch.randn(shape[0]).to(dtype) if draw(st.booleans()) else None


def check(library, packed, weight, x, bias):
    found, error = multiply(library, packed, x, bias, len(weight))
    assert error == 0
    offset = torch.zeros(len(weight)) if bias is None else bias
    expected = x.double() @ weight.double().T + offset.double()
    size = x.double().abs() @ weight.double().abs().T + offset.double().abs()
    assert ((found.double() - expected).abs() <= 1.5 * TOLERANCE[x.dtype] * size + 1e-7).all()


@pytest.mark.slow
@settings(max_examples=200)
@given(products())
def test_products_on_the_cpu(on_cpu, case):
    check(on_cpu, *case)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("bits", range(1, 5))
def test_some_products_on_the_cpu(on_cpu, bits, rows, dtype):
    packed, weight = random_packed((37, 32 * 37), bits, scales=rows == 5, zeros=0.1, seed=bits, device="cpu")
    check(on_cpu, packed, weight, torch.randn(rows, 32 * 37).to(dtype), torch.randn(37).to(dtype))


@pytest.mark.parametrize(
    ("rows", "inputs", "bits"), [(0, 32, 4), (17, 32, 4), (1, 33, 4), (1, 16, 4), (1, 32, 5), (1, 32, 8)]
)
def test_what_is_none_of_their_products_is_refused(on_cpu, rows, inputs, bits):
    packed, _ = random_packed((4, inputs), bits, device="cpu")
    out, error = multiply(on_cpu, packed, torch.randn(rows, inputs).half(), None, 4)
    assert on_cpu.sqs_error(error) == b"invalid argument" and out.isnan().all()


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90a", "100"])
def test_nvcc_compiles_it(tmp_path, monkeypatch, architecture):
    monkeypatch.setenv("SQS_CACHE", str(tmp_path))
    cuda.cuda_kernels.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library = cuda.cuda_kernels(architecture)
    cuda.cuda_kernels.cache_clear()
    assert library is not None and len(list(tmp_path.iterdir())) == 1
    # loads, and refuses what it cannot compute, without a GPU
    assert library.sqs_linear(0, None, 0, 5, 1, 4, 32, 32, *[None] * 6) == 1
    assert library.sqs_error(1) == b"invalid argument"
    assert cuda.compiled_cuda(architecture) == next(iter(tmp_path.iterdir()))


@pytest.mark.parametrize(
    ("nvcc", "message"),
    [
        ("/nowhere/nvcc", "NVCC is '/nowhere/nvcc', which is no program"),
        ("false", "false failed: it said nothing"),
    ],
)
def test_without_nvcc_there_is_one_warning(tmp_path, monkeypatch, nvcc, message):
    monkeypatch.setenv("SQS_CACHE", str(tmp_path))
    monkeypatch.setenv("NVCC", nvcc)
    cuda.cuda_kernels.cache_clear()
    with pytest.warns(KernelWarning, match=message):
        assert cuda.cuda_kernels("90") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda.cuda_kernels("90") is None
    cuda.cuda_kernels.cache_clear()
    assert not list(tmp_path.iterdir())
