"""Spike-and-GMM whose responsibilities follow from a latent weight and a shared codebook, computed when needed."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, kl_divergence

from sqs_pyro.distributions.assignment import ExpectedDivergence, HardValue, assignment_logits, map_codes
from sqs_pyro.distributions.codebook import Codebook, GroupedMixture
from sqs_pyro.distributions.kl import density_bound, gate_divergence, register_bound, spike_gmm_bound
from sqs_pyro.distributions.numerics import weighted
from sqs_pyro.distributions.spike_and_slab import SpikeAndSlab, straight_through_gate
from sqs_pyro.distributions.spike_gmm import SpikeGMM


class CodebookGMM(GroupedMixture):
    """A :class:`SpikeGMM` over N weights in G groups that share codebooks of K components.

    ``φ_i = softmax_k[(log π_k + log N(w_i; μ_k, σ_k²)) / τ]``. Nothing of size N x K is kept: the
    straight-through value, its gradient and Jensen's bound work from latents and codebooks.

    Shapes: ``batch_shape = base_shape = latent.shape``, ``event_shape = ()``; :meth:`expand` enlarges
    ``batch_shape`` alone. Weights belong to groups in row-major order: ``latent.view(G, N / G)``.

    Args:
        gates: λ, ``[*shape]``.
        latent: w, ``[*shape]``; survivors receive the straight-through gradient unchanged.
        loc, scale, log_mixing: the codebooks, each ``[G, K]``; ``log_mixing`` normalised over K.
        anchor: what φ is computed from, ``[*shape]``: the window's mean; by default ``latent``.
        codes: hard codes for the straight-through value, uint8 ``[G, N / G]``; by default the most probable.
        temperature: τ.
        estimator: see :class:`SpikeGMM`; ``"straight_through"`` here has the identity gradient.
        spike_scale: see :class:`SpikeGMM`.
        hard_value: what makes the straight-through value of grouped latents, gates, means and codes, with another
            gradient than :class:`~sqs_pyro.distributions.assignment.HardValue`'s.
    """

    def __init__(
        self,
        gates: Tensor,
        latent: Tensor,
        loc: Tensor,
        scale: Tensor,
        log_mixing: Tensor,
        *,
        anchor: Tensor | None = None,
        codes: Tensor | None = None,
        temperature: float = 1.0,
        estimator: str = "straight_through",
        spike_scale: Tensor | float | None = None,
        hard_value: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self._hard_value = HardValue.apply if hard_value is None else hard_value
        # Before the base class sets up: what it checks is computed from these.
        self.latent = latent
        self.anchor = latent if anchor is None else anchor
        self._hard_codes = codes
        super().__init__(
            gates,
            Codebook(loc, scale, log_mixing),
            latent.shape,
            temperature=temperature,
            estimator=estimator,
            spike_scale=spike_scale,
            validate_args=validate_args,
        )

    @property
    def logits(self) -> Tensor:
        """Unnormalised log responsibilities at temperature 1, ``[*base_shape, K]``; computed at each access."""
        logits = assignment_logits(self.grouped(self.anchor), self.codebook)  # [K, G, N / G]
        return logits.movedim(0, -1).reshape(*self.base_shape, self.num_components)

    def map_codes(self) -> Tensor:
        """Return the most probable component of each weight, uint8 ``[G, N / G]``."""
        return map_codes(self.grouped(self.anchor), self.codebook)

    @property
    def codes(self) -> Tensor:
        """The codes of the straight-through value, int64 ``[*batch_shape]``."""
        return self._current_codes().view(self.base_shape).long().expand(self.batch_shape)

    def _current_codes(self) -> Tensor:
        return self.map_codes() if self._hard_codes is None else self._hard_codes

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance, ``[*base_shape]`` each, responsibilities never kept."""
        mean, square = self._slab_moments()
        gates = self._gates
        spike = 0.0 if self.spike_scale is None else (1 - gates) * self.spike_scale**2
        # Var θ = λ (E v² - (E v)²) + λ (1-λ) (E v)²; rounding must not leave it below 0
        inside = (square - mean.square()).clamp_min(0)
        return gates * mean, gates * (inside + (1 - gates) * mean.square()) + spike

    def _slab_moments(self) -> tuple[Tensor, Tensor]:
        """Return ``Σ_k φ_k μ_k`` and ``Σ_k φ_k (μ_k² + σ_k²)``, ``[*base_shape]``."""
        loc, scale, _ = self.codebook
        anchor = self.grouped(self.anchor)
        first = ExpectedDivergence.apply(anchor, *self.codebook, loc, self.temperature)
        second = ExpectedDivergence.apply(anchor, *self.codebook, loc.square() + scale.square(), self.temperature)
        return first.view(self.base_shape), second.view(self.base_shape)

    def _rsample_straight_through(self, shape: torch.Size) -> Tensor:
        value = self._hard_value(
            self.grouped(self.latent), self.grouped(self._gates), self.codebook.loc, self._current_codes()
        )
        return value.view(self.base_shape).expand(shape)


