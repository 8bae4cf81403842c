"""One owner of every parameter: what is trained is what predicts, packs and is saved."""

import copy
import pickle

import pyro
import pytest
import torch
from torch import nn

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeGMMGuide, pack
from sqs_pyro.errors import NetworkError
from sqs_pyro.inference.guides.windows import EqualMass
from sqs_pyro.models import HierarchicalInclusion, LearnedPrior

X, Y = torch.linspace(-1, 1, 48).view(12, 4), torch.arange(12) % 3
PRIORS = {"scale_matched": lambda: None, "learned": LearnedPrior, "hierarchical": HierarchicalInclusion}


def pair(seed: int = 0, width: int = 6, prior=lambda: None):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
    model = BayesianNetwork(net, prior=prior(), num_data=12)
    return model, SpikeGMMGuide(model, num_components=3, estimator="straight_through")


def svi(model, guide, rate: float = 0.05) -> pyro.infer.SVI:
    return pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": rate}), loss=SQSELBO())


def train(model, guide, steps: int = 3) -> None:
    run = svi(model, guide)
    for step in range(steps):
        torch.manual_seed(step)  # what is drawn does not depend on what else is trained
        run.step(X, Y)


def values(model, guide) -> dict[str, torch.Tensor]:
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    state |= {f"guide.{name}": value for name, value in guide.state_dict().items()}
    return {name: value.clone() for name, value in state.items() if not name.endswith(("codes", "edges"))}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def stored() -> dict[str, torch.Tensor]:
    return dict(pyro.get_param_store().named_parameters())


@pytest.mark.parametrize("prior", PRIORS)
class TestTwoNetworksOfEqualNames:
    def alone(self, seed, prior):
        with pyro.get_param_store().scope():
            made = pair(seed, prior=PRIORS[prior])
            train(*made)
        return values(*made)

    def test_one_after_the_other(self, prior):
        expected = [self.alone(seed, prior) for seed in (0, 1)]
        first = pair(0, prior=PRIORS[prior])
        train(*first)
        second = pair(1, prior=PRIORS[prior])
        train(*second)
        assert_equal(values(*second), expected[1])
        assert_equal(values(*first), expected[0])

    def test_alternately_with_one_optimizer(self, prior):
        expected = [self.alone(seed, prior) for seed in (0, 1)]
        pairs = [pair(seed, prior=PRIORS[prior]) for seed in (0, 1)]
        optim = pyro.optim.Adam({"lr": 0.05})
        runs = [pyro.infer.SVI(*made, optim, loss=SQSELBO()) for made in pairs]
        for step in range(3):
            for run in runs:
                torch.manual_seed(step)
                run.step(X, Y)
        for made, wanted in zip(pairs, expected, strict=True):
            assert_equal(values(*made), wanted)

    def test_what_is_loaded_is_taken_by_whatever_reads_first(self, prior, tmp_path):
        made = pair(0, prior=PRIORS[prior])
        train(*made)
        expected = values(*made)
        pyro.get_param_store().save(tmp_path / "store")
        pyro.clear_param_store()
        again = pair(0, prior=PRIORS[prior])
        parameters = {id(p) for module in again for p in module.parameters()}
        pyro.get_param_store().load(tmp_path / "store")
        assert_equal(values(*again), expected)
        assert {id(p) for module in again for p in module.parameters()} == parameters  # optimizers know them


def packed_bias(model, guide):
    return pack(guide, leftover_dtype="float32")[2].bias


def called_bias(model, guide):
    svi(model, guide, rate=0.0).evaluate_loss(X, Y)
    return model._modules["net"][2].bias


