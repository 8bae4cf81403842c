"""What is judged is what ships: folding and rounding keep a network's function, whatever it is made of."""

import copy
import functools
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from sqs_pyro import BayesianNetwork, SpikeGMMGuide, compress, pack, pack_ensemble, save, size_report
from sqs_pyro.errors import NetworkError, RecipeError
from sqs_pyro.evaluation.first_minibatch import first_inputs
from sqs_pyro.packing.leftovers import round_to
from sqs_pyro.shipping.agreement import check_agreement, first_difference
from sqs_pyro.shipping.batch_norm import fold_batch_norm, reestimate_batch_norm
from sqs_pyro.shipping.shipped import shipped_network
from sqs_pyro.testing.shipped import assert_shipped, outputs

X, Y = torch.randn(48, 8, generator=torch.Generator().manual_seed(0)), torch.arange(48) % 3
RECIPE = {"epochs": 1, "num_components": 4, "nonzero_rate": 0.5, "batch_norm_batches": 2}


def data(x: torch.Tensor = X) -> DataLoader:
    return DataLoader(TensorDataset(x, Y), 16)


class Normed(nn.Module):
    """Two linear layers with a batch norm behind each; ``change`` makes something of the norms."""

    def __init__(self, change=None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.n1, self.n2 = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        for norm in (self.n1, self.n2):
            nn.init.normal_(norm.weight, 1, 0.3), nn.init.normal_(norm.bias)
            norm.running_mean.normal_(0, 2), norm.running_var.uniform_(0.05, 4)
        if change is not None:
            change(self)

    def forward(self, x):
        return self.fc(self.n2(self.c(self.n1(self.a(x)).relu())).relu())


class Doubled(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) + self.running_mean


class Remembered(nn.BatchNorm1d):
    """Its own forward, with a momentum that must be a number."""

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.running_mean += self.momentum * (x.mean(0) - self.running_mean)
                self.running_var += self.momentum * (x.var(0) - self.running_var)
        return (x - self.running_mean) / (self.running_var + self.eps).sqrt() * self.weight + self.bias


def replaced(kind):
    def change(net):
        norm = kind(8)
        norm.load_state_dict(net.n1.state_dict())
        net.n1 = norm

    return change


def tie(*names):
    def change(net):
        for name in names:
            setattr(net.n2, name, getattr(net.n1, name))

    return change


def set_to(**values):
    def change(net):
        with torch.no_grad():
            for name, value in values.items():
                getattr(net.n1, name)[:3] = value

    return change


NORMS = {
    "plain": None,
    "tied affine": tie("weight", "bias"),
    "tied bias": tie("bias"),
    "shared statistics": tie("running_mean", "running_var"),
    "one module twice": lambda net: setattr(net, "n2", net.n1),
    "a view of other statistics": lambda net: net.n2.register_buffer("running_mean", net.n1.running_mean[:]),
    "weight is the other's bias": lambda net: setattr(net.n2, "weight", net.n1.bias),
    "not affine": lambda net: setattr(net, "n1", nn.BatchNorm1d(8, affine=False)),
    "no statistics": lambda net: setattr(net, "n1", nn.BatchNorm1d(8, track_running_stats=False)),
    "no momentum": lambda net: setattr(net.n1, "momentum", None),
    "synchronised": replaced(nn.SyncBatchNorm),
    "own forward on top": replaced(Doubled),
    "own forward": replaced(Remembered),
    "frozen": lambda net: net.n1.requires_grad_(False),
    "variance 0": set_to(running_var=0.0),
    "variance 1e-30": set_to(running_var=1e-30),
    "mean 1e6, variance 1e-6": set_to(running_mean=1e6, running_var=1e-6),
    "mean 1e6": set_to(running_mean=1e6),
    "gamma 0": set_to(weight=0.0),
    "gamma 1e-30": set_to(weight=1e-30),
    "gamma infinite": set_to(weight=float("inf")),
}


@pytest.mark.parametrize("name", NORMS)
def test_folding_keeps_outputs_whatever_the_norms_are(name):
    net = Normed(NORMS[name]).eval()
    folded = copy.deepcopy(net)
    fold_batch_norm(folded)
    torch.testing.assert_close(folded(X), net(X), rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", ["plain", "synchronised", "frozen", "no momentum", "gamma 0", "one module twice"])
def test_what_can_be_folded_is(name):
    net = Normed(NORMS[name]).eval()
    fold_batch_norm(net)
    assert torch.equal(net.n1.running_var, torch.ones(8)) or name == "one module twice"
    assert torch.equal(net.n2.running_mean, torch.zeros(8))


@pytest.mark.parametrize("name", ["plain", "tied affine", "own forward on top", "own forward"])
@pytest.mark.parametrize("include", [None, ["weight$"]])
def test_packed_equals_hard_with_every_kind_of_norm(name, include):
    result = compress(Normed(NORMS[name]), data(), {**RECIPE, "include": include})
    assert_shipped(result, X)


def test_a_forward_that_reads_its_norms_statistics_is_not_folded():
    class Reads(Normed):
        def forward(self, x):
            return super().forward(x) + self.n1.running_mean.sum()

    net = Reads().eval()
    torch.testing.assert_close(shipped_network(net, (), "float32", X)(X), net(X), rtol=1e-4, atol=1e-4)


def test_reestimation_puts_everything_back_after_an_error():
    net = Normed().train()
    net.n2.eval()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError):
        reestimate_batch_norm(net, [(X, None), (X[:, :3], None)], 2)
    assert net.training and net.n1.training and not net.n2.training and net.n1.momentum == 0.1
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class TestRounding:
    @pytest.mark.parametrize(
        "values, survives",
        [
            ([0.1, -0.2, 0.0], True),
            ([0.1, 2e-5], True),  # fewer digits, beside larger ones
            ([0.1, 1e-9], False),
            ([1e-6, 2e-6], False),
            ([3e-9], False),
            ([1.0, 70000.0], False),
            ([0.0, 0.0], True),
            ([6e-8, 1.2e-7], False),
            ([1.0, float("inf")], True),
        ],
    )
    def test_only_where_values_survive(self, values, survives):
        value = torch.tensor(values)
        expected = value.half().float() if survives else value
        assert torch.equal(round_to(value, "float16"), expected)

    @pytest.mark.parametrize(
        "offset, spread", [(0.0, 3e-9), (20007.37, 0.5), (1.7e9, 3e5), (0.0, 1e8), (-1e5, 1.0)]
    )
    @pytest.mark.parametrize("kind", ["buffer", "frozen parameter", "bias"])
    def test_units_of_the_inputs_keep_their_meaning(self, offset, spread, kind):
        class Measured(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(1)
                self.inner = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
                self.scale = nn.Linear(8, 8)
                with torch.no_grad():
                    self.scale.weight.copy_(torch.eye(8))
                    self.scale.bias.fill_(-offset)
                mean, std = torch.full((8,), offset), torch.full((8,), spread)
                if kind == "frozen parameter":
                    self.mean, self.std = nn.Parameter(mean, False), nn.Parameter(std, False)
                else:
                    self.register_buffer("mean", mean), self.register_buffer("std", std)

            def forward(self, x):
                centred = self.scale(x) if kind == "bias" else x - self.mean
                return self.inner(centred / self.std)

        x = X * spread + offset
        net = Measured().eval()
        shipped = shipped_network(net, ["inner.0.weight", "inner.2.weight"], "float16", x)
        with torch.no_grad():
            expected, found = net(x), shipped(x)
        assert float((found - expected).abs().max() / expected.abs().max()) < 0.05

    def test_buffers_are_shipped_exactly(self):
        net = Normed()
        values = {"time": 1.7e9 + 1.0, "count": 123457.0, "tiny": 1e-9, "odd": 2049.0}
        for name, value in values.items():
            net.register_buffer(name, torch.tensor(value))
        result = compress(net, data(), RECIPE)
        assert {name: getattr(result.network, name).item() for name in values} == {
            name: torch.tensor(value).item() for name, value in values.items()
        }


def test_validation_judges_what_ships():
    """The judge sees codewords and parameters of float16, and folded norms, in every stage."""
    seen = []

    def judge(net, _):
        seen.append((net.n1.running_var.unique().tolist(), torch.equal(net.n1.bias, net.n1.bias.half().float())))
        return 0.5

    compress(Normed(), data(), {**RECIPE, "epochs": 4}, validation=[0], judge=judge)
    assert seen[-4:] == [([1.0], True)] * 4  # the first is the try of the judge before training


class TestAgreement:
    def nets(self):
        net = Normed().eval()
        return net, copy.deepcopy(net)

    def test_equal_networks_agree(self):
        net, other = self.nets()
        other.c.weight.data += 1e-7
        assert first_difference(net, other, X, 1e-3) is None

    @pytest.mark.parametrize("name", ["a", "n1", "c", "fc"])
    def test_names_the_first_module(self, name):
        net, other = self.nets()
        other.get_submodule(name).bias.data += 1.0
        assert first_difference(net, other, X, 1e-3).module == name
        with pytest.raises(
            NetworkError, match=f"Packed, module '{name}' gives other outputs than with dense weigh"
        ):
            check_agreement(net, other, X)

    def test_leaves_networks_and_random_states_alone(self):
        net, other = self.nets()
        net.train(), net.c.eval()
        net.register_buffer("calls", torch.zeros(()))
        count = net.register_forward_pre_hook(_count)
        state = torch.get_rng_state()
        other.fc.bias.data += 1.0
        assert first_difference(net, other, X, 1e-3) is not None
        count.remove()
        assert net.training and not net.c.training and net.calls == 0 and torch.equal(state, torch.get_rng_state())
        assert not any(module._forward_hooks for module in net.modules())

    def test_torchs_randomness_is_no_difference_and_other_randomness_is_said(self):
        net, other = nn.Sequential(Normed(), Noisy()).eval(), nn.Sequential(Normed(), Noisy()).eval()
        assert first_difference(net, other, X, 1e-3) is None
        net[1].own = other[1].own = torch.Generator().manual_seed(0)
        assert not first_difference(net, other, X, 1e-3).repeatable

    def test_a_result_says_that_its_network_cannot_be_compared(self):
        net = nn.Sequential(nn.Linear(8, 3), Noisy(torch.Generator().manual_seed(0)))
        assert "unrepeatable" in [finding.kind for finding in compress(net, data(), RECIPE).findings]


def _count(module, _):
    module.calls.add_(1)


class Noisy(nn.Module):
    def __init__(self, own=None):
        super().__init__()
        self.own = own

    def __deepcopy__(self, memo):
        return Noisy(self.own)

    def forward(self, x):
        return x + torch.randn(x.shape, generator=self.own)


class Standardised(nn.Conv1d):
    """A weight-standardised convolution: torch's forward, another `_conv_forward`."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, (weight - weight.mean()) / weight.std(), bias)


class Gated(nn.Linear):
    """A linear layer with a parameter that its parent reads."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(()))


class ReadsGain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Gated(8, 3)

    def forward(self, x):
        return self.layer(x) * self.layer.gain


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Unflatten(1, (2, 4)), Standardised(2, 6, 3), nn.Flatten(), nn.Linear(12, 3)),
        ReadsGain(),
    ],
    ids=["own _conv_forward", "own parameter"],
)
def test_subclasses_compute_what_they_computed(net):
    assert_shipped(compress(net, data(), RECIPE), X)


