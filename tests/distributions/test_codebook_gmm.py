"""CodebookGMM against the explicit SpikeGMM with the same logits; its hand-written gradients against autograd."""

import pyro.distributions as dist
import pytest
import torch
from torch.autograd import gradcheck

from sqs_pyro.distributions import Codebook, SpikeAndSlab, SpikeGMM, kl_bound, monte_carlo_kl
from sqs_pyro.distributions.assignment import ExpectedDivergence, HardValue, assignment_logits, map_codes
from sqs_pyro.distributions.codebook_gmm import CodebookGMM, LatentSpikeAndSlab

F64 = torch.float64
GROUPS = {"layer": 1, "channel": 6, "tile": 12}  # of a weight of shape [6, 4, 2]


def parameters(groups: int, components: int = 5, shape: tuple[int, ...] = (6, 4, 2), seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=F64, generator=generator)

    return {
        "gates": normal(*shape).sigmoid(),
        "latent": normal(*shape),
        "loc": normal(groups, components),
        "scale": 0.3 * normal(groups, components).exp(),
        "log_mixing": normal(groups, components).log_softmax(-1),
    }


def explicit(gates, latent, loc, scale, log_mixing, temperature=0.7, anchor=None, **options) -> SpikeGMM:
    """The same law with every tensor written out per weight: `[*shape, K]`."""
    anchor = latent if anchor is None else anchor
    per_group = latent.numel() // len(loc)

    def rows(codebook: torch.Tensor) -> torch.Tensor:
        return codebook.repeat_interleave(per_group, 0).reshape(*latent.shape, -1)

    logits = rows(log_mixing) + dist.Normal(rows(loc), rows(scale)).log_prob(anchor.unsqueeze(-1))
    return SpikeGMM(gates, rows(loc), rows(scale), logits=logits, temperature=temperature, **options)


@pytest.fixture(params=GROUPS)
def pair(request):
    given = parameters(GROUPS[request.param])
    return CodebookGMM(**given, temperature=0.7), explicit(**given)


def prior(scale=1.3, inclusion=0.4) -> SpikeAndSlab:
    return SpikeAndSlab(torch.tensor(inclusion, dtype=F64), dist.Normal(torch.zeros((), dtype=F64), scale))


