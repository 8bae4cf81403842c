"""The law of zeros, against its definition weight by weight, and against the bytes that it predicts."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqs_pyro.packing import CodedTensor, pack_tensor
from sqs_pyro.packing.odds import log2
from sqs_pyro.packing.urns import CONTEXTS, code_length, full_conditionals, inclusion_before

SHAPES = [(5, 4, 3, 3), (6, 7), (3, 1, 2, 2), (12,), (2, 9, 1)]


def random_mask(shape, rate=0.4, seed=0):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < rate
    mask.view(-1)[0], mask.view(-1)[-1] = True, False
    return mask


def structured_mask(outs=40, ins=30, seed=0):
    """Channels of very different rates, and kernels that are empty or nearly full."""
    generator = torch.Generator().manual_seed(seed)
    rate = torch.rand(outs, 1, 1, generator=generator) ** 3 * torch.rand(1, ins, 1, generator=generator)
    kernels = torch.rand(outs, ins, 1, generator=generator) < rate
    return (kernels & (torch.rand(outs, ins, 9, generator=generator) < 0.7)).view(outs, ins, 3, 3)


def entropy(mask):
    rate = float(mask.double().mean())
    return -mask.numel() * (rate * math.log2(rate) + (1 - rate) * math.log2(1 - rate))


def slow_log_odds(mask, mixing, others):
    """Return log odds in bits by the definition, from the weights before or from all others."""
    kernels = mask.reshape(mask.shape[0], mask.shape[1] if mask.dim() > 1 else 1, -1)
    outs, ins, positions = kernels.shape
    places = [(o, i, p) for o in range(outs) for i in range(ins) for p in range(positions)]
    share = float(mask.double().mean())
    found = torch.empty(kernels.shape, dtype=torch.float64)
    for o, i, p in places:
        seen = [
            place
            for place in places
            if place != (o, i, p) and (others or (place[0] + place[1], place[2]) < (o + i, p))
            if others or place[:2] == (o, i) or (place[0] + place[1]) < o + i
        ]
        contexts = [
            [place for place in seen if place[0] == o],
            [place for place in seen if place[1] == i],
            [place for place in seen if place[:2] == (o, i)],
            [place for place in seen if place[0] == o and place[2] == p],
            [place for place in seen if place[1] == i and place[2] == p],
        ]
        odds = math.log2(share / (1 - share)) + float(mixing[0]) / 32
        for weight, balls, context in zip(mixing[1:].tolist(), CONTEXTS.values(), contexts, strict=True):
            start = min(max(round(16 * balls * share), 1), 16 * balls - 1) / 16
            ones = sum(bool(kernels[place]) for place in context)
            zeros = len(context) - ones
            odds += weight / 32 * math.log2((ones + start) / start * (balls - start) / (zeros + balls - start))
        found[o, i, p] = odds
    return found.view(mask.shape)


@settings(max_examples=50)
@given(st.integers(1, 1 << 50))
def test_logarithms(number):
    assert int(log2(torch.tensor(number))) / 256 == pytest.approx(math.log2(number), abs=1.3 / 256)


@pytest.mark.parametrize("shape", SHAPES)
def test_probabilities_are_those_of_the_definition(shape):
    mask = random_mask(shape)
    inclusion, mixing = inclusion_before(mask)
    odds = torch.log2(inclusion / (1 - inclusion))
    # Each of ten logarithms is rounded, and weighed by |w|.
    torch.testing.assert_close(odds, slow_log_odds(mask, mixing, others=False), atol=0.05, rtol=0)


def test_probabilities_know_only_what_is_before():
    mask = random_mask((6, 5, 3, 3))
    mixing = torch.tensor([5, 20, -10, 30, 8, 40])
    out, into = torch.arange(6)[:, None, None], torch.arange(5)[:, None]
    when = (9 * (out + into) + torch.arange(9)).view(mask.shape)
    for moment in range(0, int(when.max()), 7):
        changed = mask.clone()
        late = mask[when >= moment]
        changed[when >= moment] = late[torch.randperm(len(late))]  # the number of non-zeros stays
        before, after = (inclusion_before(each, mixing)[0] for each in (mask, changed))
        assert torch.equal(before[when <= moment], after[when <= moment])


def test_all_others_speak_in_the_full_conditional():
    mask = random_mask((4, 5, 3, 3))
    _, mixing = inclusion_before(mask)
    found = full_conditionals(mask).elsewhere / math.log(2)
    torch.testing.assert_close(found.view(mask.shape), slow_log_odds(mask, mixing, others=True), atol=0.05, rtol=0)


def test_a_kernel_is_as_probable_as_its_weights_one_after_the_other():
    mask = structured_mask()[:, :, :2, :2]
    given = full_conditionals(mask)
    kernels = mask.reshape(*mask.shape[:2], -1)
    patterns = torch.tensor(list(itertools.product([False, True], repeat=4)))
    each = torch.stack([given.of_kernels(pattern.expand(kernels.shape)) for pattern in patterns])
    torch.testing.assert_close(each.exp().sum(0), torch.ones(kernels.shape[:2], dtype=torch.float64))
    # Weight by weight: the first one's odds are those given the other kernels alone.
    first = each[patterns[:, 0]].exp().sum(0)
    torch.testing.assert_close(first, given.outside[:, :, 0].sigmoid())


def test_an_empty_or_full_tensor_costs_nothing():
    for mask in (torch.zeros(4, 3, dtype=torch.bool), torch.ones(4, 3, dtype=torch.bool)):
        assert code_length(mask) == 0
        assert torch.isfinite(full_conditionals(mask).elsewhere).all()


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.9])
def test_zeros_without_structure_cost_their_entropy(rate):
    mask = random_mask((48, 32, 3, 3), rate)
    assert code_length(mask) <= entropy(mask) + 8 * (1 + len(CONTEXTS)) + 32


def test_zeros_with_structure_cost_less():
    mask = structured_mask()
    assert code_length(mask) < 0.75 * entropy(mask)


def test_a_channel_without_weights_is_nearly_free():
    mask = random_mask((32, 32, 3, 3), 0.3)
    mask[10:20] = False
    inclusion, _ = inclusion_before(mask)
    assert float(-(1 - inclusion[10:20]).log2().mean()) < 0.08  # of 0.74 bit a weight, had it no structure


@pytest.mark.parametrize("mask", [structured_mask(), random_mask((64, 50), 0.1), random_mask((300,), 0.5)])
def test_predicts_the_bytes_of_the_structured_layout(mask):
    coded = CodedTensor(torch.zeros(mask.shape, dtype=torch.uint8), mask, torch.ones(1, 1))
    packed = pack_tensor(coded, "structured")
    size = packed.num_bytes - packed.parts["codebook"].numel()
    assert 8 * size == pytest.approx(code_length(mask), rel=1e-3, abs=40)
