r"""KL from the variational family to the learned prior, a mixture too.

For ``p = (1-ρ) δ₀ + ρ Σⱼ πⱼ N'ⱼ`` (:class:`SpikeAndMixture`) and ``q = (1-λ) δ₀ + λ Σₖ φₖ Nₖ``:

* *Shared components* (``Nₖ = N'ₖ``). The joint distributions of gate, code and value agree in their last factor,
  so by the chain rule ``KL(Bern(λ)‖Bern(ρ)) + λ KL(φ‖π)`` is their KL, which is never below that of the values
  alone. For one-hot φ it is ``-log p(gate, code)``: the length of an ideal code of the weight.
* *Others.* ``κₖ = -log Σⱼ πⱼ exp(-KL(Nₖ‖N'ⱼ)) >= KL(Nₖ‖Σⱼ πⱼ N'ⱼ)`` by the log-sum inequality (a variational
  bound of Hershey & Olsen 2007), and ``Σₖ φₖ κₖ`` by Jensen's.

With Gaussian spikes the chain rule has the term ``(1-λ) KL(N(0, s²)‖N(0, s'²))`` as well. The lower end is
:func:`~sqs_pyro.distributions.cells.cell_divergence`. Proofs: docs/method.md.
"""

import torch
from torch import Tensor
from torch.distributions import register_kl

from sqs_pyro.distributions.assignment import ExpectedDivergence, LogSumDivergence
from sqs_pyro.distributions.cells import cell_divergence, gaussian_cell_divergence
from sqs_pyro.distributions.codebook import Codebook
from sqs_pyro.distributions.codebook_gmm import CodebookGMM, LatentSpikeAndSlab
from sqs_pyro.distributions.kl import gate_divergence, kl_bound, register_bound
from sqs_pyro.distributions.numerics import log_or_log_tiny, weighted
from sqs_pyro.distributions.spike_and_mixture import SpikeAndMixture
from sqs_pyro.distributions.spike_gmm import SpikeGMM


def shares_components(q: SpikeGMM, p: SpikeAndMixture) -> bool:
    """Return whether q and p have the same components, code by code."""
    if isinstance(q, CodebookGMM) and p.base_shape == q.base_shape:
        pairs = ((q.codebook.loc, p.codebook.loc), (q.codebook.scale, p.codebook.scale))
    else:
        pairs = ((q.loc, p.loc), (q.scale, p.scale))
    # Identity first: a learned prior hands on the guide's own tensors, and a comparison waits for the device.
    return all(a is b or (a.shape == b.shape and torch.equal(a, b)) for a, b in pairs)


def log_sum_divergence(loc: Tensor, scale: Tensor, loc_p: Tensor, scale_p: Tensor, log_mixing_p: Tensor) -> Tensor:
    """Return ``-log Σⱼ πⱼ exp(-KL(N(μ, σ²)‖N'ⱼ))``, never below ``KL(N(μ, σ²)‖Σⱼ πⱼ N'ⱼ)``.

    Args:
        loc, scale: of the Gaussians, ``[*batch]``.
        loc_p, scale_p, log_mixing_p: of the mixtures, broadcastable to ``[*batch, J]``.
    """
    loc, scale = loc.unsqueeze(-1), scale.unsqueeze(-1)
    # KL(N‖N'ⱼ), [*batch, J]
    pairwise = (scale_p / scale).log() + (scale**2 + (loc - loc_p) ** 2) / (2 * scale_p**2) - 0.5
    if pairwise.shape[-1] == 1:  # exact, and much faster than a sum of one
        return (pairwise - log_mixing_p).squeeze(-1)
    return -(log_mixing_p - pairwise).logsumexp(-1)


@register_bound("jensen", CodebookGMM, SpikeAndMixture)
def _jensen_codebook(q: CodebookGMM, p: SpikeAndMixture) -> Tensor:
    """Return the bound; nothing of size N x K is kept."""
    if not _same_groups(q, p):
        return _jensen(q, p)
    shared = shares_components(q, p)
    divergence = -p.codebook.log_mixing if shared else _codebook_divergence(q.codebook, p.codebook)  # κ, [G, K]
    # Shared: Σ φ (log φ - log π), the code length less the entropy; else Σ φ κ.
    slab = ExpectedDivergence.apply(q.grouped(q.anchor), *q.codebook, divergence, q.temperature, shared)
    return _with_gate(q, p, slab.view(q.base_shape))


def _same_groups(q: CodebookGMM, p: SpikeAndMixture) -> bool:
    """Return whether a group of q has one mixture of p: then ``[G, K]`` and ``[G, J]`` (or ``[1, J]``) say all."""
    return p.num_groups == 1 or (p.base_shape == q.base_shape and q.num_groups == p.num_groups)


def _codebook_divergence(q: Codebook, p: Codebook) -> Tensor:
    return log_sum_divergence(q.loc, q.scale, *(x.unsqueeze(1) for x in p))  # p: [G, 1, J]


@register_bound("jensen", LatentSpikeAndSlab, SpikeAndMixture)
@register_bound("dominant", LatentSpikeAndSlab, SpikeAndMixture)
def _jensen_latent(q: LatentSpikeAndSlab, p: SpikeAndMixture) -> Tensor:
    """Warm-up: one Gaussian a weight against K; nothing of size N x K is kept."""
    if not _same_weights(q, p):
        return _jensen(q, p)
    slab = LogSumDivergence.apply(*_latent_groups(q, p), *p.codebook)
    return _with_gate(q, p, slab.view(q.latent.shape))


