import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sqs_pyro.data.splits import stratified_split
from sqs_pyro.errors import DataError


@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=6), share=st.floats(0.01, 0.99))
def test_exact_size_and_the_share_of_each_class_within_one(counts: list[int], share: float):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    if len(labels) < 2:
        return
    held_out = min(max(1, round(share * len(labels))), len(labels) - 1)
    kept, held = stratified_split(labels, held_out, seed=0)
    assert len(held) == held_out
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(len(labels)))
    for label, count in enumerate(counts):
        assert abs(int((labels[held] == label).sum()) - count * held_out / len(labels)) <= 1


def test_the_seed_chooses_which():
    labels = torch.arange(100) % 10
    assert torch.equal(stratified_split(labels, 20, 0)[1], stratified_split(labels, 20, 0)[1])
    assert not torch.equal(stratified_split(labels, 20, 0)[1], stratified_split(labels, 20, 1)[1])


@pytest.mark.parametrize("held_out", [0, 10, 11])
def test_something_must_be_left_on_both_sides(held_out: int):
    with pytest.raises(DataError, match=f"{held_out} of 10 training examples .* from 1 to 9"):
        stratified_split(torch.zeros(10, dtype=torch.long), held_out, 0)