READERS = {
    "pack": packed_bias,
    "net": lambda model, guide: model.net[2].bias,
    "state_dict": lambda model, guide: model.state_dict()["net.2.bias"],
    "parameters": lambda model, guide: dict(model.named_parameters())["net.2.bias"],
    "call": called_bias,
    "deepcopy": lambda model, guide: copy.deepcopy(model).net[2].bias,
    "pickle": lambda model, guide: pickle.loads(pickle.dumps(model)).net[2].bias,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_value_put_into_the_store_is_what_is_read(reader):
    model, guide = pair()
    value = torch.tensor([1.0, -2.0, 0.5])
    pyro.get_param_store()["net.2.bias"] = value
    assert torch.equal(READERS[reader](model, guide), value)


def dense(value) -> torch.Tensor:
    return value if torch.is_tensor(value) else value.dense()


@pytest.mark.parametrize("method", ["harden", "draw", "mean", "nonzero_rate", "saliencies", "freeze_codes"])
def test_guides_are_read_as_loaded(method):
    def asked(guide):
        torch.manual_seed(3)
        result = getattr(guide, method)()
        found = guide.harden() if result is None else result
        return found if isinstance(found, float) else [dense(value) for value in found.values()]

    made, other = pair(0), pair(1)
    train(*made, steps=6)
    state = copy.deepcopy(pyro.get_param_store().get_state())
    expected = asked(made[1])
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    found = asked(other[1])
    assert found == expected if method == "nonzero_rate" else all(map(torch.equal, found, expected))


def test_loaded_before_the_network_is_made():
    made = pair()
    train(*made)
    expected, state = values(*made), copy.deepcopy(pyro.get_param_store().get_state())
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    assert_equal(values(*pair()), expected)


def test_optimizer_state_goes_on(tmp_path):
    made = pair()
    run = svi(*made)
    for _ in range(3):
        run.step(X, Y)
    pyro.get_param_store().save(tmp_path / "store")
    run.optim.save(tmp_path / "optim")
    for _ in range(3):
        run.step(X, Y)
    expected = values(*made)

    pyro.clear_param_store()
    again = pair()
    pyro.get_param_store().load(tmp_path / "store")
    resumed = svi(*again)
    resumed.optim.load(tmp_path / "optim")
    for _ in range(3):
        resumed.step(X, Y)
    assert_equal(values(*again), expected)


def test_clearing_the_store_midway_changes_nothing():
    made = pair()
    run = svi(*made)
    for _ in range(2):
        run.step(X, Y)
        pyro.clear_param_store()
    other = pair()
    train(*other, steps=2)
    assert_equal(values(*made), values(*other))
    held = {id(p) for p in stored().values() if isinstance(p, nn.Parameter)}
    assert held <= {id(p) for module in other for p in module.parameters()}


def test_a_copy_is_its_own():
    made = pair()
    train(*made)
    twin = copy.deepcopy(made)
    before = values(*made)
    train(*twin)
    assert_equal(values(*made), before)
    assert any(not torch.equal(a, b) for a, b in zip(values(*twin).values(), before.values(), strict=True))


def test_other_shapes():
    train(*pair(width=6))
    train(*pair(width=8))  # the first one's are left to it
    state = copy.deepcopy(pyro.get_param_store().get_state())
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    with pytest.raises(
        NetworkError, match=r"holds 'net\.0\.bias' of shape \[8\], but this module's is of shape \[6\]"
    ):
        pair(width=6)


def test_what_nobody_uses_any_more_is_forgotten():
    for seed in range(4):
        made = pair(seed)
        train(*made, steps=1)
    del made
    assert len(pyro.get_param_store()._param_to_name) <= 2 * len(stored())


def test_constraints_of_the_store_count():
    """A value set under a name that the store did not know has no constraint there: it is the value itself."""
    _, guide = pair()
    site = guide.site_guides()["0.weight"]
    value = torch.full(site.scale.shape, 0.25)
    pyro.get_param_store()["sites.0/weight.scale"] = value
    torch.testing.assert_close(site.scale, value)


def test_local_parameters_leave_the_store_alone():
    with pyro.settings.context(module_local_params=True):
        model, guide = pair()
        SQSELBO()(model, guide)(X, Y).backward()
        assert not stored()
        assert model.net[2].bias.grad is not None


def test_the_users_network_can_be_pickled():
    model, guide = pair()
    net = model.net
    train(model, guide)
    assert torch.equal(pickle.loads(pickle.dumps(net))(X), net(X))


def pruned(guide):
    guide.prune({name: value > value.median() for name, value in guide.saliencies().items()})


def frozen(guide):
    """Codes that the latents, which move on with codebooks, would no longer choose."""
    pruned(guide)
    guide.freeze_codes()
    for site in guide.site_guides().values():
        site.loc = -site.loc.detach()


HOW_FAR = {
    "as made": lambda guide: None,
    "pruned": pruned,
    "frozen": frozen,
    "coded": lambda guide: guide.start_coding(),
}
WAYS = ("store", "store first", "state dict", "state dict last")


class TestWhatIsLoadedIsReadAsItWasSaved:
    """Masks, codes, window edges, stage and statistics say what parameters mean."""

    def made(self, seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
        model = BayesianNetwork(net, num_data=12)
        return model, SpikeGMMGuide(model, num_components=3, windows=EqualMass(8), estimator="straight_through")

    def loaded(self, way, store, states, earlier):
        """Another pair, with the same state by one of the ways there are."""
        pyro.clear_param_store()
        if way == "store first":
            pyro.get_param_store().set_state(store)
        other = self.made(1)
        if way in ("store", "state dict last"):
            pyro.get_param_store().set_state(earlier if way == "state dict last" else store)
        if way.startswith("state dict"):
            for module, state in zip(other, states, strict=True):
                module.load_state_dict(state)
        return other

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("how_far", HOW_FAR)
    def test_every_state_by_every_way(self, how_far, way):
        model, guide = self.made(0)
        train(model, guide)
        earlier = copy.deepcopy(pyro.get_param_store().get_state())
        HOW_FAR[how_far](guide)
        store = copy.deepcopy(pyro.get_param_store().get_state())
        states = [copy.deepcopy(module.state_dict()) for module in (model, guide)]
        packed, learning = pack(guide).eval()(X), [p.requires_grad for p in guide.parameters()]

        _, other = self.loaded(way, store, states, earlier)
        assert torch.equal(pack(other).eval()(X), packed)
        assert other.stage == guide.stage
        assert [p.requires_grad for p in other.parameters()] == learning
        assert_equal(
            {k: v.codes for k, v in other.harden().items()}, {k: v.codes for k, v in guide.harden().items()}
        )

    def test_frozen_codes_stay_in_training(self):
        model, guide = self.made(0)
        train(model, guide)
        frozen(guide)
        expected = {name: tensor.codes for name, tensor in guide.harden().items()}
        other = self.loaded("store", copy.deepcopy(pyro.get_param_store().get_state()), (), None)
        train(*other)
        assert_equal({name: tensor.codes for name, tensor in other[1].harden().items()}, expected)

    def test_states_without_a_stage(self):
        _, guide = self.made(0)
        state = {name: value for name, value in guide.state_dict().items() if not name.startswith("progress")}
        guide.freeze_codes()
        guide.load_state_dict(state)
        assert guide.stage == "frozen"

    def test_what_is_set_after_loading_stays(self):
        model, guide = self.made(0)
        train(model, guide)
        state = copy.deepcopy(pyro.get_param_store().get_state())
        _, other = self.made(1)
        pyro.clear_param_store()
        pyro.get_param_store().set_state(state)
        site = other.site_guides()["0.weight"]
        site.loc = torch.tensor([[1.0, 2.0, 3.0]])
        assert site.loc.tolist() == [[1.0, 2.0, 3.0]]

    def test_networks_of_equal_names_keep_their_own(self):
        pairs = [self.made(seed) for seed in (0, 1)]
        for made in pairs:
            train(*made)
        pruned(pairs[0][1])
        means = [model.net[1].running_mean.clone() for model, _ in pairs]
        rates = [guide.nonzero_rate() for _, guide in pairs]
        assert rates[0] == 0.5 and rates[1] == 1.0
        for made in reversed(pairs):
            svi(*made).evaluate_loss(X, Y)
        assert [guide.nonzero_rate() for _, guide in pairs] == rates
        assert not torch.equal(*means)
        store = pyro.get_param_store()
        known, shown = (
            [p for p in tensors if not isinstance(p, nn.Parameter)]
            for tensors in (store._param_to_name, store._params.values())
        )
        assert len(known) == len(shown)  # what is replaced is forgotten
