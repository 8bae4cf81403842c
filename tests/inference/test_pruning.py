"""The cubic schedule against its closed form, and masks whose counts are exact."""

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sqs_pyro.errors import DivergenceError, RecipeError
from sqs_pyro.inference.pruning import PruningSchedule

targets = st.floats(1e-3, 1.0)
fractions = st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda ends: ends[0] < ends[1])


@pytest.mark.parametrize("target", [0.05, 0.25, 1.0])
def test_rate_is_the_cubic_of_zhu_and_gupta(target):
    schedule = PruningSchedule(target, 1000, start=0.1, end=0.6)
    for step in range(1001):
        t = min(max(step, 100), 600)
        zeros = (1 - target) + (0 - (1 - target)) * (1 - (t - 100) / 500) ** 3  # their sparsity s_t, from 0
        assert schedule.rate(step) == pytest.approx(1 - zeros)


@given(targets, st.integers(1, 400), fractions)
@example(0.5, 5, (0.45, 0.5))  # the end, rounded to step 2, comes before the start at 2.25
def test_rate_falls_from_one_to_exactly_the_target(target, total, ends):
    schedule = PruningSchedule(target, total, *ends)
    rates = [schedule.rate(step) for step in range(total + 1)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))
    assert all(target <= rate <= 1 for rate in rates)
    assert rates[schedule.end_step] == target
    assert rates[0] == 1


@given(targets, st.integers(1, 400), fractions, st.integers(1, 50))
def test_masks_are_renewed_at_the_end_and_not_after(target, total, ends, every):
    schedule = PruningSchedule(target, total, *ends, every=every)
    due = [step for step in range(total + 1) if schedule.due(step)]
    assert due[-1] == schedule.end_step <= total
    assert all(step % every == 0 and schedule.rate(step) < 1 for step in due[:-1])


@given(
    targets,
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.sampled_from(["global", "layer"]),
    st.integers(1, 6),
    st.integers(0, 10_000),
)
def test_counts_are_exact_with_ties(target, sizes, scope, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    saliencies = {str(i): torch.randint(levels, (n, 2), generator=generator).float() for i, n in enumerate(sizes)}
    schedule = PruningSchedule(target, 100, scope=scope)
    masks = schedule.masks(saliencies, 100)
    assert {name: mask.shape for name, mask in masks.items()} == {n: s.shape for n, s in saliencies.items()}
    assert all(mask.dtype == torch.bool for mask in masks.values())
    counts = [int(mask.sum()) for mask in masks.values()]
    if scope == "layer":
        assert counts == [round(target * 2 * n) for n in sizes]
    else:
        assert sum(counts) == round(target * 2 * sum(sizes))
    pools = [(saliencies[n], masks[n]) for n in masks]
    if scope == "global":
        pools = [tuple(torch.cat([tensor[part].flatten() for tensor in pools]) for part in (0, 1))]
    for values, keep in pools:  # nothing that was left out beats anything kept
        if keep.any() and (~keep).any():
            assert values[keep].min() >= values[~keep].max()


def test_global_scope_compares_layers_and_layer_scope_does_not():
    saliencies = {"small": torch.rand(100), "large": torch.rand(100) + 1}
    masks = PruningSchedule(0.5, 10, scope="global").masks(saliencies, 10)
    assert not masks["small"].any() and masks["large"].all()
    masks = PruningSchedule(0.5, 10, scope="layer").masks(saliencies, 10)
    assert int(masks["small"].sum()) == int(masks["large"].sum()) == 50


def test_order_does_not_depend_on_scale_of_saliency():
    saliency = {"w": torch.rand(500)}
    schedule = PruningSchedule(0.3, 10)
    a = schedule.masks(saliency, 10)["w"]
    b = schedule.masks({"w": saliency["w"] * 1e-12}, 10)["w"]
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target": 1.5}, "target non-zero rate is 1.5, but must be above 0 and at most 1"),
        ({"target": 0.0}, "target non-zero rate is 0.0"),
        ({"target": float("nan")}, "target non-zero rate is nan"),
        ({"start": 0.6, "end": 0.4}, "starts at 0.6 and ends at 0.4"),
        ({"start": 0.4, "end": 0.4}, "0 <= start < end <= 1"),
        ({"start": -0.1}, "starts at -0.1"),
        ({"end": 1.1}, "ends at 1.1"),
        ({"total_steps": 0}, "total_steps=0 and every=20 must both be at least 1 step"),
        ({"every": 0}, "every=0"),
        ({"scope": "block"}, "scope 'block' is unknown: use 'global' or 'layer'"),
    ],
)
def test_impossible_values(options, sentence):
    with pytest.raises(RecipeError, match=sentence.replace("(", r"\(")):
        PruningSchedule(**{"target": 0.5, "total_steps": 100, **options})


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_nan_has_no_place_in_an_order(scope):
    saliencies = {"a": torch.ones(3), "b": torch.tensor([1.0, torch.nan, 2.0])}
    with pytest.raises(DivergenceError, match="The saliencies of 'b' hold NaN"):
        PruningSchedule(0.5, 10, scope=scope).masks(saliencies, 10)
