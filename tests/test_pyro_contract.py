"""DESIGN.md, section 4: the three lines Pyro users write, on networks that are not ours."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeAndSlab, SpikeGMMGuide

K = 4


def torchvision_case():
    """A small SqueezeNet, images of 32 pixels; its dropout off, so that a step can be compared with another."""
    from kits.networks_torchvision import squeezenet

    torch.manual_seed(0)
    net = squeezenet()
    net.classifier[0].p = 0.0
    return net, torch.randn(6, 3, 32, 32), torch.randint(3, (6,))


def transformers_case():
    """A tiny BERT; inputs come as a mapping, the output is an object with logits."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    net = transformers.BertForSequenceClassification(config)
    inputs = {"input_ids": torch.randint(50, (6, 9)), "attention_mask": torch.ones(6, 9, dtype=torch.long)}
    return net, inputs, torch.randint(3, (6,))


CASES = {"squeezenet": torchvision_case, "bert": transformers_case}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def made(net):
    model = BayesianNetwork(net, num_data=60)
    return model, SpikeGMMGuide(model, num_components=K, temperature=0.5, estimator="straight_through")


def state(module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def test_svi_as_printed(case):
    net, x, y = case
    model, guide = made(net)
    optim = pyro.optim.Adam({"lr": 2e-3})
    before = state(guide), state(model)

    svi = pyro.infer.SVI(model, guide, optim, loss=SQSELBO())
    losses = [svi.step(x, y) for _ in range(12)]

    assert losses[-1] < losses[0]
    assert isinstance(losses[0], float) and losses[0] == pytest.approx(losses[0])
    moved = {n for n, value in guide.named_parameters() if not torch.equal(value, before[0][n])}
    assert {n.rsplit(".", 1)[1] for n in moved} == {
        "latent_unconstrained",
        "gate_logit_unconstrained",
        "loc_unconstrained",
    }
    leftovers = {n for n, p in model.named_parameters() if p.requires_grad}
    still = {n for n, value in model.named_parameters() if torch.equal(value, before[1][n])}
    assert leftovers and not leftovers & still  # biases and norms of the user's network learn too
    assert {f"net.{name}" for name in guide.site_guides()} <= still  # its weights stay as they were
    assert svi.evaluate_loss(x, y) == pytest.approx(SQSELBO().loss(model, guide, x, y))


def test_module_form_as_printed(case):
    net, x, y = case
    model, guide = made(net)

    loss_fn = SQSELBO()(model, guide)
    loss_fn(x, y).backward()

    assert isinstance(loss_fn, torch.nn.Module)
    learning = [parameter for parameter in guide.parameters() if parameter.requires_grad]
    assert len(learning) == 3 * len(guide.site_guides())  # latents, gates, means
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in learning)
    leftovers = [p for p in model.parameters() if p.requires_grad]
    assert leftovers and all(p.grad is not None for p in leftovers)
    held = {id(parameter) for parameter in loss_fn.parameters()}
    assert {id(p) for p in (*guide.parameters(), *leftovers)} <= held


def test_module_form_learns_under_torch_optimizers(case):
    net, x, y = case
    loss_fn = SQSELBO()(*made(net))
    optimizer = torch.optim.AdamW([p for p in loss_fn.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = loss_fn(x, y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_both_forms_have_the_same_gradients(case):
    net, x, y = case
    model, guide = made(net)
    SQSELBO()(model, guide)(x, y).backward()
    by_module = {name: p.grad.clone() for name, p in guide.named_parameters() if p.requires_grad}
    guide.zero_grad()
    SQSELBO().loss_and_grads(model, guide, x, y)
    for name, gradient in by_module.items():
        torch.testing.assert_close(guide.get_parameter(name).grad, gradient)


def test_predictive_as_printed(case):
    net, x, _ = case
    model, guide = made(net)

    predictive = pyro.infer.Predictive(model, guide=guide, num_samples=20)
    samples = predictive(x)

    assert samples["obs"].shape == (20, 6)
    assert samples["logits"].reshape(20, 6, -1).isfinite().all()


def test_draws_in_evaluation_mode_are_discrete_networks(case):
    net, x, _ = case
    model = BayesianNetwork(net, num_data=60).eval()
    guide = SpikeGMMGuide(
        model, num_components=K, temperature=3.0, initial_gate=1.0, estimator="straight_through"
    ).eval()
    predictive = pyro.infer.Predictive(
        model, guide=guide, num_samples=5, return_sites=(*guide.site_guides(), "logits")
    )
    samples = predictive(x)
    for name, site in guide.site_guides().items():
        draws = samples[name].reshape(5, *site.shape)
        assert set(draws.unique().tolist()) <= {0.0, *site.loc.flatten().tolist()}
        assert (draws == 0).any() and (draws != 0).any()
        assert not torch.equal(draws[0], draws[1])
    assert float(samples["logits"].reshape(5, -1).std(0).max()) > 0  # the draws disagree: averaging does something


def test_sites_are_the_weights_of_linear_and_convolutions(case):
    net, _, _ = case
    expected = [
        f"{name}.weight"
        for name, module in net.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    ]
    model, guide = made(net)
    assert list(model.site_values()) == list(guide.site_guides()) == expected
    assert not any("embedding" in name for name in expected)


def test_trace_and_replay(case):
    net, x, y = case
    model, guide = made(net)
    guide_trace = poutine.trace(guide).get_trace(x, y)
    replayed = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x, y)
    for name in guide.site_guides():
        assert replayed.nodes[name]["value"] is guide_trace.nodes[name]["value"]
    again = poutine.trace(poutine.replay(model, trace=replayed)).get_trace(x, y)
    assert torch.equal(again.nodes["logits"]["value"], replayed.nodes["logits"]["value"])
    assert replayed.nodes["obs"]["scale"] == 10  # 60 examples, 6 at hand
    blocked = poutine.trace(poutine.block(guide, hide=list(guide.site_guides()))).get_trace(x, y)
    assert not [n for n, s in blocked.nodes.items() if s["type"] == "sample"]


def test_log_density_of_the_model(case):
    net, x, y = case
    model, _ = made(net)
    conditioned = poutine.condition(model, data=model.site_values())
    trace = poutine.trace(conditioned).get_trace(x, y)
    prior = sum(model.priors[name].log_prob(value) for name, value in model.site_values().items())
    logits = trace.nodes["logits"]["value"]
    likelihood = 10 * dist.Categorical(logits=logits).log_prob(y).sum()
    torch.testing.assert_close(trace.log_prob_sum(), prior + likelihood)


def test_parameter_store_holds_the_modules_own_parameters(case):
    net, x, y = case
    model, guide = made(net)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=SQSELBO())
    svi.step(x, y)
    store = pyro.get_param_store()
    of_net = {f"net.{n}" for n, p in model.net.named_parameters() if p.requires_grad}
    assert {name.removeprefix("model$$$") for name in store} >= of_net
    held = {id(p) for p in store._params.values() if isinstance(p, torch.nn.Parameter)}
    assert {id(p) for p in guide.parameters()} <= held
    svi.step(x, y)
    assert {id(p) for p in store._params.values() if isinstance(p, torch.nn.Parameter)} == held


def test_a_second_model_after_the_store_is_cleared():
    losses = []
    for _ in range(2):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        x, y = torch.randn(10, 4), torch.randint(3, (10,))
        model, guide = made(net)
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=SQSELBO())
        losses.append([svi.step(x, y) for _ in range(5)])
    assert losses[0] == losses[1]


