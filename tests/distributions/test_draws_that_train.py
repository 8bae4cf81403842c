"""Estimators that draw from q: values and gradients against quadrature; linear maps of draws against moments."""

import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from sqs_pyro.distributions import Codebook, CodebookGMM, LatentSpikeAndSlab, SpikeGMM
from sqs_pyro.distributions.local_draw import LocalDraw, _square, output_moments

DRAWS = 100_000
DOUBLE = {"dtype": torch.float64}
GATES, LATENTS, WIDTHS = (torch.tensor(v, **DOUBLE) for v in ([0.6, 0.3], [0.8, -0.5], [0.3, 0.4]))
INPUTS = torch.tensor([[0.5, 1.0], [-1.0, 0.7], [1.5, -0.3]], **DOUBLE)
TARGETS = torch.tensor([0.4, -0.9, 1.0], **DOUBLE)


def linear(theta, x):
    """One layer of two weights ``[S, 2, 1]``, for one input ``[2]``."""
    return torch.matmul(x.expand(len(theta), 1, 2), theta)


def tanh(theta, x):
    """Two layers of one weight each."""
    inner = torch.matmul(x[:1].expand(len(theta), 1, 1), theta[:, :1])
    return torch.matmul(torch.tanh(inner), theta[:, 1:])


def loss(network, theta):
    """Return ``-log N(y; f(x), 1/4)`` of three observations, without its constant, ``[S]``."""
    return sum(2 * (y - network(theta, x)[:, 0, 0]) ** 2 for x, y in zip(INPUTS, TARGETS, strict=True))


def by_quadrature(network, gates=GATES):
    """Return ``E_q loss`` and its gradient: gates summed, Gaussians by 64 nodes."""
    nodes, mass = (torch.tensor(values) for values in np.polynomial.hermite_e.hermegauss(64))
    gates, latents, widths = leaves = [p.clone().requires_grad_() for p in (gates, LATENTS, WIDTHS)]
    zero = torch.zeros(1, **DOUBLE)
    values = [torch.cat([zero, latents[i] + widths[i] * nodes]) for i in (0, 1)]
    masses = [torch.cat([(1 - gates[i])[None], gates[i] * mass / mass.sum()]) for i in (0, 1)]
    grid = torch.cartesian_prod(*values).unsqueeze(-1)  # [65², 2, 1]
    expected = torch.outer(*masses).flatten() @ loss(network, grid)
    return expected.detach(), torch.stack(torch.autograd.grad(expected, leaves))


def by_draws(network, estimator, gates=GATES):
    """Return the mean loss of as many draws and its gradient, each with its standard error."""
    leaves = [p.expand(DRAWS, 2).clone().requires_grad_() for p in (gates, LATENTS, WIDTHS)]  # a network each
    q = LatentSpikeAndSlab(*leaves, estimator=estimator, validate_args=False)
    losses = loss(network, q.rsample().unsqueeze(-1))
    grads = torch.stack(torch.autograd.grad(losses.sum(), leaves))  # [3, S, 2]
    return (losses.detach().mean(), grads.mean(1)), (losses.detach().std() / DRAWS**0.5, grads.std(1) / DRAWS**0.5)


