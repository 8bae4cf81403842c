"""Contract kit: any packed layout inherits these tests by its name.

What comes out of the bytes must be what went in, bit for bit, for every shape, codebook size, grouping and
share of zeros; the sizes it states must be those of its bytes; and damaged bytes must never pass as others.
"""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sqs_pyro.errors import NetworkError, PackedFileError
from sqs_pyro.packing import CodedTensor, PackedTensor, pack_tensor


def random_coded(
    shape: Sequence[int],
    components: int,
    groups: int = 1,
    nonzero_rate: float = 0.5,
    seed: int = 0,
    exact_half: bool = True,
    scales: bool | int = False,
) -> CodedTensor:
    """Return a coded tensor of random codes, mask, codebook and scales.

    Args:
        shape: of the weights.
        components: K; values of a codebook differ, and none is 0.
        groups: codebooks.
        nonzero_rate: share of weights that are not zero.
        seed: of the codes.
        exact_half: whether float16 holds the codebook.
        scales: whether each output has a scale, or of how many parts of its weights each has one.
    """
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=random) < nonzero_rate
    codes = torch.randint(0, components, shape, dtype=torch.uint8, generator=random) * mask
    # K of 2 K places, each once; an offset of ½ keeps them from being 0.
    order = torch.rand(groups, 2 * components, generator=random).argsort(dim=1)[:, :components]
    # Multiples of 1/1024 are exact in float16, those of 1/600 are not.
    codebook = (order - components + 0.5) * (1 / 512 if exact_half else 1 / 300)
    each = None
    if scales:
        of = shape[:1] if scales is True else (shape[0], scales)
        each = torch.rand(of, generator=random).add_(0.1).half().float()
    return CodedTensor(codes, mask, codebook, each)


