"""The variational family of one weight: a point mass at zero mixed with Gaussians around codebook values."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from sqs_pyro.distributions.local_draw import LocalDraw
from sqs_pyro.distributions.numerics import log_or_neg_inf, plogp
from sqs_pyro.distributions.parameters import (
    as_scalar,
    check_components,
    check_probability,
    check_responsibilities,
)
from sqs_pyro.distributions.spike_and_slab import ONE_DRAW, straight_through_gate

ESTIMATORS = ("local", "pathwise", "straight_through", "soft", "concrete", "discrete")


class SpikeGMM(TorchDistribution):
    r"""``q(θ) = (1 - λ) δ₀(θ) + λ Σₖ φₖ N(θ; μₖ, σₖ²)`` with ``φ = softmax(logits / τ)``.

    Densities are with respect to δ₀ + Lebesgue, as for :class:`~sqs_pyro.distributions.SpikeAndSlab`.

    Shapes: ``event_shape = ()``; ``gates [*batch]``; ``responsibilities`` or ``logits``, ``loc``, ``scale``
    broadcastable to ``[*batch, K]`` and kept as given: a codebook shared by a layer stays ``[K]``.

    ``sample`` gives exact draws of q. ``rsample`` is what a network is trained with, by ``estimator``: the first
    two draw from q, the others make values that leave out the components' widths.

    ================== ========================================== ===========================================
    estimator          value                                      gradient
    ================== ========================================== ===========================================
    local              a draw that knows its moments: linear      of the moments; of low variance, biased as
                       maps of it draw their outputs, see         far as outputs are not normal; in other
                       :class:`~.local_draw.LocalDraw`; without   operations pathwise in μ and σ, and
                       gradients a draw                           straight-through in gates and φ
    pathwise           a draw                                     unbiased, through the distribution function
                                                                  (Figurnov et al. 2018); for gates its
                                                                  variance grows like ``exp(μ²/2σ²)``
    straight_through   1[λ > 1/2] · μ at argmax φ (hard network)  that of the soft value
    soft               λ Σₖ φₖ μₖ, the mean of q                  exact for the value
    concrete           relaxed Bernoulli gate times               pathwise through the relaxation (Maddison et
                       Gumbel-softmax code, both at τ, times μ    al. 2017), biased; less so as τ → 0
    discrete           Bernoulli gate times μ of a drawn code     none: ``has_rsample`` is False and ``sample``
                       (:meth:`discrete_sample` at τ)             is this too (for Bayesian averaging)
    ================== ========================================== ===========================================

    With ``spike_scale`` the spike is N(0, s²) instead of a point mass and q is an ordinary density
    (``has_atom_at_zero`` is False), which is what a prior without an atom can be compared with. Values a network
    is trained and averaged with still take an exact zero for a closed gate, as they take μ for a component.

    Subclasses may compute their parameters when they are needed: override ``loc``, ``scale`` and ``logits``, and
    call :meth:`_setup` instead of ``__init__``; the rest, KL terms included, uses public properties.

    Args:
        gates: λ in [0, 1], the probability of being non-zero.
        loc: μ, the codebook values.
        scale: σ > 0, the components' standard deviations.
        responsibilities: φ at temperature τ, non-negative, summing to 1 over the last dimension; or
        logits: unnormalised log responsibilities at temperature 1 (``-inf`` excludes a component).
        temperature: τ > 0.
        estimator: how ``rsample`` makes a differentiable value, see above.
        spike_scale: s > 0, a number; ``None`` is a point mass.
        validate_args: check parameters and values; ``None`` takes torch's default.

    Raises:
        ValueError: when a parameter is outside its domain or not exactly one of the alternatives is given.
    """

    arg_constraints: ClassVar = {
        "gates": constraints.unit_interval,
        "responsibilities": constraints.simplex,
        "logits": constraints.real_vector,
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
    }
    support = constraints.real

    #: Explicit parameters; None where a subclass computes them.
    _responsibilities: Tensor | None = None
    _logits: Tensor | None = None

    def __init__(
        self,
        gates: Tensor,
        loc: Tensor,
        scale: Tensor,
        *,
        responsibilities: Tensor | None = None,
        logits: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        estimator: str = "straight_through",
        spike_scale: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if (responsibilities is None) == (logits is None):
            count = "both" if logits is not None else "neither"
            raise ValueError(
                f"SpikeGMM: give exactly one of responsibilities and logits, but {count} was given; "
                "responsibilities are softmax(logits / temperature)."
            )
        self._loc, self._scale = loc, scale
        self._responsibilities, self._logits = responsibilities, logits
        mixing: Tensor = responsibilities if logits is None else logits  # type: ignore[assignment]
        batch_shape = torch.broadcast_shapes(gates.shape, mixing.shape[:-1], loc.shape[:-1], scale.shape[:-1])
        self._setup(gates, mixing.shape[-1], batch_shape, temperature, estimator, spike_scale, validate_args)
        if self._validate_args and responsibilities is not None:
            check_responsibilities(responsibilities)

    def _setup(
        self,
        gates: Tensor,
        num_components: int,
        batch_shape: torch.Size,
        temperature: float | Tensor,
        estimator: str,
        spike_scale: Tensor | float | None,
        validate_args: bool | None,
    ) -> None:
        """Store and check what every member of the family has, after what it computes its components from."""
        # As given, [*batch] or what broadcasts to it; the property expands.
        self._gates, self.spike_scale = gates, as_scalar(spike_scale, gates)
        self.temperature, self.estimator = temperature, estimator
        self.num_components = num_components
        # torch's own validation would read every parameter, logits of N x K among them; ours is below.
        super().__init__(torch.Size(batch_shape), torch.Size(), validate_args=False)
        self._validate_args = Distribution._validate_args if validate_args is None else validate_args
        if estimator not in ESTIMATORS:
            raise ValueError(f"SpikeGMM: estimator must be one of {', '.join(ESTIMATORS)}, but got {estimator!r}.")
        if self._validate_args:
            check_probability(type(self).__name__, "gates", gates)
            check_components(self.loc, self.scale, self.num_components, self.temperature, self.spike_scale)

    @property
    def has_atom_at_zero(self) -> bool:
        """Whether ``log_prob`` is with respect to δ₀ + Lebesgue; read by the KL terms."""
        return self.spike_scale is None

    @property
    def gates(self) -> Tensor:
        """λ, ``[*batch_shape]``."""
        return self._gates.expand(self.batch_shape)

    @property
    def loc(self) -> Tensor:
        """μ, broadcastable to ``[*batch_shape, K]``."""
        return self._loc

    @property
    def scale(self) -> Tensor:
        """σ, broadcastable to ``[*batch_shape, K]``."""
        return self._scale

    @property
    def has_rsample(self) -> bool:
        """Whether the estimator makes differentiable values: all but ``"discrete"`` do."""
        return self.estimator != "discrete"

    @property
    def responsibilities(self) -> Tensor:
        """φ at temperature τ, broadcastable to ``[*batch_shape, K]``."""
        return self.responsibilities_at(None)

    @property
    def logits(self) -> Tensor:
        """Unnormalised log responsibilities at temperature 1: ``φ = softmax(logits / τ)``."""
        if self._logits is not None:
            return self._logits
        assert self._responsibilities is not None
        return self.temperature * log_or_neg_inf(self._responsibilities)

    def responsibilities_at(self, temperature: float | Tensor | None) -> Tensor:
        """Return φ at another temperature (``None``: at τ), broadcastable to ``[*batch_shape, K]``."""
        if temperature is None and self._responsibilities is not None:
            return self._responsibilities
        return (self.logits / (self.temperature if temperature is None else temperature)).softmax(-1)

    def at_temperature(self, temperature: float | Tensor) -> Self:
        """Return it with ``φ = softmax(logits / temperature)``, of the same parameters; ``sample`` is exact."""
        # Shallow: subclasses keep what they compute from, and no tensor is copied.
        new = copy.copy(self)
        if self._responsibilities is not None:
            # Explicit φ belong to their own τ: as logits they can be taken at another.
            new._logits, new._responsibilities = self.logits, None
        new.temperature, new.estimator = temperature, "straight_through"
        return new

    @property
    def codes(self) -> Tensor:
        """The most probable component, int64 ``[*batch_shape]``."""
        return self.responsibilities.argmax(-1).expand(self.batch_shape)

    @property
    def mode(self) -> Tensor:
        """``1[λ > 1/2] · μ`` at the most probable component: exactly 0 or a codebook value."""
        return torch.where(self.gates > 0.5, self._select(self.loc, self.codes), 0.0)

    @property
    def assignment_entropy(self) -> Tensor:
        """``H(φ)`` in nats, ``[*batch_shape]``: the width of the KL bracket is ``λ H(φ)``."""
        return -plogp(self.responsibilities).sum(-1).expand(self.batch_shape)

    @property
    def slab_mean(self) -> Tensor:
        """``Σₖ φₖ μₖ``, the mean given that the weight is non-zero, ``[*batch_shape]``."""
        return (self.responsibilities * self.loc).sum(-1).expand(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        """``λ Σₖ φₖ μₖ``, ``[*batch_shape]``."""
        return self.gates * self.slab_mean

    @property
    def variance(self) -> Tensor:
        """``λ Σₖ φₖ (σₖ² + (μₖ - m)²) + λ (1 - λ) m² + (1 - λ) s²`` with ``m = Σₖ φₖ μₖ``; never negative."""
        gates, centre = self.gates, self.slab_mean
        spread = self.scale.square() + (self.loc - centre.unsqueeze(-1)).square()
        slab = gates * ((self.responsibilities * spread).sum(-1) + (1 - gates) * centre.square())
        return slab if self.spike_scale is None else slab + (1 - gates) * self.spike_scale**2

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Self:
        """Return the same distribution with ``batch_shape`` enlarged; parameters stay as they were given."""
        batch_shape = torch.Size(batch_shape)
        if batch_shape == self.batch_shape:
            return self
        self.gates.expand(batch_shape)  # torch's own error for a shape that cannot be reached
        new = copy.copy(self)
        new._batch_shape = batch_shape
        return new

    def explicit(self) -> "SpikeGMM":
        """Return it with all parameters written out (logits are N x K), whatever a subclass computes."""
        return SpikeGMM(
            self.gates,
            self.loc,
            self.scale,
            logits=self.logits,
            temperature=self.temperature,
            estimator=self.estimator,
            spike_scale=self.spike_scale,
            validate_args=False,
        )

    def as_mixture(self) -> "SpikeGMM":
        """Return the same density as K + 1 components, the spike being the first, behind a gate that is open.

        Raises:
            ValueError: the spike is a point mass.
        """
        if self.spike_scale is None:
            raise ValueError(f"{type(self).__name__}.as_mixture: a point mass is no component; give spike_scale.")
        gates, scale = self._gates.unsqueeze(-1), self.scale
        inside = gates * self.responsibilities  # [*batch, K]: λ φ
        spike = self.spike_scale.expand(*scale.shape[:-1], 1)  # the first component, at 0
        mixture = SpikeGMM(
            torch.ones_like(self._gates),
            torch.nn.functional.pad(self.loc.expand(*self.loc.shape[:-1], self.num_components), (1, 0)),
            torch.cat([spike, scale.expand(*scale.shape[:-1], self.num_components)], -1),
            responsibilities=torch.cat([(1 - gates).expand(*inside.shape[:-1], 1), inside], -1),
            validate_args=False,
        )
        return mixture.expand(self.batch_shape)

    def cdf(self, value: Tensor) -> Tensor:
        """Return ``P(θ <= value)``, ``[*sample_shape, *batch_shape]``; differentiable but at 0, where it jumps."""
        if self.spike_scale is not None:
            return self.as_mixture().cdf(value)
        slab = self._slab_cdf(value, self.responsibilities)
        return self.gates * slab + (1 - self.gates) * (value >= 0)

    @torch.no_grad()
    def icdf(self, value: Tensor) -> Tensor:
        """Return quantiles ``inf {t: P(θ <= t) >= p}`` for p in [0, 1], shaped as :meth:`cdf`; no gradient.

        Exactly 0 where the atom holds the quantile. Of one component the closed form, of more by bisection of the
        distribution function to the dtype's precision.

        Raises:
            ValueError: a probability outside [0, 1].
        """
        if self._validate_args and not bool(((value >= 0) & (value <= 1)).all()):
            raise ValueError(f"{type(self).__name__}.icdf: probabilities must be between 0 and 1.")
        if self.spike_scale is not None:
            return self.as_mixture().icdf(value)
        gates, responsibilities = self.gates, self.responsibilities
        below = gates * self._slab_cdf(torch.zeros_like(gates), responsibilities)  # P(θ < 0)
        atom = (value > below) & (value <= below + (1 - gates))
        # p without the atom's mass, in units of the slab's; any p will do where the atom is the answer.
        inside = (torch.where(value <= below, value, value - (1 - gates)) / gates).nan_to_num(0).clamp(0, 1)
        return torch.where(atom, 0.0, self._slab_icdf(torch.where(atom, 0.5, inside), responsibilities))

    def _slab_cdf(self, value: Tensor, responsibilities: Tensor) -> Tensor:
        component = torch.distributions.Normal(self.loc, self.scale, validate_args=False)
        return (responsibilities * component.cdf(value.unsqueeze(-1))).sum(-1)

    def _slab_icdf(self, value: Tensor, responsibilities: Tensor) -> Tensor:
        # A mixture's quantile lies between the smallest and the largest of its components' quantiles.
        each = self.loc + self.scale * torch.special.ndtri(value).unsqueeze(-1)
        low, high = each.amin(-1), each.amax(-1)
        for _ in range(torch.finfo(low.dtype).bits if self.num_components > 1 else 0):
            middle = (low + high) / 2
            reached = self._slab_cdf(middle, responsibilities) >= value
            low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
        return high

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log-densities (δ₀ + Lebesgue), ``[*sample_shape, *batch_shape]``; finite gradients at λ = 0."""
        if self._validate_args:
            self._validate_sample(value)
        if self.spike_scale is not None:
            return self.as_mixture().slab_log_prob(value)
        # Evaluated at 0, too, where it is not used: the mixture is finite there, so that no NaN flows back.
        slab = log_or_neg_inf(self._gates) + self.slab_log_prob(value)
        log_prob = torch.where(value == 0, log_or_neg_inf(1 - self._gates), slab)
        return log_prob.expand(torch.broadcast_shapes(value.shape, self.batch_shape))

    def slab_log_prob(self, value: Tensor) -> Tensor:
        """Return ``log Σₖ φₖ N(θ; μₖ, σₖ²)``, the Lebesgue density given that the weight is non-zero."""
        log_mixing = (self.logits / self.temperature).log_softmax(-1)  # [*batch, K]
        component = torch.distributions.Normal(self.loc, self.scale, validate_args=False)
        return (log_mixing + component.log_prob(value.unsqueeze(-1))).logsumexp(-1)

    def sample(self, sample_shape: Sequence[int] = ONE_DRAW) -> Tensor:
        """Return draws of q, ``[*sample_shape, *batch_shape]``, without gradient; exact but for ``"discrete"``."""
        if self.estimator == "discrete":
            return self.discrete_sample(None, sample_shape)
        with torch.no_grad():
            slab = self.slab_sample(sample_shape)
            spike = 0.0 if self.spike_scale is None else self.spike_scale * torch.randn_like(slab)
            return torch.where(self._draw_gates(sample_shape), slab, spike)

    def slab_sample(self, sample_shape: Sequence[int] = ONE_DRAW) -> Tensor:
        """Return draws of ``Σₖ φₖ N(μₖ, σₖ²)``, ``[*sample_shape, *batch_shape]``, without gradient."""
        with torch.no_grad():
            codes = self._draw_codes(None, sample_shape)
            loc, scale = self._select(self.loc, codes), self._select(self.scale, codes)
            return loc + scale * torch.randn_like(loc)

    def discrete_sample(self, temperature: float | None = None, sample_shape: Sequence[int] = ONE_DRAW) -> Tensor:
        """Draw a discrete network, ``[*sample_shape, *batch_shape]``: 0 or a codebook value, no gradient.

        The gate is Bernoulli(λ), the code Categorical(φ) at the *evaluation* ``temperature`` (``None``: τ).
        Near-one-hot training responsibilities make averaging inert; a higher temperature spreads the codes.
        """
        included, codes = self.sample_symbols(temperature, sample_shape)
        with torch.no_grad():
            return torch.where(included, self._select(self.loc, codes), 0.0)

    def sample_symbols(
        self, temperature: float | None = None, sample_shape: Sequence[int] = ONE_DRAW
    ) -> tuple[Tensor, Tensor]:
        """Draw gates (bool) and codes (int64) of :meth:`discrete_sample`, ``[*sample_shape, *batch_shape]``."""
        with torch.no_grad():
            return self._draw_gates(sample_shape), self._draw_codes(temperature, sample_shape)

    def rsample(self, sample_shape: Sequence[int] = ONE_DRAW) -> Tensor:
        """Return a differentiable value by ``estimator``, ``[*sample_shape, *batch_shape]`` (class docstring)."""
        estimators: dict[str, Callable[[torch.Size], Tensor]] = {
            "local": self._rsample_local,
            "pathwise": self._rsample_pathwise,
            "straight_through": self._rsample_straight_through,
            "soft": self._rsample_soft,
            "concrete": self._rsample_concrete,
        }
        if not self.has_rsample:
            raise NotImplementedError("SpikeGMM: discrete draws have no rsample; use sample.")
        return estimators[self.estimator](self._extended_shape(torch.Size(sample_shape)))

    def _rsample_local(self, shape: torch.Size) -> Tensor:
        if not torch.is_grad_enabled():  # nothing to train: a loss is that of exact draws
            return self.expand(shape).sample()
        mean, variance = self.moments()
        return LocalDraw.of(self._rsample_parts(shape), mean.expand(shape), variance.expand(shape))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance together."""
        return self.mean, self.variance

    def _rsample_parts(self, shape: torch.Size) -> Tensor:
        """Draw gate, code and noise; the gradient is pathwise in μ and σ, straight-through in λ and φ."""
        whole = self.expand(shape)
        included, codes = whole.sample_symbols()
        loc, scale = whole._select(whole.loc, codes), whole._select(whole.scale, codes)
        # exactly 0, with the gradient of the mean over codes: first order, as of the gate
        assigned = (whole.responsibilities * whole.loc.detach()).sum(-1)
        slab = loc + scale * torch.randn_like(loc) + (assigned - assigned.detach())
        return self._slab_or_spike(included, slab)

    def _slab_or_spike(self, included: Tensor, slab: Tensor) -> Tensor:
        """Return the slab's draw where the gate is open, the spike's elsewhere; straight-through in λ."""
        draw = straight_through_gate(included, self._gates) * slab
        if self.spike_scale is None:
            return draw
        return draw + (~included) * self.spike_scale * torch.randn_like(slab)

    def _rsample_pathwise(self, shape: torch.Size) -> Tensor:
        density = self if self.spike_scale is None else self.as_mixture()  # whose gate is open
        value = density.expand(shape).sample()
        # θ = F⁻¹(u) moves by -∂F/∂η / f(θ) with a parameter η; draws of the atom stay where they are.
        below = density.cdf(value)
        with torch.no_grad():
            slope = density.gates * density.slab_log_prob(value).exp()
            slope = slope.clamp_min(torch.finfo(slope.dtype).tiny)
        moved = (below - below.detach()) / slope  # exactly 0
        return torch.where(value == 0, value, value - moved)

    def _rsample_straight_through(self, shape: torch.Size) -> Tensor:
        soft = self.mean
        return (self.mode.detach() + (soft - soft.detach())).expand(shape)  # the bracket is exactly zero

    def _rsample_soft(self, shape: torch.Size) -> Tensor:
        return self.mean.expand(shape)

    def _rsample_concrete(self, shape: torch.Size) -> Tensor:
        gates, logits = self.gates.expand(shape), self.logits / self.temperature
        logits = logits.log_softmax(-1).expand(*shape, self.num_components)
        gumbel = -torch.empty_like(logits).exponential_().log()  # -log E, E ~ Exp(1)
        code = ((logits + gumbel) / self.temperature).softmax(-1)
        eps = torch.finfo(gates.dtype).eps
        # logit is infinite at 0 and 1, of gates as of noise.
        uniform = torch.rand_like(gates).clamp(eps, 1 - eps)
        noisy = gates.clamp(eps, 1 - eps).logit() + uniform.logit()
        return (noisy / self.temperature).sigmoid() * (code * self.loc).sum(-1)

    def _draw_gates(self, sample_shape: Sequence[int]) -> Tensor:
        gates = self.gates.expand(self._extended_shape(torch.Size(sample_shape)))
        return torch.rand_like(gates) < gates

    def _draw_codes(self, temperature: float | None, sample_shape: Sequence[int]) -> Tensor:
        """Return int64 codes by inverse CDF (much faster than multinomial), ``[*sample_shape, *batch_shape]``."""
        cumulative = self.responsibilities_at(temperature).cumsum(-1)  # [*batch, K]
        shape = self._extended_shape(torch.Size(sample_shape))
        uniform = torch.rand(shape, dtype=cumulative.dtype, device=cumulative.device).unsqueeze(-1)
        # Times the last sum, which rounding leaves beside 1; >=, so that a first component of probability 0 is
        # never drawn.
        return (uniform * cumulative[..., -1:] >= cumulative[..., :-1]).sum(-1)

    def _select(self, per_component: Tensor, codes: Tensor) -> Tensor:
        """Return ``per_component[..., codes]`` with ``per_component`` broadcastable to ``[*batch_shape, K]``."""
        if per_component.dim() == 1:
            return per_component.expand(self.num_components)[codes]
        table = per_component.expand(*codes.shape, self.num_components)
        return table.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