@pytest.mark.parametrize(
    ("network", "estimator"),
    [(linear, "local"), (linear, "pathwise"), (tanh, "pathwise")],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_two_weights(network, estimator):
    torch.manual_seed(0)
    found, errors = by_draws(network, estimator)
    for value, exact, error in zip(found, by_quadrature(network), errors, strict=True):
        assert ((value - exact).abs() <= 4 * error).all()


def test_local_draws_are_exact_where_outputs_are_normal():
    # No spike below the nonlinearity, so that what enters it is normal; the last layer needs only moments.
    torch.manual_seed(0)
    gates = torch.tensor([1.0, 0.3], **DOUBLE)
    (value, grad), (error, grad_error) = by_draws(tanh, "local", gates)
    exact, exact_grad = by_quadrature(tanh, gates)
    assert (value - exact).abs() <= 4 * error
    beside = ((grad - exact_grad).abs() <= 4 * grad_error).flatten()
    assert beside[1:].all()  # all but the open gate itself, along which the law is no longer normal


def test_bias_of_local_draws_at_a_spike_without_company():
    # The worst case there is, one input: what docs/inference.md says of its bias.
    torch.manual_seed(0)
    (value, grad), _ = by_draws(tanh, "local")
    exact, exact_grad = by_quadrature(tanh)
    assert (value / exact - 1).abs() < 0.02
    assert ((grad - exact_grad).abs() < 0.2).all()


def test_local_draws_vary_less():
    torch.manual_seed(0)
    spread = {kind: by_draws(linear, kind)[1][1] for kind in ("local", "pathwise")}
    assert (spread["local"].sum(0) < 0.8 * spread["pathwise"].sum(0)).all()
    assert spread["local"][0, 0] < spread["pathwise"][0, 0] / 3  # the gate's


LOC, SCALE = torch.tensor([-0.6, 0.2, 0.9], **DOUBLE), torch.tensor([0.2, 0.3, 0.25], **DOUBLE)
MIXING = torch.tensor([0.2, 0.5, 0.3], **DOUBLE)


def explicit(spike, gates, logits, loc, scale):
    return SpikeGMM(gates, loc, scale, logits=logits, estimator="pathwise", spike_scale=spike)


def by_codebook(spike, gates, latent):
    codebook = Codebook(LOC[None], SCALE[None], MIXING.log()[None])
    return CodebookGMM(gates, latent, *codebook, estimator="pathwise", spike_scale=spike)


@pytest.mark.parametrize("spike", [None, 0.1])
@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (explicit, (torch.tensor([0.7], **DOUBLE), MIXING[None].log(), LOC[None], SCALE[None])),
        (by_codebook, (torch.tensor([0.7], **DOUBLE), torch.tensor([0.1], **DOUBLE))),
    ],
)
def test_pathwise_gradients_of_mixtures(make, parameters, spike):
    torch.manual_seed(0)
    grid = torch.linspace(-3, 3, 10_000, **DOUBLE)  # without 0, where f is 0, and the atom
    leaves = [p.clone().requires_grad_() for p in parameters]
    expected = torch.trapezoid(make(spike, *leaves).log_prob(grid).exp() * grid * grid.sin(), grid)
    exact = torch.autograd.grad(expected, leaves)
    leaves = [p.expand(DRAWS, *p.shape[1:]).clone().requires_grad_() for p in parameters]  # a weight each
    theta = make(spike, *leaves).rsample()
    for found, wanted in zip(torch.autograd.grad((theta * theta.sin()).sum(), leaves), exact, strict=True):
        assert ((found.mean(0) - wanted[0]).abs() <= 4 * found.std(0) / DRAWS**0.5).all()


def test_distribution_function():
    q = SpikeGMM(torch.tensor(0.6), torch.tensor([-1.0, 2.0]), torch.tensor([0.5, 0.3]), logits=torch.zeros(2))
    torch.manual_seed(0)
    draws = q.sample((DRAWS,))
    for value in (-1.2, -1e-6, 0.0, 1e-6, 1.9):
        assert q.cdf(torch.tensor(value)) == pytest.approx((draws <= value).double().mean().item(), abs=0.006)


def local_draw(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean, variance = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    return LocalDraw.of(mean + variance.sqrt() * torch.randn(shape, generator=generator), mean, variance)


class Product(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.weight, self.bias, self.form = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(4)), form

    def forward(self, x):
        return self.form(x, self.weight, self.bias)


LAYERS = {
    "linear": (nn.Linear(3, 4), (3,)),
    "conv1d": (nn.Conv1d(2, 4, 3, stride=2, padding=1), (2, 7)),
    "conv2d": (nn.Conv2d(4, 6, 3, groups=2, dilation=2), (4, 6, 5)),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 3, 3, 3)),
    "transposed1d": (nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), (2, 4)),
    "transposed2d": (nn.ConvTranspose2d(4, 2, 3, stride=2, groups=2), (4, 3, 3)),
    "transposed3d": (nn.ConvTranspose3d(2, 3, 2), (2, 2, 2, 2)),
    "@": (Product(lambda x, w, b: x @ w + b), (3,)),
    "turned @": (Product(lambda x, w, b: (w.T @ x.T).mT + b), (3,)),
    "addmm": (Product(lambda x, w, b: torch.addmm(b, x, w)), (3,)),
    "views": (Product(lambda x, w, b: F.linear(x, w.t().reshape(4, 3).float()[[2, 0, 1, 3]], b.view(-1))), (3,)),
}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_outputs_have_the_moments_of_their_weights(name):
    torch.manual_seed(0)
    net, shape = LAYERS[name]
    draws = {key: local_draw(value.shape, seed) for seed, (key, value) in enumerate(net.named_parameters())}
    x = torch.randn(shape)
    out = functional_call(net, draws, (x.expand(20_000, *shape).contiguous(),))
    assert type(out) is torch.Tensor
    # One whole network after the other, which is what outputs stand for.
    moments = {key: draw.moments for key, draw in draws.items()}
    whole = torch.cat(
        [
            functional_call(net, {key: torch.normal(m, v.sqrt()) for key, (m, v) in moments.items()}, (x[None],))
            for _ in range(4_000)
        ]
    )
    scale = whole.std(0)
    assert ((out.mean(0) - whole.mean(0)) / scale).abs().max() < 0.08
    assert (out.std(0) / scale - 1).abs().max() < 0.06


