"""Bit-packing against Python's integers of any length, and numpy's packbits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sqs_pyro.errors import PackedFileError
from sqs_pyro.packing import pack_bits, unpack_bits


def slow_pack(values: list[int], bits: int) -> bytes:
    """All values as digits of one long integer."""
    number = sum(value << (bits * i) for i, value in enumerate(values))
    return number.to_bytes((len(values) * bits + 7) // 8, "little")


@given(data=st.data(), bits=st.integers(1, 8))
def test_against_long_integers(data, bits):
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    packed = pack_bits(torch.tensor(values, dtype=torch.uint8), bits)
    assert bytes(packed.tolist()) == slow_pack(values, bits)
    assert unpack_bits(packed, bits, len(values)).tolist() == values


def test_one_bit_is_numpy_packbits():
    values = torch.randint(0, 2, (1001,), dtype=torch.uint8)
    np.testing.assert_array_equal(pack_bits(values, 1), np.packbits(values.numpy(), bitorder="little"))


@pytest.mark.parametrize("bits", range(1, 9))
def test_many_values(bits):
    values = torch.randint(0, 2**bits, (100_003,), dtype=torch.int16).to(torch.uint8)
    assert torch.equal(unpack_bits(pack_bits(values, bits), bits, len(values)), values)


def test_a_value_that_needs_more_bits():
    with pytest.raises(ValueError, match="Value 4 does not fit into 2 bits"):
        pack_bits(torch.tensor([1, 4], dtype=torch.uint8), 2)


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match="must be 1 to 8"):
        pack_bits(torch.zeros(3, dtype=torch.uint8), bits)


def test_wrong_length_and_set_padding():
    packed = pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 3)
    with pytest.raises(PackedFileError, match="take 2 bytes, but 1 are there"):
        unpack_bits(packed[:1], 3, 3)
    packed[-1] |= 128
    with pytest.raises(PackedFileError, match="behind the last value"):
        unpack_bits(packed, 3, 3)
