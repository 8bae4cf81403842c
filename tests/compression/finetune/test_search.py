"""The search for the smallest file: where it looks next, what it takes, and what it says where nothing will do."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from sqs_pyro import compress
from sqs_pyro.compression.finetune.call import check_target, reachable_ratio
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.compression.finetune.search import Attempt, SearchRecipe, check_points, next_ratio, smallest
from sqs_pyro.data import ArrayLoader
from sqs_pyro.errors import RecipeError
from sqs_pyro.evaluation.classification import accuracy
from sqs_pyro.packing import size_report

LEARNED = {"prior": {"kind": "learned"}, "allocation": "rate_distortion", "num_components": 4, "layout": "entropy"}


def searched(loss, first, points=0.5, most=4):
    """The attempts of a search where files of a ratio lose what a function says."""
    attempts, ratio = [], first
    while ratio is not None:
        attempts.append(Attempt(ratio, ratio, round(1e6 / ratio), loss(ratio), 1))
        ratio = next_ratio(attempts, points, most - len(attempts))
    return attempts


def best(attempts, points=0.5):
    return max((each.target for each in attempts if each.points <= points), default=None)


@pytest.mark.parametrize("first", [8, 20, 50])
@pytest.mark.parametrize("slope", [1.4, 1.7, 2.5])
def test_a_power_law_is_found_within_a_few_attempts(first, slope):
    found = best(searched(lambda ratio: 0.5 * (ratio / 24) ** slope, first))
    assert 0.7 * 24 < found <= 24


def test_noise_leaves_it_near():
    rng = np.random.default_rng(0)
    found = [best(searched(lambda r: 0.5 * (r / 24) ** 1.7 + 0.1 * rng.normal(), 20)) / 24 for _ in range(20)]
    assert None not in found and 0.9 < np.mean(found) < 1.1 and min(found) > 0.6


def test_what_loses_nothing_is_made_smaller_and_smaller_until_it_cannot_be():
    ratios = [each.target for each in searched(lambda ratio: -0.1, 20)]
    assert len(ratios) == 4 and all(b > 1.2 * a for a, b in itertools.pairwise(ratios))
    attempts = [Attempt(20, 20, 1, -0.1, 1)]
    assert next_ratio(attempts, 0.5, 3, largest=30) == pytest.approx(30)
    assert next_ratio([Attempt(30, 30, 1, -0.1, 1)], 0.5, 3, largest=30) is None


def test_what_loses_too_much_is_made_larger_and_larger():
    ratios = [each.target for each in searched(lambda ratio: 40.0, 20)]
    assert len(ratios) >= 3 and all(b < a for a, b in itertools.pairwise(ratios))
    assert next_ratio([Attempt(20, 20, 1, 0.4, 1)], 0.5, 0) is None


def test_no_file_is_asked_to_be_larger_than_codewords_let_it_be():
    attempts = [Attempt(20, 20, 1, 0.54, 1), Attempt(10.5, 13.4, 1, 0.58, 1)]
    assert next_ratio([attempts[0], Attempt(10.5, 10.5, 1, 0.58, 1)], 0.5, 2) < 13
    assert 13.5 < next_ratio(attempts, 0.5, 2) < 20


def test_points_below_one_example_are_refused():
    check_points(SearchRecipe(points=0.1), 1000)
    with pytest.raises(RecipeError, match=r"is 0\.05, but one of 1,000 validation examples is worth 0\.1"):
        check_points(SearchRecipe(points=0.05), 1000)


def net():
    torch.manual_seed(0)
    wide = [nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *wide, nn.Linear(128, 3))


def data(batch=32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(192, 8, generator=generator)
    return ArrayLoader(x.view(-1, 1, 2, 4), x[:, :3].argmax(1), batch, shuffle=True)


@pytest.fixture(scope="module")
def trained():
    fp32 = net()
    optimizer = torch.optim.Adam(fp32.parameters(), 0.01)
    for _ in range(20):
        for x, y in data():
            optimizer.zero_grad()
            nn.functional.cross_entropy(fp32(x), y).backward()
            optimizer.step()
    return fp32


def test_the_smallest_that_is_good_enough_is_returned(trained, tmp_path):
    recipe = CompressionRecipe(epochs=4, **LEARNED)
    seen: dict[str, list[int]] = {}
    found = smallest(
        trained,
        data(),
        recipe,
        SearchRecipe(points=6, first_ratio=6, attempts=3),
        validation=data(),
        judge=accuracy,
        directory=tmp_path,
        progress=lambda name, record: seen.setdefault(name, []).append(record.step),
    )
    assert found.met and found.document(6)["unmet"] is None
    enough = [each for each in found.attempts if each.points <= 6]
    assert found.attempts[found.chosen] == min(enough, key=lambda each: each.bytes)
    assert [each.epochs for each in found.attempts] == [4, 2, 2]
    first, *further = seen.values()
    assert first[0] == 1 and all(steps[0] > 12 and steps[-1] == 24 for steps in further)
    lost = 100 * (accuracy(trained, data()) - accuracy(found.result.network, data()))
    assert found.attempts[found.chosen].points == pytest.approx(lost)
    later = found.attempts[1:]  # four codewords take fewer bits than the first would have
    assert all(each.ratio == pytest.approx(each.target, rel=0.05) for each in later)


def test_where_nothing_is_enough_the_best_comes_with_a_sentence(trained, tmp_path):
    search = SearchRecipe(points=0.6, first_ratio=20, attempts=2)
    found = smallest(
        trained,
        data(),
        CompressionRecipe(epochs=1, **LEARNED),
        search,
        validation=data(),
        judge=lambda net, loader: float(net is trained),  # packed ones know nothing
        directory=tmp_path,
    )
    assert not found.met and all(each.points == 100 for each in found.attempts)
    assert found.document(0.6)["unmet"].startswith("0.6 points cannot be met; 1e+02 at ratio")


def test_what_a_file_says_of_itself_counts_in_the_ratios_that_can_be_asked_for(trained, tmp_path):
    # A third of the smallest file, or more: of small networks a recipe's text is.
    metadata = {"said": np.random.default_rng(0).bytes(1500).hex()}
    recipe = CompressionRecipe(epochs=1, **LEARNED)
    plain, told = reachable_ratio(trained, recipe), reachable_ratio(trained, recipe, metadata)
    assert told < 0.6 * plain
    asked = recipe.model_copy(update={"target_ratio": (told + plain) / 2})
    check_target(trained, asked)
    with pytest.raises(RecipeError, match="what is not compressed"):  # before anything is trained for it
        check_target(trained, asked, metadata)
    found = smallest(
        trained,
        data(),
        recipe,
        SearchRecipe(points=50, first_ratio=1000, attempts=1),
        validation=data(),
        judge=accuracy,
        directory=tmp_path,
        metadata=metadata,
    )
    assert found.attempts[0].target == pytest.approx(0.8 * told)


def packed(trained, path, ratio, **call):
    recipe = {"epochs": 2, "target_ratio": ratio, **LEARNED, **call.pop("recipe", {})}
    result = compress(trained, data(), recipe, branch=path, **call)
    return {name: tensor.clone() for name, tensor in result.network.state_dict().items()}, result


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "recipe", [{}, {"allocation": "schedule"}, {"optimizer": "adamw", "learning_rate": 1e-3}], ids=str
)
def test_a_call_that_branches_off_is_the_whole_one_where_the_size_is_the_same(trained, tmp_path, recipe):
    path = tmp_path / "branch.pt"
    whole, _ = packed(trained, path, 16, recipe=recipe)
    kept = path.read_bytes()
    torch.manual_seed(99)  # whatever happened in between
    again, result = packed(trained, path, 16, recipe=recipe)
    assert same(whole, again) and path.read_bytes() == kept
    assert result.history[0].step == 1  # the first half is told, not done
    for ratio in (22, 13):
        other, result = packed(trained, path, ratio, recipe=recipe)
        assert not same(whole, other) and size_report(result.network).ratio == pytest.approx(ratio, rel=0.06)


def test_an_interrupted_branch_goes_on_from_its_own_checkpoint(trained, tmp_path):
    path, checkpoint = tmp_path / "branch.pt", tmp_path / "own.pt"
    packed(trained, path, 10)
    straight, _ = packed(trained, path, 16)

    def stop(record):
        if record.step >= 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packed(trained, path, 16, checkpoint=checkpoint, progress=stop)
    resumed, _ = packed(trained, path, 16, checkpoint=checkpoint)
    assert same(straight, resumed)


def test_a_branch_of_another_call_is_refused(trained, tmp_path):
    path = tmp_path / "branch.pt"
    packed(trained, path, 10)
    with pytest.raises(RecipeError, match="epochs"):
        packed(trained, path, 10, recipe={"epochs": 3})


def test_a_search_and_a_size_do_not_go_together():
    from sqs_pyro.recipes import parse
    from sqs_pyro.runs.recipe import RunRecipe

    base = {"network": {"name": "digits_net"}, "data": {"name": "digits"}, "search": {"points": 1}}
    with pytest.raises(RecipeError, match=r"no compression\.target_ratio \(20\) beside search"):
        parse(RunRecipe, {**base, "compression": {"target_ratio": 20}})
    with pytest.raises(RecipeError, match=r"layout 'auto', 'entropy' or 'adaptive' beside search, not 'bitmap'"):
        parse(RunRecipe, {**base, "compression": {"layout": "bitmap"}})