def slow_dense(coded: CodedTensor) -> np.ndarray:
    """Return the weights, one after the other, as the definition says it."""
    codes, mask = coded.codes.reshape(-1).tolist(), coded.mask.reshape(-1).tolist()
    codebook = coded.codebook.numpy()
    scales = np.ones(1, np.float32) if coded.scales is None else coded.scales.numpy().reshape(-1)
    # Groups, rows and parts of rows are runs of weights in row-major order.
    per_group, per_scale = len(codes) // coded.num_groups, len(codes) // len(scales)
    values = [
        codebook[i // per_group, code] * scales[i // per_scale] if keep else np.float32(0.0)
        for i, (code, keep) in enumerate(zip(codes, mask, strict=True))
    ]
    return np.array(values, dtype=np.float32).reshape(coded.shape)


def assert_same_bits(actual: torch.Tensor, expected: np.ndarray) -> None:
    """Assert that float32 values are equal bit for bit: -0.0 is not 0.0."""
    assert actual.dtype == torch.float32
    np.testing.assert_array_equal(actual.numpy().view(np.uint32), expected.view(np.uint32))


@st.composite
def coded_tensors(draw: st.DrawFn) -> CodedTensor:
    """Draw coded tensors of any small shape, codebook, grouping and share of zeros."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    numel, each = math.prod(shape), math.prod(shape[1:])
    groups = draw(st.sampled_from([g for g in range(1, numel + 1) if numel % g == 0]))
    return random_coded(
        shape,
        # Around powers of two and the limit of a byte, where widths of codes change.
        components=draw(st.one_of(st.integers(1, 17), st.integers(250, 256))),
        groups=groups,
        nonzero_rate=draw(st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0])),
        seed=draw(st.integers(0, 2**16)),
        exact_half=draw(st.booleans()),
        scales=draw(st.sampled_from([False, True, *(parts for parts in range(2, each + 1) if each % parts == 0)])),
    )


class LayoutContract:
    """Inherit and set ``layout`` to the registered name."""

    layout: str

    def pack(self, coded: CodedTensor) -> PackedTensor:
        """Pack by the layout under test."""
        return pack_tensor(coded, self.layout)

    def assert_round_trip(self, coded: CodedTensor) -> None:
        """Assert that a tensor comes back to the bit, and that sizes are those of the bytes."""
        packed = self.pack(coded)
        again = packed.unpack()
        assert_same_bits(again.dense(), slow_dense(coded))
        assert torch.equal(again.mask, coded.mask)
        assert packed.shape == coded.shape
        assert packed.nonzeros == coded.nonzeros
        assert packed.num_components <= coded.num_components
        assert packed.num_bytes == sum(part.numel() for part in packed.parts.values())
        assert all(part.dtype == torch.uint8 and part.dim() == 1 for part in packed.parts.values())
        assert packed.codebook_dtype == again.codebook_dtype

    @settings(suppress_health_check=[HealthCheck.differing_executors])  # each layout runs it for itself
    @given(coded=coded_tensors())
    def test_round_trip_is_exact(self, coded: CodedTensor) -> None:
        self.assert_round_trip(coded)

    @pytest.mark.parametrize("size", [1, 24, 33, 10_000])
    @pytest.mark.parametrize("nonzero_rate", [0.0, 0.3, 1.0])
    def test_pieces_are_the_whole(self, size: int, nonzero_rate: float) -> None:
        coded = random_coded((9, 35), 6, nonzero_rate=nonzero_rate, scales=True)
        packed = self.pack(coded)
        codes, mask = zip(*packed.unpack_pieces(size), strict=True)
        assert [len(piece) for piece in codes[:-1]] == [size] * (len(codes) - 1)
        again = CodedTensor(
            torch.cat(codes).view(9, 35), torch.cat(mask).view(9, 35), packed.codebook(), packed.scales()
        )
        assert_same_bits(again.dense(), slow_dense(coded))
        assert torch.equal(again.mask, coded.mask)

    @pytest.mark.parametrize("components", [1, 2, 3, 16, 255])
    @pytest.mark.parametrize("nonzero_rate", [0.0, 0.3, 1.0])
    def test_every_code_in_use(self, components: int, nonzero_rate: float) -> None:
        self.assert_round_trip(random_coded((64, 99), components, nonzero_rate=nonzero_rate))

    def test_all_256_codes_without_a_zero(self) -> None:
        coded = random_coded((64, 128), 256, nonzero_rate=1.0)
        assert coded.codes.unique().numel() == 256
        self.assert_round_trip(coded)

    def test_all_256_codes_and_zero_work_or_say_so(self) -> None:
        coded = random_coded((64, 256), 256, nonzero_rate=0.9)
        try:
            self.assert_round_trip(coded)
        except NetworkError as error:
            assert "256 codebook values and zero" in str(error)

    def test_packing_is_deterministic_and_idempotent(self) -> None:
        coded = random_coded((24, 35), 7, groups=4)
        packed = self.pack(coded)
        for again in (self.pack(coded), self.pack(packed.unpack())):
            assert {k: v.tolist() for k, v in again.parts.items()} == {
                k: v.tolist() for k, v in packed.parts.items()
            }

    def test_unused_codes_are_not_stored(self) -> None:
        coded = random_coded((40, 50), 5)
        codebook = torch.randn(1, 256).half().float()
        codebook[:, :100:20] = coded.codebook  # the values that are used
        wide = CodedTensor(coded.codes * 20, coded.mask, codebook)
        assert self.pack(wide).num_bytes == self.pack(coded).num_bytes
        self.assert_round_trip(wide)

    def test_equal_values_are_merged(self) -> None:
        codebook = torch.tensor([[0.5, -1.0, 0.5, -1.0]])
        coded = CodedTensor(random_coded((30, 30), 4).codes, torch.ones(30, 30, dtype=torch.bool), codebook)
        assert self.pack(coded).num_components == 2
        self.assert_round_trip(coded)

    def test_a_codebook_value_of_zero_is_a_zero_weight(self) -> None:
        coded = random_coded((30, 30), 3, nonzero_rate=1.0)
        coded = CodedTensor(coded.codes, coded.mask, torch.tensor([[0.5, 0.0, -0.0]]))
        packed = self.pack(coded)
        assert_same_bits(packed.unpack().dense(), slow_dense(coded))
        assert packed.nonzeros == int((coded.codes != 1).sum())

    def test_bytes_cut_off_are_noticed(self) -> None:
        packed = self.pack(random_coded((33, 33), 6))
        for name, part in packed.parts.items():
            if part.numel():
                fields = {**vars(packed), "parts": {**packed.parts, name: part[:-1]}}
                with pytest.raises(PackedFileError):
                    PackedTensor(**fields).unpack()

    def test_wrong_counts_are_noticed(self) -> None:
        packed = self.pack(random_coded((33, 33), 6))
        with pytest.raises(PackedFileError):
            PackedTensor(**{**vars(packed), "nonzeros": packed.nonzeros - 8}).unpack()

    def test_codes_outside_of_the_codebook_are_noticed(self) -> None:
        packed = self.pack(random_coded((33, 33), 6))
        small = packed.parts["codebook"][:-2]
        with pytest.raises(PackedFileError):
            PackedTensor(
                **{**vars(packed), "num_components": 5, "parts": {**packed.parts, "codebook": small}}
            ).unpack()