class TestAgainstTheExplicitLaw:
    def test_shapes(self, pair):
        lazy, _ = pair
        assert lazy.batch_shape == (6, 4, 2) and lazy.event_shape == ()
        assert lazy.sample((3,)).shape == (3, 6, 4, 2) and lazy.rsample().shape == (6, 4, 2)
        assert lazy.to_event(3).event_shape == (6, 4, 2)
        assert lazy.responsibilities.shape == (6, 4, 2, 5)
        assert lazy.map_codes().shape == (lazy.num_groups, 48 // lazy.num_groups)

    @pytest.mark.parametrize(
        "name", ["responsibilities", "mean", "variance", "mode", "codes", "assignment_entropy"]
    )
    def test_properties(self, pair, name):
        lazy, full = pair
        torch.testing.assert_close(getattr(lazy, name), getattr(full, name))

    def test_responsibilities_at_other_temperatures(self, pair):
        lazy, full = pair
        for temperature in (0.05, 1.0, 30.0):
            torch.testing.assert_close(
                lazy.responsibilities_at(temperature), full.responsibilities_at(temperature)
            )

    def test_laws_at_other_temperatures(self, pair):
        lazy, full = pair
        for temperature in (0.05, 30.0):
            hot, other = lazy.at_temperature(temperature), full.at_temperature(temperature)
            for name in ("responsibilities", "assignment_entropy", "mean", "variance", "gates"):
                torch.testing.assert_close(getattr(hot, name), getattr(other, name))
            torch.testing.assert_close(kl_bound(hot, prior()), kl_bound(other, prior()))
        torch.testing.assert_close(lazy.responsibilities, full.responsibilities)  # which itself is as it was

    def test_log_prob(self, pair):
        lazy, full = pair
        value = lazy.sample((20,))
        assert (value == 0).any() and (value != 0).any()
        torch.testing.assert_close(lazy.log_prob(value), full.log_prob(value))

    @pytest.mark.parametrize("kind", ["jensen", "dominant", "lower"])
    @pytest.mark.parametrize("slab", [(), (1,), (2,), (6, 1, 1), (1, 1, 1), (6, 4, 2)])
    def test_kl_bounds(self, pair, kind, slab):
        lazy, full = pair
        p = prior(torch.rand(slab, dtype=F64) + 0.5, 0.3)  # one slab for all weights, or many
        torch.testing.assert_close(kl_bound(lazy, p, kind), kl_bound(full, p, kind))
        events = kl_bound(lazy.to_event(3), p.expand((6, 4, 2)).to_event(3), kind)
        torch.testing.assert_close(events, kl_bound(full, p, kind).sum())

    def test_kl_against_a_slab_that_is_not_gaussian(self, pair):
        lazy, full = pair
        p = SpikeAndSlab(torch.tensor(0.4, dtype=F64), dist.Laplace(torch.zeros((), dtype=F64), 1.0))
        try:
            expected = kl_bound(full, p, "jensen")
        except NotImplementedError:
            with pytest.raises(NotImplementedError):
                kl_bound(lazy, p, "jensen")
            return
        torch.testing.assert_close(kl_bound(lazy, p, "jensen"), expected)

    def test_monte_carlo_kl(self, pair):
        estimates = []
        for law in pair:
            torch.manual_seed(1)
            estimates.append(monte_carlo_kl(law, prior(), 5)[0])
        torch.testing.assert_close(*estimates)

    @pytest.mark.parametrize("estimator", ["soft", "concrete", "discrete"])
    def test_draws_of_other_estimators(self, pair, estimator):
        draws = []
        for law in pair:
            law.estimator = estimator
            torch.manual_seed(2)
            draws.append(law.sample((3,)) if estimator == "discrete" else law.rsample((3,)))
        torch.testing.assert_close(*draws)

    def test_expand(self, pair):
        lazy, full = pair
        value = lazy.sample((2,))
        wide = lazy.expand((2, 6, 4, 2))
        assert wide.batch_shape == (2, 6, 4, 2)
        torch.testing.assert_close(wide.log_prob(value), full.log_prob(value))
        assert lazy.expand(lazy.batch_shape) is lazy

    def test_anchor_decides_responsibilities_and_latent_does_not(self):
        given = parameters(1)
        anchor = given["latent"].round()
        lazy = CodebookGMM(**given, anchor=anchor, temperature=0.7)
        full = explicit(**given, anchor=anchor)
        torch.testing.assert_close(lazy.responsibilities, full.responsibilities)
        torch.testing.assert_close(kl_bound(lazy, prior(), "jensen"), kl_bound(full, prior(), "jensen"))
        torch.testing.assert_close(lazy.rsample(), full.mode)

    def test_given_codes_decide_the_straight_through_value_alone(self):
        given = parameters(6)
        codes = torch.randint(5, (6, 8), dtype=torch.uint8)
        lazy = CodebookGMM(**given, codes=codes, temperature=0.7)
        expected = given["loc"].gather(1, codes.long()).view(6, 4, 2) * (given["gates"] > 0.5)
        torch.testing.assert_close(lazy.rsample(), expected)
        torch.testing.assert_close(lazy.responsibilities, explicit(**given).responsibilities)

    def test_arguments_are_checked(self):
        given = parameters(1)
        with pytest.raises(ValueError, match="temperature must be positive"):
            CodebookGMM(**given, temperature=-1.0, validate_args=True)
        with pytest.raises(ValueError, match="estimator must be one of"):
            CodebookGMM(**given, estimator="exact")
        with pytest.raises(ValueError, match="scale must be positive"):
            CodebookGMM(**{**given, "scale": -given["scale"]}, validate_args=True)


class TestLimits:
    def test_one_component_is_a_spike_and_gaussian(self):
        given = parameters(1, components=1)
        lazy = CodebookGMM(**given)
        slab = dist.Normal(given["loc"].expand(6, 4, 2), given["scale"].expand(6, 4, 2))
        value = lazy.sample((5,))
        torch.testing.assert_close(lazy.log_prob(value), SpikeAndSlab(given["gates"], slab).log_prob(value))

    def test_low_temperature_is_the_hard_code(self):
        given = parameters(6)
        lazy = CodebookGMM(**given, temperature=1e-4)
        hard = torch.nn.functional.one_hot(lazy.codes, 5).double()
        torch.testing.assert_close(lazy.responsibilities, hard)
        for kind in ("dominant", "lower"):
            torch.testing.assert_close(kl_bound(lazy, prior(), "jensen"), kl_bound(lazy, prior(), kind))

    @pytest.mark.parametrize("gate", [0.0, 1.0])
    def test_closed_and_open_gates(self, gate):
        given = parameters(1)
        given["gates"] = torch.full_like(given["gates"], gate)
        lazy = CodebookGMM(**given)
        assert bool((lazy.sample() == 0).all()) == (gate == 0)
        assert bool((lazy.rsample() == 0).all()) == (gate == 0)
        assert kl_bound(lazy, prior(), "jensen").isfinite().all()


class TestMapCodes:
    @pytest.mark.parametrize("groups", [1, 3])
    @pytest.mark.parametrize("components", [1, 2, 16, 256])
    def test_are_the_argmax_of_responsibilities(self, groups, components):
        given = parameters(groups, components, (6, 50))
        args = given["latent"].view(groups, -1), Codebook(given["loc"], given["scale"], given["log_mixing"])
        codes = map_codes(*args)
        assert codes.dtype == torch.uint8
        assert torch.equal(codes.long(), assignment_logits(*args).argmax(0))
        law = CodebookGMM(**given)
        assert torch.equal(codes.long().view(6, 50), law.responsibilities.argmax(-1))

    def test_ties_take_the_first(self):
        same = torch.zeros(1, 4)
        assert torch.equal(
            map_codes(torch.randn(1, 9), Codebook(same, same + 1, same)), torch.zeros(1, 9, dtype=torch.uint8)
        )

    def test_does_not_change_its_arguments(self):
        given = parameters(1)
        before = {name: value.clone() for name, value in given.items()}
        CodebookGMM(**given).map_codes()
        assert all(torch.equal(given[name], before[name]) for name in given)


class TestExpectedDivergence:
    def arguments(self, groups: int) -> list[torch.Tensor]:
        given = parameters(groups, 3, (12,), seed=7)
        latent = given["latent"].view(groups, -1)
        divergence = torch.rand(groups, 3, dtype=F64)
        tensors = [latent, given["loc"], given["scale"], given["log_mixing"], divergence]
        return [t.clone().requires_grad_() for t in tensors]

    def autograd(self, latent, loc, scale, log_mixing, divergence, temperature):
        phi = (assignment_logits(latent, Codebook(loc, scale, log_mixing)) / temperature).softmax(0)
        return (phi * divergence.T.unsqueeze(-1)).sum(0)

    @pytest.mark.parametrize("groups", [1, 2, 12])
    @pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
    def test_value_and_gradients(self, groups, temperature):
        arguments = self.arguments(groups)
        assert gradcheck(lambda *a: ExpectedDivergence.apply(*a, temperature), arguments)
        value, reference = (f(*arguments, temperature) for f in (ExpectedDivergence.apply, self.autograd))
        torch.testing.assert_close(value, reference)
        weights = torch.randn_like(value)
        fast = torch.autograd.grad((value * weights).sum(), arguments)
        slow = torch.autograd.grad((reference * weights).sum(), arguments)
        for one, other in zip(fast, slow, strict=True):
            torch.testing.assert_close(one, other)

    def test_low_temperature_stays_finite(self):
        arguments = [a.detach().float().requires_grad_() for a in self.arguments(1)]
        ExpectedDivergence.apply(*arguments, 1e-4).sum().backward()
        assert all(a.grad.isfinite().all() for a in arguments)

    def test_does_not_change_its_arguments(self):
        arguments = self.arguments(2)
        before = [a.detach().clone() for a in arguments]
        ExpectedDivergence.apply(*arguments, 1.0).sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))

    @pytest.mark.parametrize("anchored", [False, True])
    def test_kl_gradients_are_those_of_the_explicit_law(self, anchored):
        results = []
        for make in (CodebookGMM, explicit):
            given = {name: value.clone().requires_grad_() for name, value in parameters(6).items()}
            anchor = given["latent"].detach().round() if anchored else None
            law = make(**given, temperature=0.7, anchor=anchor)
            kl_bound(law, prior(), "jensen").sum().backward()
            results.append(given)
        for name in results[0]:
            one, other = (given[name].grad for given in results)
            zero = torch.zeros_like(results[0][name])
            torch.testing.assert_close(zero if one is None else one, zero if other is None else other)


