"""Of GPU kernels without Triton: which one is chosen, how codes are read, which ops they take over."""

import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kits import forks
from kits.gpu import random_packed

from sqs_pyro.compiling import KernelWarning
from sqs_pyro.kernels.gpu import register
from sqs_pyro.kernels.gpu.dispatch import CHUNK, MOST_ROWS, for_cuda, plan, unit_of
from sqs_pyro.kernels.ops import OPS, call


@given(st.integers(1, 8), st.integers(1, 10_000), st.one_of(st.none(), st.integers(1, 512)))
def test_units_are_whole_codes_and_rows_whole_units(bits, inputs, span):
    unit, per, size = unit_of(bits, inputs, span)
    assert inputs % per == 0 and (span is None or span % per == 0)
    if unit == 0:
        assert per == size == 1
        whole = 8 if bits % 2 else 4 if bits % 4 else 8 // bits  # the fewest codes in whole bytes
        assert inputs % whole or (span and span % whole)
    else:
        assert per * bits == 8 * size * unit and size in (1, 2, 4)


@given(
    st.integers(1, 200),
    st.integers(1, 40_000),
    st.integers(1, 20_000),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_every_unit_is_in_one_part(rows, outputs, units, half, bitmap, grouped):
    chosen = plan(rows, outputs, units, half, bitmap, grouped)
    if chosen.kernel == "decode":
        assert rows > 4 and (rows > MOST_ROWS or not half)
        return
    tiles = -(-units // chosen.units)
    each = -(-tiles // chosen.splits)
    assert (chosen.splits - 1) * each < tiles <= chosen.splits * each  # none without a tile
    assert not bitmap or chosen.units == CHUNK  # ranks are of these
    assert chosen.kernel == "vector" or chosen.rows >= max(16, rows)


def test_small_products_with_few_codes_are_cudas():
    assert (
        for_cuda(4096, 4, 1) and not for_cuda(4096, 5, 1) and not for_cuda(4100, 4, 1) and not for_cuda(32, 4, 2)
    )
    kernels = [plan(rows, 4096, 512, True, cuda=True).kernel for rows in (1, 16, 17, 64, 65)]
    assert kernels == ["cuda", "cuda", "matrix", "matrix", "decode"]
    assert [plan(rows, 4096, 512, False, cuda=True).kernel for rows in (1, 4, 5)] == ["vector", "vector", "decode"]


def test_which_ops_have_kernels_for_gpus():
    there = {name for name in OPS if torch._C._dispatch_has_kernel_for_dispatch_key(f"sqs::{name}", "CUDA")}
    assert there == {f"{op}_{form}" for op in ("linear", "embedding", "weight") for form in ("dense", "bitmap")}


def test_importing_the_library_imports_no_triton():
    check = "import sys, sqs_pyro, sqs_pyro.kernels; assert 'triton' not in sys.modules"
    assert forks.run(check).returncode == 0


@pytest.fixture
def fresh():
    register.gpu_kernels.cache_clear()
    yield
    register.gpu_kernels.cache_clear()


def as_on_a_gpu(packed, x):
    """What the op does on a GPU, here."""
    mask = [] if packed.mask is None else [packed.mask]
    arguments = (x, None, packed.codes, packed.table, *mask, packed.scales, list(packed.shape), packed.bits)
    return register.run(f"linear_{packed.form}", *arguments)


def test_without_triton_there_is_one_warning_and_the_reference(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "sqs_pyro.kernels.gpu.launch", raising=False)
    monkeypatch.delattr("sqs_pyro.kernels.gpu.launch", raising=False)
    packed, _ = random_packed((6, 40), 4, device="cpu")
    x = torch.randn(3, 40)
    with pytest.warns(KernelWarning, match="GPU kernels need Triton"):
        first = as_on_a_gpu(packed, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = as_on_a_gpu(packed, x)
    assert torch.equal(first, call("linear", packed, x, None)) and torch.equal(first, second)


def test_left_out_by_the_environment(fresh, monkeypatch):
    monkeypatch.setenv("SQS_KERNELS", "reference")
    packed, _ = random_packed((6, 40), 3, "bitmap", device="cpu")
    x = torch.randn(3, 40)
    assert register.gpu_kernels() is None
    assert torch.equal(as_on_a_gpu(packed, x), call("linear", packed, x, None))
