from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sqs_pyro.errors import NetworkError
from sqs_pyro.packing import CodedTensor, canonical
from sqs_pyro.packing import coded as coded_module
from sqs_pyro.packing.coded import block_scales, count_codes, look_up, scaled, stack_draws
from sqs_pyro.testing.layouts import assert_same_bits, coded_tensors, random_coded, slow_dense


@given(coded=coded_tensors())
def test_dense_is_its_definition(coded):
    assert_same_bits(coded.dense(), slow_dense(coded))


@given(coded=coded_tensors())
def test_canonical_keeps_every_bit(coded):
    smallest = canonical(coded)
    assert_same_bits(smallest.dense(), slow_dense(coded))
    assert smallest.num_components <= coded.num_components
    again = canonical(smallest)
    assert torch.equal(again.codes, smallest.codes)
    assert torch.equal(again.codebook, smallest.codebook)


@given(coded=coded_tensors(), seed=st.integers(0, 99))
def test_order_of_codewords_within_groups_gives_the_least_entropy_of_the_shared_table(coded, seed):
    """Against random orders of each group's codewords."""

    def shared_entropy(codes: torch.Tensor, mask: torch.Tensor) -> float:
        counts = torch.bincount(codes[mask].int()).double()
        return float(-(counts * (counts / counts.sum()).log2()).nansum())

    smallest = canonical(coded)
    groups, size = smallest.num_groups, smallest.num_components
    random = torch.Generator().manual_seed(seed)
    shuffle = torch.rand(groups, size, generator=random).argsort(dim=1).to(torch.uint8)
    shuffled = look_up(shuffle, smallest.codes.view(groups, -1)).view(coded.shape)
    best = shared_entropy(smallest.codes, smallest.mask)
    assert best <= shared_entropy(shuffled, smallest.mask) + 1e-9


@pytest.mark.parametrize("chunk", [1 << 16, 7])
@pytest.mark.parametrize(("shape", "groups"), [((6, 8), 1), ((6, 8), 3), ((40, 2), 40)])
def test_codes_are_counted_and_looked_up_one_by_one(shape, groups, chunk, monkeypatch):
    monkeypatch.setattr(coded_module, "_CHUNK", chunk)
    coded = random_coded(shape, 5, groups=groups, nonzero_rate=0.6)
    codes, mask = coded.codes.view(groups, -1), coded.mask.view(groups, -1)
    counts = torch.zeros(groups, 5, dtype=torch.long)
    for group, place in mask.nonzero().tolist():
        counts[group, int(codes[group, place])] += 1
    assert torch.equal(count_codes(codes, mask, 5), counts)
    assert_same_bits(coded.dense(), slow_dense(coded))


def test_properties():
    coded = random_coded((6, 4), 5, groups=3, exact_half=False)
    assert (coded.shape, coded.num_groups, coded.num_components) == ((6, 4), 3, 5)
    assert coded.nonzeros == int((coded.dense() != 0).sum())
    assert coded.codebook_dtype == "float32"
    assert random_coded((6, 4), 5).codebook_dtype == "float16"


@pytest.mark.parametrize(
    ("codes", "mask", "codebook", "sentence"),
    [
        ([[0, 3]], [[True, True]], [[1.0, 2.0]], "Code 3 is outside of the codebook.*K = 2"),
        ([[0, 1]], [[True, False]], [[1.0, 2.0]], "Codes must be 0 where the mask is False"),
        ([[0, 1]], [[True]], [[1.0, 2.0]], r"Mask of shape \(1, 1\) does not fit codes of shape \(1, 2\)"),
        ([[0, 1]], [[True, True]], [[1.0, float("nan")]], "NaN or infinite"),
        ([[0, 1]], [[True, True]], [[1.0, 2.0]] * 3, "2 weights, which 3 codebooks cannot share"),
        ([[0, 1]], [[True, True]], [[1.0] * 257], "1 <= K <= 256"),
        ([[0, 1]], [[True, True]], [1.0, 2.0], r"shape \[G, K\]"),
        ([[]], [[]], [[1.0]], "0 weights"),
    ],
)
def test_what_cannot_be_is_refused(codes, mask, codebook, sentence):
    with pytest.raises(NetworkError, match=sentence):
        CodedTensor(
            torch.tensor(codes, dtype=torch.uint8),
            torch.tensor(mask, dtype=torch.bool),
            torch.tensor(codebook),
        )


