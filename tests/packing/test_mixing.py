"""The law that learns as it goes: compiled and in plain Python the same, near the entropy, and below it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kits import forks

from sqs_pyro.errors import PackedFileError
from sqs_pyro.packing import CodedTensor, mixing_native, pack_tensor
from sqs_pyro.packing.canonical import canonical
from sqs_pyro.packing.mixing import LOG_ODDS, CodedShape, Range, Values, closed, log2
from sqs_pyro.packing.mixing_native import decode_weights, encode_weights
from sqs_pyro.packing.odds import MOST, PROBABILITIES
from sqs_pyro.testing.layouts import coded_tensors, random_coded

needs_compiler = pytest.mark.skipif(mixing_native._library() is None, reason="no C++ compiler")


def coded_shape(coded):
    return CodedShape.of(coded.shape, coded.nonzeros, coded.codebook.numpy())


def stream_of(coded):
    return encode_weights(coded_shape(coded), coded.codes.reshape(-1).numpy(), coded.mask.reshape(-1).numpy())


def entropy_bytes(coded):
    symbols = (coded.codes.int() + coded.mask).reshape(-1)
    counts = symbols.bincount().double()
    return float(torch.special.entr(counts / counts.sum()).sum()) / math.log(2) * len(symbols) / 8


def smooth_kernels(outs=24, ins=16, seed=0):
    """Kernels whose weights have the signs of their neighbours, in channels of different rates."""
    generator = torch.Generator().manual_seed(seed)
    field = torch.randn(outs, ins, 3, 3, generator=generator) + 2 * torch.randn(
        outs, ins, 1, 1, generator=generator
    )
    rate = torch.rand(outs, 1, 1, 1, generator=generator)
    mask = torch.rand(outs, ins, 3, 3, generator=generator) < rate
    codes = ((field > 0) * 2 + (field.abs() > 2)).byte() * mask
    return CodedTensor(codes, mask, torch.tensor([[-1.0, -3.0, 1.0, 3.0]]))


@needs_compiler
@settings(max_examples=150, deadline=None)
@given(coded_tensors())
def test_compiled_and_plain_python_are_one(coded):
    coded = canonical(coded)
    shape, compiled = coded_shape(coded), stream_of(coded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing_native, "_library", lambda: None)
        np.testing.assert_array_equal(stream_of(coded), compiled)
        codes, mask = decode_weights(shape, compiled)
    np.testing.assert_array_equal(codes, coded.codes.reshape(-1))
    np.testing.assert_array_equal(mask, coded.mask.reshape(-1))


@needs_compiler
@pytest.mark.parametrize(
    "coded",
    [smooth_kernels(), random_coded((60, 50), 16, nonzero_rate=0.6), random_coded((40, 9, 5), 200, groups=40)],
    ids=["kernels", "a matrix", "rows of a codebook each"],
)
def test_larger_ones_too(coded, monkeypatch):
    coded = canonical(coded)
    compiled = stream_of(coded)
    monkeypatch.setattr(mixing_native, "_library", lambda: None)
    np.testing.assert_array_equal(stream_of(coded), compiled)


@pytest.mark.parametrize("rate", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("components", [2, 7, 16])
def test_weights_without_structure_take_their_entropy(rate, components):
    coded = canonical(random_coded((200, 150), components, nonzero_rate=rate))
    # What is learned on the way is paid for: at each of a few decisions some 60 bits.
    assert entropy_bytes(coded) < len(stream_of(coded)) < 1.015 * entropy_bytes(coded) + 10 * components


def test_structure_is_found():
    coded = canonical(smooth_kernels())
    sizes = {layout: pack_tensor(coded, layout).num_bytes for layout in ("entropy", "structured", "adaptive")}
    assert sizes["adaptive"] < 0.85 * sizes["entropy"] and sizes["adaptive"] < 0.95 * sizes["structured"]


@pytest.mark.parametrize("kept", [True, False])
def test_one_symbol_takes_no_bytes(kept):
    codes, mask = torch.zeros(5, 4, dtype=torch.uint8), torch.full((5, 4), kept)
    assert len(stream_of(canonical(CodedTensor(codes, mask, torch.ones(1, 1))))) == 0


def test_contexts_are_of_bounded_number():
    """Channels beyond 4,096 share contexts; a vector of many weights takes no more memory than others."""
    coded = canonical(random_coded((9000,), 3, nonzero_rate=0.5))
    codes, mask = decode_weights(coded_shape(coded), stream_of(coded))
    np.testing.assert_array_equal(codes, coded.codes)
    np.testing.assert_array_equal(mask, coded.mask)


@pytest.mark.parametrize("change", ["cut", "longer", "zeros"])
def test_other_streams_are_refused(change):
    coded = canonical(random_coded((30, 20), 5))
    stream = stream_of(coded)
    other = {
        "cut": stream[:-1],
        "longer": np.append(stream, np.uint8(1)),
        "zeros": np.append(stream, np.uint8(0)),
    }[change]
    with pytest.raises(PackedFileError, match="stream of mixed contexts is damaged"):
        decode_weights(coded_shape(coded), other)


@pytest.mark.parametrize("native", [True, False])
def test_a_codebook_without_values_has_no_weights(native, monkeypatch):
    if not native:
        monkeypatch.setattr(mixing_native, "_library", lambda: None)
    shape = CodedShape((4, 4, 1), 1, 5, np.zeros((1, 2), np.float32))
    with pytest.raises(PackedFileError, match="no weights are coded like this"):
        decode_weights(shape, np.array([255, 255], np.uint8))


def test_without_a_compiler_one_warning_says_so(tmp_path):
    program = (
        "import warnings, numpy, torch, sqs_pyro\n"
        "from sqs_pyro.packing import pack_tensor\n"
        "from sqs_pyro.testing.layouts import random_coded\n"
        "coded = random_coded((8, 6), 3)\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always')\n"
        "    packed = [pack_tensor(coded, 'adaptive') for _ in range(2)]\n"
        "assert torch.equal(packed[0].unpack().dense(), coded.dense())\n"
        "print(*[each.message for each in told])\n"
    )
    environment = {"PATH": str(tmp_path), "SQS_CACHE": str(tmp_path), "HOME": str(tmp_path)}
    done = forks.run(program, environment=environment, imported=forks.LIBRARY)
    assert done.stdout.count("plain Python takes its place") == 1, done.stderr


@pytest.mark.parametrize(
    ("low", "high", "size"),
    [
        (0, 0xFFFFFFFF, 0),
        (1, 0xFFFFFFFF, 1),
        (0x12345678, 0x12345678, 4),
        (0x11FFFFFF, 0x13000000, 1),
        (7, 600, 3),
    ],
)
def test_the_end_of_a_stream(low, high, size):
    end = closed(b"", low, high)
    assert len(end) == size
    assert low <= int.from_bytes(end.ljust(4, b"\0")) and int.from_bytes(end.ljust(4, b"\xff")) <= high


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(16, 65520)), max_size=400))
def test_arithmetic_coding_returns_what_went_in(decisions):
    coder = Range()
    for bit, probability in decisions:
        coder.code(int(bit), probability)
    stream = closed(bytes(coder.settled), coder.low, coder.high)
    ideal = -sum(math.log2(p / 65536 if bit else 1 - p / 65536) for bit, p in decisions)
    assert len(stream) <= ideal / 8 + 2
    reader = Range(stream)
    assert [reader.code(0, probability) for _, probability in decisions] == [int(bit) for bit, _ in decisions]


def test_tables():
    assert log2(1) == 0 and log2(3 << 40) == round(256 * math.log2(3)) + 256 * 40
    assert [-odds for odds in reversed(LOG_ODDS)] == LOG_ODDS
    assert PROBABILITIES[MOST] == 1 << 15 and PROBABILITIES[0] > 0 and PROBABILITIES[-1] < 1 << 16


def test_values_by_sign_and_size():
    values = Values.of(np.array([[-2.0, -0.0, 0.5, 0.25], [1.0, -1.0, 0.0, 0.0]], np.float32))
    assert values.count.tolist() == [[3, 1], [1, 1]]
    assert values.place[0].tolist() == [1, 0, 4, 2] and values.place[1, :2].tolist() == [0, 1]
    assert values.code[0, 0].tolist() == [1, 3, 2] and values.code[0, 1, 0] == 0 and values.code[1, 1, 0] == 1