class TestBeforeTraining:
    """What cannot ship is refused before the first step, in one sentence."""

    def refused(self, net, recipe=None, x=X, **options):
        steps = []
        with pytest.raises(NetworkError) as raised:
            compress(net, data(x), {**RECIPE, **(recipe or {})}, progress=steps.append, **options)
        assert not steps and "\n" not in str(raised.value)
        return str(raised.value)

    def test_recurrent_weights(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.rnn, self.fc = nn.GRU(8, 4), nn.Linear(4, 3)

            def forward(self, x):
                return self.fc(self.rnn(x)[0])

        assert "GRU keeps or rewrites its weights" in self.refused(Net(), {"include": ["weight"]})

    def test_embeddings_that_renormalise_their_rows(self):
        net = nn.Sequential(nn.Embedding(50, 8, max_norm=1.0), nn.Flatten(), nn.Linear(64, 3))
        words = torch.randint(0, 50, (48, 8))
        assert "Embedding keeps or rewrites" in self.refused(net, {"include": ["weight"]}, words)

    def test_state_that_is_no_tensor(self):
        class Net(nn.Linear):
            def get_extra_state(self):
                return {"vocabulary": ["a"]}

            def set_extra_state(self, state):
                pass

        assert "only tensors can be stored" in self.refused(nn.Sequential(Net(8, 3)))

    def test_a_dtype_that_no_file_holds(self):
        net = nn.Sequential(nn.Linear(8, 3))
        net.register_buffer("table", torch.zeros(4, dtype=torch.float8_e4m3fn))
        assert "'table' is torch.float8_e4m3fn, which cannot be stored" in self.refused(net)

    def test_a_layout_too_narrow_for_the_codebook(self):
        with pytest.raises(RecipeError, match="at most 255 beside layout 'dense', not 256"):
            compress(nn.Linear(8, 96), data(), {"layout": "dense", "num_components": 256})

    def test_metadata_that_is_no_json(self):
        assert (
            "metadata" in self.refused(nn.Sequential(nn.Linear(8, 3)), metadata={"net": nn.Linear(1, 1)}).lower()
        )

    def test_a_network_that_cannot_be_copied(self):
        net = nn.Sequential(nn.Linear(8, 3))
        net[0].lock = threading.Lock()
        assert "cannot be copied" in self.refused(net)

    def test_a_forward_that_needs_what_was_computed_before(self):
        class Net(nn.Linear):
            def __init__(self):
                super().__init__(8, 3)
                self.doubled = self.weight * 2

            def forward(self, x):
                return super().forward(x) + x @ self.doubled.T

        assert "reads '0.doubled', a tensor that was computed from others" in self.refused(nn.Sequential(Net()))

    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # without gradients
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_forward_that_runs_again_in_the_backward_pass(self, reentrant):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

            def forward(self, x):
                return self.c(checkpoint(self.b, self.a(x), use_reentrant=reentrant).relu())

        assert "recomputes activations in the backward pass" in self.refused(Net())

    @pytest.mark.parametrize("kept", [lambda h: h, lambda h: [h]])
    @pytest.mark.parametrize("has_run", [False, True])
    def test_activations_that_a_forward_leaves_behind_are_no_obstacle(self, kept, has_run):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.c, self.last = nn.Linear(8, 8), nn.Linear(8, 3), None

            def forward(self, x):
                hidden = self.a(x).relu()
                self.last = kept(hidden)
                return self.c(hidden)

        net = Net()
        if has_run:
            net(X)
        before = net.last
        result = compress(net, data(), {**RECIPE, "distillation": {}}, validation=data())
        assert_shipped(result, X)
        assert net.last is before

    def test_inputs_that_a_forward_writes_into_are_compared_as_they_were(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(8, 3)

            def forward(self, x):
                return self.layer(x.mul_(2))

        before = X.clone()
        result = compress(Net(), data(), RECIPE)
        assert result.findings == [] and torch.equal(X, before)

    def test_a_child_of_the_name_that_packing_takes(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.w, self.packed_w = nn.Parameter(torch.randn(8, 3)), nn.Identity()

            def forward(self, x):
                return self.packed_w(x @ self.w)

        assert "'packed_w'" in self.refused(Net(), {"include": ["^w$"]})


@pytest.fixture(scope="module")
def result():
    return compress(Normed(), data(), RECIPE, metadata={"kept": 1})


class TestPackHonoursItsArguments:
    def test_nothing_asked_is_the_result_itself(self, result):
        assert pack(result) is result.network and pack(result, inputs=X) is result.network

    @pytest.mark.parametrize("layout", ["dense", "bitmap", "entropy"])
    def test_layout(self, result, layout):
        packed = pack(result, layout=layout)
        assert {tensor.layout for tensor in size_report(packed).tensors} == {layout}
        torch.testing.assert_close(packed(X), result.hard(X), rtol=1e-5, atol=1e-5)

    def test_metadata(self, result):
        about = pack(result, metadata={"mine": 2}).packed_metadata
        assert (about["mine"], about["kept"], about["recipe"]) == (2, 1, result.network.packed_metadata["recipe"])

    def test_leftovers_are_those_from_before_rounding(self, result):
        packed = pack(result, leftover_dtype="float32", inputs=X)
        assert torch.equal(packed.fc.bias, result.unrounded.fc.bias)
        assert not torch.equal(packed.fc.bias, result.hard.fc.bias)
        assert size_report(packed).uncompressed > size_report(result.network).uncompressed
        ensemble = pack_ensemble(result, 2, leftover_dtype="float32")
        assert torch.equal(ensemble.network.fc.bias, result.unrounded.fc.bias)

    def test_codebooks(self, result):
        packed = pack(result, codebook_dtype="float32")
        dense = packed.a.weight.unique()
        loc = result.guide.site_guides()["a.weight"].loc
        assert all((loc == value).any() for value in dense[dense != 0])

    @pytest.mark.parametrize("option", ["layout", "leftover_dtype", "codebook_dtype"])
    def test_what_there_is_not(self, result, option):
        with pytest.raises(NetworkError, match="float17"):
            pack(result, **{option: "float17"})

    def test_a_result_without_a_guide(self, result):
        class Other:
            network = result.network

        with pytest.raises(NetworkError, match="pack cannot honour layout, metadata for a Other"):
            pack(Other(), layout="dense", metadata={})

    def test_a_guide_is_folded_and_rounded_like_a_result(self, tmp_path):
        model = BayesianNetwork(Normed().eval(), num_data=48)
        packed = pack(SpikeGMMGuide(model, 4, estimator="straight_through"), inputs=X)
        assert torch.equal(packed.n1.running_var, torch.ones(8))
        save(packed, tmp_path / "net")


def test_reading_the_first_inputs_changes_nothing():
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(X, Y), 16, shuffle=True, generator=generator)
    state, own = torch.get_rng_state(), generator.get_state()
    first = first_inputs(loader, nn.Identity())
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(own, generator.get_state())
    assert torch.equal(first, next(iter(loader))[0])
    assert first_inputs([], nn.Identity()) is None


def test_kit_looks_at_every_output():
    class Two(nn.Module):
        def forward(self, x):
            return {"logits": x, "more": (x + 1, [x + 2])}

    assert len(outputs(Two(), X)) == 3


class Calls(nn.Module):
    """Two layers; ``through`` says how the forward reaches the first."""

    def __init__(self, through):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.reach = through(self)

    def forward(self, x):
        return self.last(self.reach(x).relu())

    def by_itself(self, x):
        return self.first(x)


class TestCopiesStandAlone:
    @pytest.mark.parametrize(
        "through",
        [
            lambda net: lambda x: net.first(x),
            lambda net: lambda x: x @ net.first.weight.T,
            lambda net: (lambda forward: lambda x: forward(x))(net.by_itself),
        ],
        ids=["module", "parameter", "method"],
    )
    def test_a_function_that_has_the_network_in_it_is_told(self, through):
        with pytest.raises(NetworkError, match=r"still computes with 'first.weight' of the original"):
            compress(Calls(through), data(), RECIPE)

    @pytest.mark.parametrize(
        "through",
        [
            lambda net: net.by_itself,
            lambda net: functools.partial(Calls.by_itself, net),
            lambda net: lambda x: x * len(net.__dict__) * net.first.weight.shape[0],
        ],
        ids=["method", "partial", "shape"],
    )
    def test_what_is_copied_with_it_is_right(self, through):
        result = compress(Calls(through), data(), RECIPE)
        assert_shipped(result, X)


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_last_accuracy_is_that_of_the_file(epochs):
    """Statistics are estimated anew after the last step, and with few steps masks and codes change, too."""
    net = Normed().train()
    result = compress(net, data(), {**RECIPE, "epochs": epochs}, validation=data(), judge=_mean_logit)
    assert result.history[-1].score == _mean_logit(result.hard, data())
    assert result.history[-1].score == pytest.approx(_mean_logit(result.network, data()), rel=1e-5)


def _mean_logit(net, loader):
    with torch.no_grad():
        return -float(torch.cat([net(x) for x, _ in loader]).square().mean())
