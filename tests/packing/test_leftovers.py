"""What is not compressed is stored in the smallest form that holds it exactly."""

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sqs_pyro import load, save, size_report
from sqs_pyro.errors import PackedFileError
from sqs_pyro.kernels import packed_network
from sqs_pyro.packing import read_packed
from sqs_pyro.packing.leftovers import (
    checksum,
    describe,
    fixed_point,
    in_fixed_point,
    restore,
    round_to,
    smallest_exact,
)
from sqs_pyro.testing.layouts import random_coded

F32 = torch.finfo(torch.float32)
F16 = torch.finfo(torch.float16)


@pytest.mark.parametrize(
    "values, dtype",
    [
        ([0.0, -0.0, 1.5, float("nan"), float("inf"), -float("inf")], torch.float16),
        ([F16.max, -F16.max, F16.smallest_normal / 1024], torch.float16),
        ([2.0**100, -(2.0**-100)], torch.bfloat16),
        ([F32.max, float("inf")], torch.float32),  # what attention masks are full of is no infinity
        ([0.0, F32.min], torch.float32),
        ([1 / 3], torch.float32),
    ],
)
def test_every_value_comes_back(values, dtype):
    value = torch.tensor(values)
    stored = smallest_exact(value)
    assert stored.dtype == dtype
    back = stored.to(value.dtype)
    torch.testing.assert_close(back, value, rtol=0, atol=0, equal_nan=True)
    assert back.signbit().equal(value.signbit())


class TestNextToZero:
    """Of millions of numbers some are below float16's least; what is as large as they are must keep them."""

    @pytest.fixture
    def table(self):
        table = 0.05 * torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
        table[7, 3] = 2e-8
        return table

    def test_a_table_with_such_a_number_takes_two_bytes_a_number(self, table):
        rounded = round_to(table, "float16")
        assert rounded.equal(table.half().float()) and rounded[7, 3] == 0
        assert smallest_exact(rounded).dtype == torch.float16

    @pytest.mark.parametrize("part", [(7, slice(None)), (slice(None), 3)], ids=["row", "column"])
    def test_a_whole_row_or_column_of_them_stays(self, table, part):
        table[part] *= 1e-6
        assert round_to(table, "float16") is table

    def test_in_a_vector_it_stays(self, table):
        assert round_to(table.flatten(), "float16").equal(table.flatten())


def test_float64_stays_where_float32_would_lose_a_value():
    value = torch.tensor([torch.finfo(torch.float64).max], dtype=torch.float64)
    assert smallest_exact(value).equal(value) and smallest_exact(value).dtype == torch.float64
    assert smallest_exact(torch.tensor([0.5], dtype=torch.float64)).dtype == torch.float16


def written_and_read(value):
    kinds, data = describe({"norm.weight": value})
    [(_, back)] = list(restore(kinds, torch.cat(data) if data else torch.empty(0, dtype=torch.uint8)))
    return kinds[0]["fields"][0], sum(part.numel() for part in data), back