@register_bound("jensen", CodebookGMM, SpikeAndSlab)
def _jensen_codebook(q: CodebookGMM, p: SpikeAndSlab) -> Tensor:
    """Return ``KL(Bern(λ)‖Bern(λ₀)) + λ Σ_k φ_k κ_k``, its responsibilities never kept."""
    slab = p.base_slab
    # More than two dimensions of size 1 cannot be expanded to [G, K].
    if slab.batch_shape.numel() != 1 or len(slab.batch_shape) > 2:
        return spike_gmm_bound(q, p, "jensen")  # κ differs from weight to weight: N x K numbers after all
    return gate_divergence(q.gates, p.base_inclusion) + q.gates * _expected_divergence(q, slab)


@register_bound("jensen", CodebookGMM, Normal)
def _jensen_codebook_normal(q: CodebookGMM, p: Normal) -> Tensor:
    """Return ``(1-λ) κ₀ + λ Σ_k φ_k κ_k`` against a density, κ₀ being the spike's."""
    if q.spike_scale is None or not (_is_one_number(p.loc) and _is_one_number(p.scale)):
        return density_bound(q, p, "jensen")
    # A prior that was expanded to the layer is one number seen many times: κ is then [G, K], not N x K.
    at = (0,) * p.loc.dim()
    one = Normal(p.loc[at], p.scale[at], validate_args=False)
    spike = Normal(torch.zeros_like(q.spike_scale), q.spike_scale, validate_args=False)
    return (1 - q.gates) * kl_divergence(spike, one) + q.gates * _expected_divergence(q, one)


def _expected_divergence(q: CodebookGMM, slab: Distribution) -> Tensor:
    """Return ``Σ_k φ_k κ_k`` against a slab that is the same for all weights, ``[*batch_shape]``."""
    component = Normal(q.codebook.loc, q.codebook.scale, validate_args=False)
    divergence = kl_divergence(component, slab.expand(q.codebook.loc.shape))  # κ, [G, K]
    expected = ExpectedDivergence.apply(q.grouped(q.anchor), *q.codebook, divergence, q.temperature)
    return expected.view(q.base_shape)


def _is_one_number(expanded: Tensor) -> bool:
    # Strides of 0 are those of a view that `expand` has made.
    return all(size == 1 or stride == 0 for size, stride in zip(expanded.shape, expanded.stride(), strict=True))


class LatentSpikeAndSlab(SpikeGMM):
    """The family before there is a codebook: ``(1-λ) δ_0 + λ N(w, s²)``, of each weight by itself.

    By the estimator ``"straight_through"``, that of a warm-up, ``rsample`` is the hard, noise-free network of the
    present latents: its gradient is 1 to the latent where the gate is open, and the latent to the gate, so that
    closed gates still learn whether to open. The other estimators are those of :class:`SpikeGMM`.

    Args:
        gates: λ, ``[*shape]``.
        latent: w, ``[*shape]``.
        scale: s, broadcastable to ``[*shape]``.
        estimator, spike_scale: see :class:`SpikeGMM`.
    """

    def __init__(
        self,
        gates: Tensor,
        latent: Tensor,
        scale: Tensor,
        *,
        estimator: str = "straight_through",
        spike_scale: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.latent, self.latent_scale = latent, scale.expand(latent.shape)
        one_component = torch.ones_like(latent[..., None])  # [*shape, 1]: φ = 1
        super().__init__(
            gates,
            latent.unsqueeze(-1),
            self.latent_scale.unsqueeze(-1),
            responsibilities=one_component,
            estimator=estimator,
            spike_scale=spike_scale,
            validate_args=validate_args,
        )

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return ``λ w`` and ``λ (s² + (1-λ) w²)``, ``[*shape]``, with the spike's own variance if it has one."""
        gates, latent = self._gates, self.latent
        variance = gates * (self.latent_scale.square() + (1 - gates) * latent.square())
        if self.spike_scale is not None:
            variance = variance + (1 - gates) * self.spike_scale**2
        return gates * latent, variance

    def _rsample_parts(self, shape: torch.Size) -> Tensor:
        slab = self.latent + self.latent_scale * torch.randn(
            shape, dtype=self.latent.dtype, device=self.latent.device
        )
        return self._slab_or_spike(torch.rand_like(slab) < self._gates, slab)

    def _rsample_straight_through(self, shape: torch.Size) -> Tensor:
        return (straight_through_gate(self.gates > 0.5, self.gates) * self.latent).expand(shape)


@register_bound("jensen", LatentSpikeAndSlab, SpikeAndSlab)
def _jensen_latent(q: LatentSpikeAndSlab, p: SpikeAndSlab) -> Tensor:
    """Return the exact KL, without the passes over a mixture of one component."""
    slab = kl_divergence(Normal(q.latent, q.latent_scale, validate_args=False), p.base_slab)
    return gate_divergence(q.gates, p.base_inclusion) + weighted(q.gates, slab)