def test_every_example_has_noise_of_its_own():
    torch.manual_seed(0)
    out = F.linear(torch.ones(2_000, 3), local_draw((2, 3)))
    assert (
        torch.corrcoef(out.T)[0, 1].abs() < 0.1 and torch.corrcoef(out.view(2, 1_000, 2)[..., 0])[0, 1].abs() < 0.1
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_slope_where_there_is_no_noise(dtype):
    mean, variance = (torch.rand(2, 3, dtype=dtype).requires_grad_() for _ in range(2))
    weight = LocalDraw.of(mean * 1, mean, variance)
    F.linear(torch.zeros(1, 3, dtype=dtype), weight).sum().backward()
    assert variance.grad.isfinite().all() and not variance.grad.any()


@pytest.mark.parametrize(
    "net",
    [nn.Embedding(4, 3), nn.LSTM(3, 2), nn.MultiheadAttention(4, 2), nn.LayerNorm(4), nn.PReLU(4)],
    ids=lambda net: type(net).__name__,
)
def test_other_operations_work_with_the_draw(net):
    x = (
        torch.tensor([1, 3])
        if isinstance(net, nn.Embedding)
        else torch.randn(5, 3 if isinstance(net, nn.LSTM) else 4)
    )
    args = (x, x, x) if isinstance(net, nn.MultiheadAttention) else (x,)
    draws = {key: local_draw(value.shape) for key, value in net.named_parameters()}
    plain = {key: draw.as_subclass(torch.Tensor) for key, draw in draws.items()}
    # Attention multiplies by slices of its weights within one function of torch's.
    first, second = (functional_call(net, given, args) for given in (draws, plain))
    first, second = (out if torch.is_tensor(out) else out[0] for out in (first, second))
    assert type(first) is torch.Tensor
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    "view", [lambda y: y, lambda y: y[:, 0], lambda y: y.squeeze(1), lambda y: y.unsqueeze(0)], ids=range(4)
)
def test_outputs_are_drawn_from_their_moments(view):
    x = torch.randn(6, 3)
    weight, bias = local_draw((1, 3)), local_draw((1,), 1)
    mean, variance = output_moments(view(F.linear(x, weight, bias)))
    (m, v), (n, u) = weight.moments, bias.moments
    torch.testing.assert_close(mean, view(x @ m.T + n))
    torch.testing.assert_close(variance, view(x.square() @ v.T + u))


def test_what_is_no_draw_has_no_moments():
    out = F.linear(torch.randn(6, 3), local_draw((2, 3)))
    assert output_moments(out * 1) is None and output_moments(torch.randn(2)) is None
    out.mul_(2)
    assert output_moments(out) is None


def test_squares_are_not_kept(monkeypatch):
    kept, made = [], []

    def squared(x, dtype):
        made.append(weakref.ref(new := _square(x, dtype)))
        return new

    monkeypatch.setattr("sqs_pyro.distributions.local_draw._square", squared)
    x = torch.randn(64, 8, requires_grad=True)
    mean, variance = torch.randn(4, 8).requires_grad_(), torch.rand(4, 8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = F.linear(x, LocalDraw.of(mean * 1, mean, variance))
    squares = [t for t in kept if t.shape == x.shape and torch.equal(t, x.square())]
    assert not squares
    assert made and not any(each() is not None for each in made)  # not by what makes them anew either
    # and what is made anew is right: the gradient is that of the same draw by hand
    noise = ((out - F.linear(x, mean)) / F.linear(x.square(), variance).sqrt()).detach()
    by_hand = F.linear(x, mean) + F.linear(x.square(), variance).sqrt() * noise
    weights = torch.randn_like(out)
    for found, expected in zip(
        torch.autograd.grad(out, (x, mean, variance), weights),
        torch.autograd.grad(by_hand, (x, mean, variance), weights), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_moments_of_a_codebook():
    torch.manual_seed(0)
    latent, gates = torch.randn(4, 6), torch.rand(4, 6)
    codebook = Codebook(torch.randn(2, 3), torch.rand(2, 3) + 0.1, torch.randn(2, 3).log_softmax(-1))
    for spike in (None, 0.2):
        q = CodebookGMM(gates, latent, *codebook, temperature=0.7, spike_scale=spike)
        mean, variance = q.moments()
        torch.testing.assert_close(mean, q.explicit().mean)
        torch.testing.assert_close(variance, q.explicit().variance)