@register_bound("lower", LatentSpikeAndSlab, SpikeAndMixture)
@torch.no_grad()
def _lower_latent(q: LatentSpikeAndSlab, p: SpikeAndMixture) -> Tensor:
    """Warm-up: the cells are those of the prior's components."""
    if not _same_weights(q, p) or not p.has_atom_at_zero:
        return _lower(q, p)
    slab = gaussian_cell_divergence(*_latent_groups(q, p), p.codebook)
    return _with_gate(q, p, slab.view(q.latent.shape))


def _same_weights(q: LatentSpikeAndSlab, p: SpikeAndMixture) -> bool:
    """Return whether the groups of p are those of q's latents, however far both are expanded."""
    return p.base_shape in (q.batch_shape, q.latent.shape)


def _latent_groups(q: LatentSpikeAndSlab, p: SpikeAndMixture) -> tuple[Tensor, Tensor]:
    """Return means and widths of the weights' Gaussians, ``[G, n]``."""
    return q.latent.reshape(p.num_groups, -1), q.latent_scale.reshape(p.num_groups, -1)


@register_bound("jensen", SpikeGMM, SpikeAndMixture)
def _jensen(q: SpikeGMM, p: SpikeAndMixture) -> Tensor:
    phi = q.responsibilities
    component = component_bound(q, p)
    if shares_components(q, p):
        # KL(φ‖π) = Σ φ (log φ - log π); φ = 0 contributes nothing, and must not be NaN.
        component = component + log_or_log_tiny(phi)
    return _with_gate(q, p, weighted(phi, component).sum(-1))


@register_bound("dominant", SpikeGMM, SpikeAndMixture)
def _dominant(q: SpikeGMM, p: SpikeAndMixture) -> Tensor:
    table = component_bound(q, p).expand(*q.batch_shape, q.num_components)
    slab = table.gather(-1, q.codes.unsqueeze(-1)).squeeze(-1)
    return _with_gate(q, p, slab)


def component_bound(q: SpikeGMM, p: SpikeAndMixture) -> Tensor:
    """Return κ: ``-log πₖ`` of shared components, else the log-sum bound; broadcastable to ``[*batch, K]``."""
    if shares_components(q, p):
        return -p.logits
    return log_sum_divergence(q.loc, q.scale, *(x.unsqueeze(-2) for x in (p.loc, p.scale, p.logits)))


@register_bound("lower", SpikeGMM, SpikeAndMixture)
@torch.no_grad()
def _lower(q: SpikeGMM, p: SpikeAndMixture) -> Tensor:
    """Return a lower bound to report, without a gradient: nothing is kept of the many cells."""
    if p.has_atom_at_zero:
        return _with_gate(q, p, _cells(q, p))
    if q.has_atom_at_zero:
        # A point mass against a density, which is infinite unless no weight can be zero.
        return torch.where(q.gates == 1, _cells(q, p.as_mixture()), torch.inf)
    return _cells(q.as_mixture(), p.as_mixture())


def _with_gate(q: SpikeGMM, p: SpikeAndMixture, slab: Tensor) -> Tensor:
    """Return, by the chain rule, ``KL(Bern(λ)‖Bern(ρ)) + (1-λ) KL(spike‖spike) + λ KL(slab‖slab)``."""
    kl = gate_divergence(q.gates, p.base_inclusion) + weighted(q.gates, slab)
    if p.spike_scale is None:
        return kl
    if q.spike_scale is None:  # a point mass has no density
        return torch.where(q.gates == 1, kl, torch.inf)
    ratio = q.spike_scale / p.spike_scale
    return kl + (1 - q.gates) * (ratio**2 / 2 - ratio.log() - 0.5)  # KL(N(0, s²)‖N(0, s'²))


def _cells(q: SpikeGMM, p: SpikeGMM) -> Tensor:
    """Return a lower bound on the slabs' KL, broadcastable to ``[*batch_shape]``."""
    divergence = cell_divergence(*_grouped(q, p))
    if isinstance(q, CodebookGMM) and isinstance(p, SpikeAndMixture) and _same_groups(q, p):
        return divergence.view(q.base_shape)
    return divergence.view(q.batch_shape)


def _grouped(q: SpikeGMM, p: SpikeGMM) -> tuple[Tensor, Tensor, Tensor, Codebook]:
    """Return φ ``[G, n, K]``, q's μ and σ ``[G, K]``, and p's codebook; G = N where no codebook is shared."""
    # [K] and [J]: a layer's own codebook without the class that says so.
    one_codebook = q.loc.dim() == q.scale.dim() == p.loc.dim() == p.scale.dim() == p.logits.dim() == 1
    if isinstance(q, CodebookGMM) and isinstance(p, SpikeAndMixture) and _same_groups(q, p):
        phi, groups = q.responsibilities, q.num_groups
        of_q = q.codebook.loc, q.codebook.scale
        of_p = Codebook(*(x.expand(groups, -1) for x in p.codebook))
    else:
        phi = q.responsibilities.expand(*q.batch_shape, q.num_components)
        groups = 1 if one_codebook else q.batch_shape.numel()
        shape = torch.Size() if one_codebook else q.batch_shape

        def rows(codebook: Tensor, count: int) -> Tensor:
            return codebook.expand(*shape, count).reshape(groups, count)

        of_q = rows(q.loc, q.num_components), rows(q.scale, q.num_components)
        of_p = Codebook(*(rows(x, p.num_components) for x in (p.loc, p.scale, p.logits)))
    return phi.reshape(groups, -1, q.num_components), *of_q, of_p


@register_kl(SpikeGMM, SpikeAndMixture)
def _kl_spike_and_mixture(q: SpikeGMM, p: SpikeAndMixture) -> Tensor:
    """Return what ``torch.distributions.kl_divergence`` answers: the Jensen bound."""
    return kl_bound(q, p, "jensen")