class TestFixedPoint:
    @pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
    @pytest.mark.parametrize("offset", [0.0, 3.0, -0.7])
    def test_rounded_numbers_take_a_byte_and_come_back(self, scale, offset):
        torch.manual_seed(0)
        value = scale * (offset + torch.randn(64))
        rounded = round_to(value, "fixed8")
        # At most 256 neighbouring multiples of a power of two, the nearest ones.
        step = 2.0 ** math.ceil(math.log2(float(value.max() - value.min()) / 255))
        assert float((rounded - value).abs().max()) <= step
        assert len(rounded.unique()) > 30 and round_to(rounded, "fixed8").equal(rounded)
        field, size, back = written_and_read(smallest_exact(rounded))
        assert (field["bits"], size) == (8, 64 + 3)
        assert back.float().equal(rounded)

    @given(
        st.integers(-120, 100), st.integers(-32767, 32000), st.lists(st.integers(0, 255), min_size=8, max_size=20)
    )
    def test_any_such_numbers(self, exponent, least, steps):
        value = ((torch.tensor(steps).double() + least) * 2.0**exponent).float()
        field, size, back = written_and_read(value)
        if value.unique().numel() > 1 and value.isfinite().all():
            assert field.get("bits") == 8 and size == len(steps) + 3
        assert back.equal(value)

    @pytest.mark.parametrize(
        "value",
        [
            torch.randn(64, generator=torch.Generator().manual_seed(0)),  # of 24 bits
            torch.arange(7.0),  # too few to pay
            torch.tensor([0.0, 256.0, *[1.0] * 9]),  # 257 steps
            torch.tensor([-0.0, 1.0, *[2.0] * 9]),
            torch.tensor([float("nan"), 1.0, *[2.0] * 9]),
            torch.tensor([float("inf"), 1.0, *[2.0] * 9]),
            torch.full((9,), 0.5),  # a constant
            torch.arange(9),
            torch.arange(9.0).double(),
        ],
        ids=["fine", "few", "wide", "minus zero", "nan", "infinite", "constant", "integers", "double"],
    )
    def test_others_stay_as_they_are(self, value):
        field, _, back = written_and_read(value)
        assert "bits" not in field and not in_fixed_point(value)
        torch.testing.assert_close(back, value, rtol=0, atol=0, equal_nan=True)
        if value.dtype == torch.float32:
            assert back.signbit().equal(value.signbit())

    def test_a_number_far_from_the_others_keeps_two_bytes(self):
        value = torch.randn(64, generator=torch.Generator().manual_seed(0))
        value[3] = 1000.0
        assert round_to(value, "fixed8").equal(round_to(value, "float16"))

    def test_large_tensors_are_judged_by_their_beginning(self):
        value = torch.arange(20_000.0) % 256
        assert fixed_point(value)[:2] == (0, 0)
        value[15_000] = 0.3
        assert fixed_point(value) is None

    @pytest.mark.parametrize(
        ("head", "codes"),
        [((0, 0), [2, 4, 6] * 3), ((127, 30000), [1, 2, 3] * 3), ((-128, 1), [1, 2, 3] * 3), ((0, 0), [0] * 9)],
        ids=["half of them", "infinite", "too small", "a constant"],
    )
    def test_other_spellings_are_refused(self, head, codes):
        data = torch.frombuffer(bytearray(struct.pack("<bh", *head) + bytes(codes)), dtype=torch.uint8)
        kind = {
            "fields": [{"name": "weight", "dtype": "float16", "bits": 8}],
            "modules": ["norm"],
            "shapes": [[[9]]],
        }
        with pytest.raises(PackedFileError, match=r"norm\.weight.*not in fixed point"):
            list(restore([{**kind, "crc32": [checksum([data])]}], data))

    def test_a_constant_of_any_size_is_not_spread_out(self):
        """A file of a few bytes can have one; read, written or asked for its form it takes no memory."""
        value = torch.tensor(0.5).expand(1 << 38)
        assert fixed_point(value) is None and not in_fixed_point(value)
        kinds, data = describe({"norm.bias": value})
        assert kinds[0]["fields"][0]["constant"] == "0000003f" and not data

    def test_files_with_them_are_of_version_5(self, tmp_path):
        net = nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.Linear(30, 2)).eval()
        nn.init.normal_(net[1].weight, 1.0, 0.2)
        coded = {"0.weight": random_coded((30, 20), 4)}
        sizes = []
        for dtype, version in (("float16", 1), ("fixed8", 5)):
            packed = packed_network(net, coded, layout="bitmap", leftover_dtype=dtype)
            save(packed, tmp_path / dtype)
            assert read_packed(tmp_path / dtype).format_version == version
            x = torch.randn(5, 20)
            assert load(tmp_path / dtype, net)(x).equal(packed(x))
            torch.testing.assert_close(packed[1].weight, net[1].weight, rtol=0.01, atol=0.01)
            sizes.append(size_report(tmp_path / dtype).uncompressed)
        assert sizes[1] < 0.8 * sizes[0]