def test_wrong_dtype():
    with pytest.raises(NetworkError, match=r"CodedTensor.codes must be a torch.uint8 tensor, but torch.int64"):
        CodedTensor(torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool), torch.ones(1, 1))


@pytest.mark.parametrize(
    ("scales", "sentence"),
    [
        (torch.ones(3), r"Scales of shape \[3\] do not fit a weight of shape \[2, 3\]"),
        (torch.ones(2, 1), r"Scales of shape \[2, 1\] do not fit"),
        (torch.tensor([1.0, 0.0]), "positive, finite numbers of float16"),
        (torch.tensor([1.0, float("nan")]), "positive, finite numbers of float16"),
        (torch.tensor([1.0, 1e6]), "positive, finite numbers of float16"),
        (torch.tensor([1.0, 1 / 3]), "round them to float16 first"),
        (torch.ones(2).half(), "CodedTensor.scales must be a torch.float32 tensor"),
    ],
)
def test_scales_that_cannot_be(scales, sentence):
    with pytest.raises(NetworkError, match=sentence):
        replace(random_coded((2, 3), 2), scales=scales)


def test_draws_share_their_scales():
    first, second = (random_coded((4, 3), 3, nonzero_rate=rate, scales=True) for rate in (0.4, 0.8))
    second = replace(second, codebook=first.codebook, scales=first.scales)
    stacked = stack_draws([first, second])
    assert torch.equal(stacked.dense(), torch.stack([first.dense(), second.dense()], -1))
    for other in (None, first.scales * 2):
        with pytest.raises(NetworkError, match="the same scales"):
            stack_draws([first, replace(second, scales=other)])


def test_parts_of_outputs_have_scales_of_their_own():
    plain = random_coded((4, 3, 2), 3)
    scales = torch.rand(4, 3).add_(0.5).half().float()
    in_parts = replace(plain, scales=scales)
    assert torch.equal(in_parts.dense(), plain.dense() * scales[:, :, None])
    assert torch.equal(canonical(in_parts).dense(), in_parts.dense())
    stacked = stack_draws([in_parts, in_parts])
    assert torch.equal(stacked.dense(), torch.stack([in_parts.dense()] * 2, -1))


@pytest.mark.parametrize("of", [(4,), (4, 1), (4, 2), (4, 6)])
def test_scales_of_smaller_blocks_are_the_same_scales(of):
    values, scales = torch.randn(4, 12), torch.rand(of)
    blocks = block_scales(scales, 6)
    assert blocks.shape == (4, 6) and torch.equal(scaled(values, blocks), scaled(values, scales))


def test_whole_numbers_times_scales_of_parts():
    numbers, scales = torch.tensor([[-3.0, 1.0, 2.0]]), torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    coded = replace(random_coded((2, 8), 3), codebook=numbers / 4, scales=scales)
    found, steps = coded.whole_numbers()
    assert found.dtype == torch.int8 and torch.equal(steps, scales / 4)
    assert torch.equal(scaled(found.float(), steps), coded.dense())


@pytest.mark.parametrize(("groups", "scales"), [(1, True), (1, 3), (4, True), (2, 6)])
def test_a_codebook_for_each_scale(groups, scales):
    coded = random_coded((4, 6), 3, groups=groups, scales=scales)
    plain = coded.unscaled()
    assert plain.scales is None and plain.num_groups == coded.scales.numel()
    assert torch.equal(plain.dense(), coded.dense())
    assert plain.unscaled() is plain
    with pytest.raises(NetworkError, match="4 scales do not divide 8 codebooks"):
        random_coded((4, 6), 3, groups=8, scales=True).unscaled()