class TestHardValue:
    def test_straight_through_gradients(self):
        given = {name: value.clone().requires_grad_() for name, value in parameters(6).items()}
        law = CodebookGMM(**given, temperature=0.7)
        value = law.rsample()
        assert torch.equal(value.detach(), law.mode.detach())
        grad = torch.randn_like(value)
        value.backward(grad)
        keep, codes = given["gates"] > 0.5, law.codes
        assert torch.equal(given["latent"].grad, grad.where(keep, torch.zeros(()).double()))  # identity, else 0
        means = given["loc"].detach()[:, None].expand(6, 8, 5).reshape(6, 4, 2, 5)
        chosen = means.gather(-1, codes[..., None])[..., 0]
        torch.testing.assert_close(given["gates"].grad, grad * chosen)
        assert given["scale"].grad is None and given["log_mixing"].grad is None

    @pytest.mark.parametrize("groups", [1, 2, 6])
    def test_gradient_of_the_means_is_exact(self, groups):
        """The value is linear in the means, so finite differences must agree to rounding."""
        given = parameters(groups, 4, (6, 5))
        codes = torch.randint(4, (groups, 30 // groups), dtype=torch.uint8)
        latent, gates = (given[name].view(groups, -1) for name in ("latent", "gates"))
        loc = given["loc"].clone().requires_grad_()
        assert gradcheck(lambda means: HardValue.apply(latent, gates, means, codes), loc)

    def test_float32_means_sum_many_weights(self):
        loc = torch.zeros(1, 2, requires_grad=True)
        latent = torch.zeros(1, 300_000)
        codes = (torch.arange(300_000) % 2).to(torch.uint8)[None]
        HardValue.apply(latent, latent + 1, loc, codes).sum().backward()
        assert loc.grad.tolist() == [[150_000.0, 150_000.0]]
        assert loc.grad.dtype == torch.float32

    def test_sample_shape(self):
        law = CodebookGMM(**parameters(1))
        assert torch.equal(law.rsample((3,)), law.rsample().expand(3, 6, 4, 2))


def largest_saved(function) -> int:
    """Elements of the largest tensor kept for the backward pass of ``function()``."""
    sizes = [0]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result.requires_grad
    return max(sizes)


class TestMemory:
    @pytest.mark.parametrize("groups", [1, 8])
    def test_nothing_of_size_n_times_k_is_kept(self, groups):
        given = {k: v.float().requires_grad_() for k, v in parameters(groups, 16, (8, 100)).items()}
        p = SpikeAndSlab(torch.tensor(0.5), dist.Normal(0.0, 1.0)).expand((8, 100))

        def step():
            law = CodebookGMM(**given, temperature=0.5)
            return law.rsample().sum() + kl_bound(law, p, "jensen").sum()

        assert largest_saved(step) <= 800

    def test_the_explicit_law_does_keep_it(self):
        """The measuring stick measures."""
        given = {k: v.float().requires_grad_() for k, v in parameters(1, 16, (8, 100)).items()}
        assert largest_saved(lambda: explicit(**given).rsample().sum()) >= 800 * 16


class TestLatentSpikeAndSlab:
    def make(self):
        gates = torch.tensor([0.9, 0.1, 1.0, 0.0], requires_grad=True)
        latent = torch.tensor([1.0, 2.0, -3.0, 4.0], requires_grad=True)
        return LatentSpikeAndSlab(gates, latent, torch.full((4,), 0.1)), gates, latent

    def test_draw_is_the_hard_network_of_the_latents(self):
        law, _, latent = self.make()
        value = law.rsample()
        assert value.tolist() == [1.0, 0.0, -3.0, 0.0]
        value.sum().backward()
        assert latent.grad.tolist() == [1.0, 0.0, 1.0, 0.0]
        assert law.rsample((2,)).shape == (2, 4)

    def test_density_is_a_spike_and_gaussian(self):
        law, gates, latent = self.make()
        value = torch.tensor([0.95, 0.0, -3.1, 0.0])
        slab = dist.Normal(latent, 0.1)
        expected = torch.where(value == 0, (1 - gates).log(), gates.log() + slab.log_prob(value))
        torch.testing.assert_close(law.log_prob(value), expected)

    def test_kl_is_exact(self):
        law, gates, latent = self.make()
        p = SpikeAndSlab(torch.tensor(0.5), dist.Normal(0.0, 1.0)).expand((4,))
        slab = torch.distributions.kl_divergence(dist.Normal(latent, 0.1), dist.Normal(0.0, 1.0))
        bernoulli = torch.distributions.kl_divergence(dist.Bernoulli(gates), dist.Bernoulli(torch.tensor(0.5)))
        torch.testing.assert_close(kl_bound(law, p), bernoulli + gates * slab)
