"""Paired intervals against scipy's t-test, Holm's correction against its definition by rejections."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from kits.study import metrics, result

from sqs_pyro.reporting.paired import crossed_difference, holm, paired_difference
from sqs_pyro.reporting.study_summary import FIGURES, summarise


@pytest.mark.parametrize("n", [3, 5, 12])
def test_interval_and_p_are_those_of_the_paired_t_test(n):
    generator = np.random.default_rng(n)
    ours, theirs = generator.normal(0.1, 1.0, n), generator.normal(0.0, 1.0, n)
    found = paired_difference(list(ours), list(theirs))
    expected = scipy.stats.ttest_rel(ours, theirs)
    assert found.mean == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert found.p == pytest.approx(expected.pvalue)
    assert found.interval == pytest.approx(list(expected.confidence_interval(0.95)))


def test_the_interval_excludes_zero_where_p_is_below_five_percent():
    generator = np.random.default_rng(0)
    for shift in np.linspace(0, 3, 40):
        found = paired_difference(list(generator.normal(shift, 1.0, 5)), [0.0] * 5)
        low, high = found.interval
        assert (low > 0 or high < 0) == (found.p < 0.05)


def test_differences_without_spread_are_none_or_sure():
    none, sure = paired_difference([1.0] * 4, [1.0] * 4), paired_difference([3.0] * 4, [1.0] * 4)
    assert (none.mean, none.interval, none.p) == (0, [0, 0], 1)
    assert (sure.mean, sure.interval, sure.p) == (2, [2, 2], 0)


def test_two_seeds_have_no_interval():
    found = paired_difference([1.0, 2.0], [0.0, 0.0])
    assert (found.mean, found.interval, found.p) == (1.5, None, None)


def test_crossed_variance_is_that_of_mean_squares():
    """Against the analysis of variance: ``(MS of seeds + MS of examples - MS of the rest) / SN``."""
    generator = np.random.default_rng(0)
    d = generator.normal(0, 1, (6, 1)) + generator.normal(0, 2, (1, 40)) + generator.normal(0, 0.5, (6, 40))
    found = crossed_difference(d + 3, np.full_like(d, 3.0))
    seeds, examples = d.shape
    mean = d.mean()
    of_seeds = examples * ((d.mean(1) - mean) ** 2).sum() / (seeds - 1)
    of_examples = seeds * ((d.mean(0) - mean) ** 2).sum() / (examples - 1)
    rest = ((d - d.mean(1, keepdims=True) - d.mean(0) + mean) ** 2).sum() / ((seeds - 1) * (examples - 1))
    error = math.sqrt((of_seeds + of_examples - rest) / d.size)
    parts = (of_seeds / d.size) ** 2 / (seeds - 1) + (of_examples / d.size) ** 2 / (examples - 1)
    law = scipy.stats.t(error**4 / parts)
    assert found.mean == pytest.approx(mean)
    assert found.interval == pytest.approx([mean - law.ppf(0.975) * error, mean + law.ppf(0.975) * error])
    assert found.p == pytest.approx(2 * law.sf(abs(mean) / error))


@pytest.mark.parametrize(("of_seeds", "of_examples"), [(1.0, 0.0), (0.0, 5.0), (0.5, 3.0)])
def test_crossed_intervals_hold_what_they_should(of_seeds, of_examples):
    generator = np.random.default_rng(1)
    held = []
    for _ in range(400):
        effects = of_seeds * generator.normal(size=(5, 1)) + of_examples * generator.normal(size=(1, 60))
        low, high = crossed_difference(effects + generator.normal(size=(5, 60)), np.zeros((5, 60))).interval
        held.append(low < 0 < high)
    assert 0.92 < np.mean(held) < 0.99  # 0.95, and Satterthwaite's law errs to the safe side


def test_crossed_differences_without_spread_are_none_or_sure():
    ones = np.ones((4, 9))
    none, sure = crossed_difference(ones, ones), crossed_difference(3 * ones, ones)
    assert (none.mean, none.interval, none.p) == (0, [0, 0], 1)
    assert (sure.mean, sure.interval, sure.p) == (2, [2, 2], 0)
    assert crossed_difference(ones[:2], ones[:2]).interval is None


def rejected(p_values, level):
    """Holm's procedure as he states it: the smallest first, at level/m, level/(m-1), ..., until one is not."""
    kept = set()
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[i] > level / (len(p_values) - rank):
            break
        kept.add(int(i))
    return kept


@given(st.lists(st.floats(0, 1), max_size=9), st.sampled_from([0.01, 0.05, 0.2]))
def test_holm_rejects_what_his_procedure_rejects(p_values, level):
    adjusted = holm(p_values)
    clear = [not math.isclose(p, level, rel_tol=1e-9) for p in adjusted]  # not where rounding decides
    found = {i for i, p in enumerate(adjusted) if p <= level and clear[i]}
    assert found == {i for i in rejected(p_values, level) if clear[i]}


def _three(variant, nlls, **about):
    return [result(variant, seed, metrics(nll=nll), **about) for seed, nll in enumerate(nlls)]


def test_a_study_has_the_differences_from_its_reference():
    nlls = {"a": [0.30, 0.20, 0.25], "b": [0.28, 0.17, 0.24], "c": [0.31, 0.18, 0.26]}
    results = [each for variant, values in nlls.items() for each in _three(variant, values)]
    for reference in (None, "b"):
        summary = summarise("study", results, reference)
        chosen = reference or "a"
        assert summary["reference"] == chosen
        others = [point for point in summary["points"] if point["variant"] != chosen]
        tests = [scipy.stats.ttest_rel(nlls[point["variant"]], nlls[chosen]) for point in others]
        differences = [point["difference"]["nll"] for point in others]
        assert [d["p"] for d in differences] == pytest.approx([test.pvalue for test in tests])
        assert [d["p_holm"] for d in differences] == pytest.approx(holm([test.pvalue for test in tests]))
        own = next(point for point in summary["points"] if point["variant"] == chosen)
        assert own["difference"] == {}
        assert set(others[0]["difference"]) == set(FIGURES) & set(own["mean"])


def test_only_seeds_that_both_finished_are_paired():
    results = [*_three("a", [0.3, 0.2, 0.1, 0.4]), *_three("b", [0.5, 0.9, 0.2, 0.7])]
    results[1] = result("a", 1, None, error="Diverged.")
    difference = summarise("study", results)["points"][1]["difference"]["nll"]
    expected = scipy.stats.ttest_rel([0.5, 0.2, 0.7], [0.3, 0.1, 0.4])
    assert difference["p"] == pytest.approx(expected.pvalue)
    assert difference["interval"] == pytest.approx(list(expected.confidence_interval(0.95)))


def test_points_of_a_grid_are_compared_at_the_same_values():
    half, quarter = {"rate": 0.5}, {"rate": 0.25}
    results = [
        *_three("a", [0.1, 0.1], values=half),
        *_three("a", [0.3, 0.3], values=quarter),
        *_three("b", [0.5, 0.5], values=quarter),
        *_three("b", [0.5, 0.5], values={"rate": 0.125}),
    ]
    same, none = summarise("study", results)["points"][2:]
    assert same["difference"]["nll"]["mean"] == pytest.approx(0.2)
    assert none["difference"] == {}
    only = summarise("study", results[:2] + results[4:])["points"]
    assert [point["difference"]["nll"]["mean"] for point in only[1:]] == pytest.approx([0.4, 0.4])