def test_two_models_at_once_with_module_local_parameters():
    x, y = torch.randn(10, 4), torch.randint(3, (10,))
    with pyro.settings.context(module_local_params=True):
        one, two = (SQSELBO()(*made(torch.nn.Sequential(torch.nn.Linear(4, 3)))) for _ in range(2))
        before = float(one(x, y).detach()), float(two(x, y).detach())
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.add_(0.1)
        after = float(one(x, y).detach()), float(two(x, y).detach())
    assert before[0] != after[0] and before[1] == after[1]
    assert list(pyro.get_param_store()) == []


class TestPlainPyroModel:
    """A model without any network: only ``init`` has to be given."""

    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(1))
    true = torch.tensor([1.0] * 3 + [-1.0] * 3 + [0.0] * 6)

    def model(self, x, y=None):
        w = pyro.sample("w", SpikeAndSlab(0.5, dist.Normal(0.0, 1.0)).expand((12,)).to_event(1))
        with pyro.plate("data", 200, subsample_size=len(x)):
            return pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)

    def test_svi_and_predictive(self):
        y = self.x @ self.true + 0.3 * torch.randn(200)
        start = torch.linalg.lstsq(self.x, y[:, None]).solution[:, 0] + 0.3 * torch.randn(12)
        guide = SpikeGMMGuide(
            self.model, num_components=3, init={"w": start}, initial_gate=2.0, temperature=0.5, estimator="soft"
        )
        svi = pyro.infer.SVI(self.model, guide, pyro.optim.Adam({"lr": 0.05}), loss=SQSELBO())
        losses = [svi.step(self.x, y) for _ in range(150)]
        assert losses[-1] < 0.3 * losses[0]
        mean = guide.distribution(guide.site_guides()["w"]).mean.detach()
        torch.testing.assert_close(mean, self.true, atol=0.1, rtol=0)
        draws = pyro.infer.Predictive(self.model, guide=guide.eval(), num_samples=20)(self.x)
        assert draws["y"].shape == (20, 200)

    def test_straight_through_does_not_run_away(self):
        """The KL alone once drew σ to the prior's width; hard codes followed, and the loss rose a hundredfold.

        Single steps may be far off: a latent at the edge between two codewords goes back and forth.
        """
        y = self.x @ self.true + 0.3 * torch.randn(200)
        start = torch.linalg.lstsq(self.x, y[:, None]).solution[:, 0]
        guide = SpikeGMMGuide(
            self.model, num_components=3, init={"w": start}, initial_gate=2.0, estimator="straight_through"
        )
        svi = pyro.infer.SVI(self.model, guide, pyro.optim.Adam({"lr": 0.02}), loss=SQSELBO())
        losses = [svi.step(self.x, y) for _ in range(400)]
        assert torch.tensor(losses[200:]).median() < min(losses) + 30

    def test_subsampling_plate_scales(self):
        guide = SpikeGMMGuide(
            self.model, num_components=3, init={"w": self.true.clone() + 0.01}, estimator="straight_through"
        )
        half = self.x[:100]
        terms = SQSELBO().terms(self.model, guide, half, half @ self.true)
        drawn = guide.harden(torch.float32)["w"].dense()
        expected = -2 * dist.Normal(half @ drawn, 0.3).log_prob(half @ self.true).sum()
        torch.testing.assert_close(terms.nll, expected)
