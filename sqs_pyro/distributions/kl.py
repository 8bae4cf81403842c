r"""KL terms and their bounds, registered by type pair.

Spike and slab are mutually singular, so for ``q = (1-λ) δ₀ + λ m`` and ``p = (1-λ₀) δ₀ + λ₀ slab``, exactly,

    KL(q‖p) = KL(Bern(λ)‖Bern(λ₀)) + λ KL(m‖slab).

For a mixture ``m = Σₖ φₖ Nₖ`` the last term has no closed form; with ``κₖ = KL(Nₖ‖slab)`` it is bracketed by
``Σₖ φₖ κₖ - H(φ) <= KL(m‖slab) <= Σₖ φₖ κₖ`` (proofs: docs/method.md). Kinds of bound:

* ``"jensen"``: ``Σₖ φₖ κₖ``, never below the true KL;
* ``"lower"``: ``Σₖ φₖ κₖ - H(φ)``, never above it;
* ``"dominant"``: ``κ`` at argmax φ, Eq. 8 of the paper; *not* a bound.

A new prior is one distribution and, where a formula is known, one function::

    @register_bound("jensen", SpikeGMM, MyPrior)
    def _jensen_my_prior(q: SpikeGMM, p: MyPrior) -> Tensor: ...   # [*batch_shape]
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl_divergence, register_kl
from torch.distributions.kl import _KL_REGISTRY

import sqs_pyro.distributions.student_t_kl  # noqa: F401  registers KL(Normal‖StudentT)
from sqs_pyro.distributions.numerics import BernoulliDivergence, log_or_neg_inf, weighted
from sqs_pyro.distributions.spike_and_slab import SpikeAndSlab
from sqs_pyro.distributions.spike_gmm import SpikeGMM
from sqs_pyro.errors import ModelError

BOUNDS = ("jensen", "dominant", "lower")
Bound = Callable[[Any, Any], Tensor]
_REGISTRY: dict[tuple[str, type, type], Bound] = {}


def register_bound(kind: str, type_q: type, type_p: type) -> Callable[[Bound], Bound]:
    """Decorator: ``function(q, p) -> [*batch_shape]`` computes the bound ``kind`` for this type pair.

    Subclasses inherit it: the most specific prior wins, then the most specific q, see :func:`kl_bound`.

    Raises:
        ValueError: for an unknown kind or arguments that are not distribution classes.
    """
    _check_kind(kind)
    for given in (type_q, type_p):
        if not (isinstance(given, type) and issubclass(given, Distribution)):
            raise ValueError(f"register_bound: expected two distribution classes, but got {given!r}.")

    def decorator(function: Bound) -> Bound:
        _REGISTRY[kind, type_q, type_p] = function
        return function

    return decorator


def kl_bound(q: Distribution, p: Distribution, kind: str = "jensen") -> Tensor:
    """Return the bound ``kind`` on KL(q‖p), ``[*batch_shape]`` of q, by the most specific registered type pair.

    The most specific prior wins, whoever registered it, then the most specific q: what a prior of one's own says
    for every :class:`SpikeGMM` counts before what the library says for a guide's subclass of it and a more
    general prior. An exact KL registered with torch (``register_kl``) stands for every kind, where no bound of
    this kind is registered for the same or a more specific pair.

    ``Independent`` (``to_event``) and ``MaskedDistribution`` are unwrapped on both sides.

    Raises:
        ValueError: for an unknown kind.
        ModelError: (a ``ValueError``) two registered pairs fit, of which neither is more specific.
        NotImplementedError: when neither is registered; estimate with :func:`monte_carlo_kl` then.
    """
    _check_kind(kind)
    if isinstance(q, Independent) and isinstance(p, Independent):
        # Bounds are registered for distributions of single weights; what is shared as an event is summed here.
        q, p, shared = strip_independent(q, p)
        return sum_rightmost(kl_bound(q, p, kind), shared)
    if isinstance(q, MaskedDistribution) and isinstance(p, MaskedDistribution):
        inner = kl_bound(q.base_dist, p.base_dist, kind)
        # What either side masks counts for nothing, as in Pyro's own KL of masked distributions.
        return scale_and_mask(scale_and_mask(inner, mask=q._mask), mask=p._mask)
    if isinstance(p, ExpandedDistribution):  # of a class without an expand of its own: registered is the class
        return kl_bound(q, p.base_dist, kind).expand(q.batch_shape)
    if isinstance(q, SpikeGMM) and not q.has_atom_at_zero and getattr(p, "has_atom_at_zero", False):
        q = q.as_mixture()  # a density never uses the prior's atom: its gate is open
    function = _most_specific(kind, type(q), type(p))
    return kl_divergence(q, p) if function is None else function(q, p)


def strip_independent(q: Independent, p: Independent) -> tuple[Distribution, Distribution, int]:
    """Return both distributions without the event dimensions they share, and how many those are."""
    shared = min(q.reinterpreted_batch_ndims, p.reinterpreted_batch_ndims)

    def strip(d: Independent) -> Distribution:
        left = d.reinterpreted_batch_ndims - shared
        return type(d)(d.base_dist, left) if left else d.base_dist

    return strip(q), strip(p), shared


def _check_kind(kind: str) -> None:
    if kind not in BOUNDS:
        raise ValueError(f"The kind of KL bound must be one of {', '.join(BOUNDS)}, but got {kind!r}.")


def _most_specific(kind: str, type_q: type, type_p: type) -> Bound | None:
    """Return the bound of the most specific p and, for it, the most specific q; None where none is registered."""
    # From the most specific prior on and, within one prior, from the most specific q on.
    pairs = [(q, p) for p in type_p.__mro__ for q in type_q.__mro__]
    if not any((kind, *pair) in _REGISTRY for pair in pairs):
        return None
    # Exact KLs of torch take part: one for a more specific pair is better than any bound.
    known = [pair for pair in pairs if (kind, *pair) in _REGISTRY or pair in _KL_REGISTRY]
    # Refused below unless it is more specific than every other: the order of base classes must not decide.
    q, p = known[0]
    for other_q, other_p in known:
        if not issubclass(p, other_p) or (p is other_p and not issubclass(q, other_q)):
            raise ModelError(
                f"KL({type_q.__name__}‖{type_p.__name__}) is ambiguous: it is registered for ({q.__name__}, "
                f"{p.__name__}) and ({other_q.__name__}, {other_p.__name__}), neither of which is more specific; "
                f"register a bound for ({type_q.__name__}, {type_p.__name__})."
            )
    return _REGISTRY.get((kind, q, p)) or _KL_REGISTRY[q, p]


def gate_divergence(gate: Tensor, inclusion: Tensor) -> Tensor:
    """Return ``KL(Bern(λ)‖Bern(λ₀))`` in nats, elementwise; exact, with finite gradients, at λ = 0 and 1 too."""
    return BernoulliDivergence.apply(gate, inclusion)


def component_divergence(q: SpikeGMM, slab: Distribution) -> Tensor:
    """Return ``κₖ = KL(N(μₖ, σₖ²)‖slab)``, broadcastable to ``[*batch_shape, K]``.

    Works for every slab for which torch or Pyro knows ``KL(Normal‖slab)``; a codebook and a slab shared by a
    layer cost K evaluations, not N·K.

    Raises:
        NotImplementedError: when that KL is not known.
    """
    slab_dims = len(slab.batch_shape)
    # [K, 1.., *b]: components in front, so that a slab's batch dimensions align with the weights' on the right.
    loc, scale = _components_first(q.loc, slab_dims), _components_first(q.scale, slab_dims)
    component = Normal(loc, scale, validate_args=False)
    return kl_divergence(component, slab).movedim(0, -1)


def _components_first(per_component: Tensor, slab_dims: int) -> Tensor:
    """Move components to the front, ``[*b, K] -> [K, 1.., *b]``, for a slab of ``slab_dims`` batch dimensions."""
    missing = max(0, slab_dims - (per_component.dim() - 1))
    first = per_component.movedim(-1, 0)
    return first.reshape(first.shape[0], *(1,) * missing, *first.shape[1:])


def mixture_divergence(q: SpikeGMM, slab: Distribution, kind: str) -> Tensor:
    """Return the bound ``kind`` on ``KL(Σₖ φₖ Nₖ‖slab)``, broadcastable to ``[*batch_shape]``."""
    component = component_divergence(q, slab)
    if kind == "dominant":
        table = component.expand(*q.batch_shape, q.num_components)  # [*batch_shape, K]
        return table.gather(-1, q.codes.unsqueeze(-1)).squeeze(-1)  # Eq. 8
    expected = weighted(q.responsibilities, component).sum(-1)
    return expected - q.assignment_entropy if kind == "lower" else expected


def certified_bracket(q: Distribution, p: Distribution) -> tuple[Tensor, Tensor]:
    """Return ``lower <= KL(q‖p)`` and ``upper >= KL(q‖p)``, each ``[*batch_shape]``, ``λ H(φ)`` apart."""
    return kl_bound(q, p, "lower"), kl_bound(q, p, "jensen")


def spike_gmm_bound(q: SpikeGMM, p: SpikeAndSlab, kind: str = "jensen") -> Tensor:
    """Return ``KL(Bern(λ)‖Bern(λ₀)) + λ mixture_divergence``, ``[*batch_shape]``, of a slab with a Normal KL."""
    slab = mixture_divergence(q, p.base_slab, kind)
    return gate_divergence(q.gates, p.base_inclusion) + weighted(q.gates, slab)


def density_bound(q: SpikeGMM, p: Distribution, kind: str = "jensen") -> Tensor:
    """Return the bound against a density, in which a point has no mass: infinite unless the gate is exactly 1."""
    if not q.has_atom_at_zero:
        return mixture_divergence(q.as_mixture(), p, kind).expand(q.batch_shape)
    return torch.where(q.gates == 1, mixture_divergence(q, p, kind), torch.inf)


for _kind in BOUNDS:
    register_bound(_kind, SpikeGMM, SpikeAndSlab)(partial(spike_gmm_bound, kind=_kind))
    register_bound(_kind, SpikeGMM, Normal)(partial(density_bound, kind=_kind))


@register_kl(SpikeGMM, SpikeAndSlab)
@register_kl(SpikeGMM, Normal)
def _kl_spike_gmm(q: SpikeGMM, p: Distribution) -> Tensor:
    """Return the Jensen bound for ``torch.distributions.kl_divergence`` (exact for K = 1 or one-hot φ)."""
    return kl_bound(q, p, "jensen")


@register_kl(SpikeAndSlab, SpikeAndSlab)
def _kl_spike_and_slab(q: SpikeAndSlab, p: SpikeAndSlab) -> Tensor:
    """Return the exact KL, wherever that of the slabs is known."""
    slab = kl_divergence(q.base_slab, p.base_slab)
    kl = gate_divergence(q.inclusion, p.base_inclusion) + weighted(q.inclusion, slab)
    return kl.expand(torch.broadcast_shapes(q.batch_shape, p.batch_shape))


@register_kl(Normal, SpikeAndSlab)
def _kl_normal_spike_and_slab(q: Normal, p: SpikeAndSlab) -> Tensor:
    """Return the exact KL: a Gaussian never uses the spike and pays ``-log λ₀`` for it."""
    return kl_divergence(q, p.base_slab) - log_or_neg_inf(p.base_inclusion)
