"""The prior of one weight: a point mass at zero mixed with a continuous slab."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints, transform_to

from sqs_pyro.distributions.numerics import log_or_neg_inf
from sqs_pyro.distributions.parameters import check_probability

ONE_DRAW = torch.Size()


class _ZeroOr(constraints.Constraint):
    """Values that are exactly zero or satisfy ``base``: the support of a spike with a bounded slab."""

    def __init__(self, base: constraints.Constraint) -> None:
        self.base = base
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return (value == 0) | self.base.check(value)


class SpikeAndSlab(TorchDistribution):
    r"""``p(θ) = (1 - λ₀) δ₀(θ) + λ₀ slab(θ)``, a weight that is exactly zero with probability 1 - λ₀.

    Densities are with respect to the measure δ₀ + Lebesgue: ``log_prob(0) = log(1 - λ₀)`` and, anywhere else,
    ``log_prob(θ) = log λ₀ + slab.log_prob(θ)``. A slab draw is never exactly zero (probability 0), so spike
    and slab are mutually singular and the gate can be read off the value.

    Shapes: ``batch_shape = broadcast(inclusion.shape, slab.batch_shape)``, ``event_shape = ()``.

    ``has_rsample`` is the slab's. The value of ``rsample`` is an exact draw; its gradient is pathwise for the
    slab's parameters and straight-through for the inclusion (``dθ/dλ₀ = slab draw``, biased, as in
    Pyro's ``RelaxedBernoulliStraightThrough``), because the gate itself is discrete.

    Args:
        inclusion: λ₀ in [0, 1], a number or a tensor broadcastable with ``slab.batch_shape``.
        slab: any distribution of scalars (``event_shape == ()``) without an atom of its own at zero.
        validate_args: check parameters and values; ``None`` takes torch's default.

    Raises:
        ValueError: when the slab is not a distribution of scalars or the inclusion is not a probability.
    """

    arg_constraints: ClassVar = {"inclusion": constraints.unit_interval}
    has_atom_at_zero = True  # log_prob is with respect to δ₀ + Lebesgue; read by the KL terms

    def __init__(self, inclusion: Tensor | float, slab: Distribution, validate_args: bool | None = None) -> None:
        if not isinstance(slab, Distribution) or slab.event_shape:
            given = f"event_shape {tuple(slab.event_shape)}" if isinstance(slab, Distribution) else repr(slab)
            raise ValueError(
                f"SpikeAndSlab: the slab must be a distribution of scalars, event_shape (), but got {given}; "
                "give the distribution of one weight and call .expand(shape).to_event() on the result."
            )
        # Kept as given: KL terms work on these so that a prior shared by a layer costs one evaluation, not N.
        self.base_inclusion: Tensor = _as_tensor_like(slab, inclusion)
        self.base_slab = slab
        batch_shape = torch.broadcast_shapes(self.base_inclusion.shape, slab.batch_shape)
        super().__init__(batch_shape, torch.Size(), validate_args=False)
        self._validate_args = Distribution._validate_args if validate_args is None else validate_args
        if self._validate_args:
            check_probability("SpikeAndSlab", "inclusion", self.base_inclusion)

    @property
    def inclusion(self) -> Tensor:
        """λ₀, ``[*batch_shape]`` (a view of what was given)."""
        return self.base_inclusion.expand(self.batch_shape)

    @property
    def slab(self) -> Distribution:
        """The continuous part, expanded to ``batch_shape``."""
        same = self.base_slab.batch_shape == self.batch_shape
        return self.base_slab if same else self.base_slab.expand(self.batch_shape)

    @property
    def has_rsample(self) -> bool:
        """Whether the slab's draws are differentiable."""
        return self.base_slab.has_rsample

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        """Return the slab's support together with zero."""
        base = self.base_slab.support
        # Zero lies within the real line already; a positive slab's support gains it.
        return base if base is constraints.real else _ZeroOr(cast(constraints.Constraint, base))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "SpikeAndSlab":
        """Return the same distribution with ``batch_shape`` enlarged; parameters stay views of what was given."""
        new = self._get_checked_instance(SpikeAndSlab, _instance)
        # As given, not expanded: KL terms go on to cost one evaluation for a layer.
        new.base_inclusion, new.base_slab = self.base_inclusion, self.base_slab
        self.base_inclusion.expand(batch_shape)  # torch's own error for a shape that cannot be reached
        super(SpikeAndSlab, new).__init__(torch.Size(batch_shape), torch.Size(), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Sequence[int] = ONE_DRAW) -> Tensor:
        """Return exact draws, ``[*sample_shape, *batch_shape]``, without gradient."""
        with torch.no_grad():
            return self._draw(self.slab.sample, sample_shape)

    def rsample(self, sample_shape: Sequence[int] = ONE_DRAW) -> Tensor:
        """Return exact draws, with gradients as in the class docstring: pathwise slab, straight-through gate."""
        return self._draw(self.slab.rsample, sample_shape)

    def _draw(self, slab_draw: Callable[[torch.Size], Tensor], sample_shape: Sequence[int]) -> Tensor:
        value = slab_draw(torch.Size(sample_shape))
        # Uniform in [0, 1): never below an inclusion of 0, always below one of 1.
        included = torch.rand_like(value.detach()) < self.base_inclusion
        return straight_through_gate(included, self.base_inclusion) * value

    @property
    def mode(self) -> Tensor:
        """``slab.mean`` where λ₀ > 1/2, else 0: the value under the most probable gate."""
        return (self.base_inclusion > 0.5) * self.slab.mean

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log-densities (δ₀ + Lebesgue), ``[*sample_shape, *batch_shape]``; gradients finite at λ₀ = 0."""
        if self._validate_args:
            self._validate_sample(value)
        is_zero = value == 0
        inclusion = self.base_inclusion
        # The slab may be infinite at 0: evaluate it inside its support so that no NaN flows back.
        inside = _inside(self.base_slab, value)
        slab = log_or_neg_inf(inclusion) + self.base_slab.log_prob(value.where(~is_zero, inside))
        log_prob = torch.where(is_zero, log_or_neg_inf(1 - inclusion), slab)
        return log_prob.expand(torch.broadcast_shapes(value.shape, self.batch_shape))

    @property
    def mean(self) -> Tensor:
        """``λ₀ E[slab]``, ``[*batch_shape]``."""
        return self.inclusion * self.slab.mean

    @property
    def variance(self) -> Tensor:
        """``λ₀ Var[slab] + λ₀ (1 - λ₀) E[slab]²``, ``[*batch_shape]``."""
        inclusion = self.inclusion
        return inclusion * (self.slab.variance + (1 - inclusion) * self.slab.mean.square())


def straight_through_gate(included: Tensor, probability: Tensor) -> Tensor:
    """Return ``included`` as exact zeros and ones, with gradient 1 to ``probability``."""
    return included.to(probability.dtype) + (probability - probability.detach())  # the bracket is exactly 0


def _inside(slab: Distribution, like: Tensor) -> Tensor:
    """Return a value inside the slab's support; zero for supports that torch cannot transform."""
    zeros = torch.zeros_like(like)
    try:
        return transform_to(slab.support)(zeros)
    except NotImplementedError:
        return zeros


def _as_tensor_like(slab: Distribution, value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):
        return value
    # The slab's dtype and device, so that a number given for λ₀ works on a GPU and in float64.
    for parameter in vars(slab).values():
        if isinstance(parameter, Tensor) and parameter.is_floating_point():
            return torch.tensor(value, dtype=parameter.dtype, device=parameter.device)
    return torch.tensor(value, dtype=torch.get_default_dtype())
