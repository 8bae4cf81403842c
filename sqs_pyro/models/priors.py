"""Priors of a network's weights, swapped by one argument: ``BayesianNetwork(net, prior=...)``.

A prior is one distribution for every weight, a function ``(name, weight) -> distribution``, or a
:class:`NetworkPrior`, which may have parameters and random quantities of its own.
"""

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from sqs_pyro.distributions import SpikeAndMixture, SpikeAndSlab
from sqs_pyro.errors import NetworkError

SitePrior: TypeAlias = Callable[[str, Tensor], dist.TorchDistribution]
Slab = Literal["normal", "laplace", "student_t"]
Scope = Literal["layer", "global"]
#: Where components of the weights' posterior are found: ``name -> (loc, scale, log_mixing)``, each ``[G, K]``.
Codebooks: TypeAlias = Callable[[str], tuple[Tensor, Tensor, Tensor]]

_QUANTILE_COMPONENTS = 16


def scale_matched_prior(
    inclusion: float = 0.5,
    slab: Slab = "normal",
    *,
    slab_scale: float | None = None,
    degrees_of_freedom: float = 4.0,
) -> SitePrior:
    """Spike-and-slab; its slab has mean 0 and the root mean square of the layer's pretrained weights.

    Args:
        inclusion: λ₀, prior probability that a weight is not zero.
        slab: ``"normal"``, ``"laplace"`` or ``"student_t"``.
        slab_scale: the slab's scale parameter (σ₀, b or s), instead of the one that matches the layer.
        degrees_of_freedom: ν of a Student-t slab; above 2, so that it has a root mean square.

    Raises:
        NetworkError: an unknown slab or too few degrees of freedom.
    """
    if slab not in ("normal", "laplace", "student_t"):
        raise NetworkError(f"Slab {slab!r} is unknown: use 'normal', 'laplace' or 'student_t'.")
    if not degrees_of_freedom > 2:
        raise NetworkError(f"degrees_of_freedom is {degrees_of_freedom}, but must be above 2.")

    def prior(name: str, weight: Tensor) -> dist.TorchDistribution:
        rms = _rms(weight)
        return SpikeAndSlab(torch.full_like(rms, inclusion), _slab(slab, rms, slab_scale, degrees_of_freedom))

    return prior


def _slab(kind: Slab, rms: Tensor, scale: float | None, degrees_of_freedom: float) -> dist.TorchDistribution:
    """A slab of mean 0 with a given scale parameter, or with a given root mean square."""
    given = None if scale is None else torch.full_like(rms, scale)
    zero = torch.zeros_like(rms)
    if kind == "laplace":
        return dist.Laplace(zero, rms / 2**0.5 if given is None else given)
    if kind == "student_t":
        matched = rms * (1 - 2 / degrees_of_freedom) ** 0.5
        return dist.StudentT(torch.full_like(rms, degrees_of_freedom), zero, matched if given is None else given)
    return dist.Normal(zero, rms if given is None else given)


def _rms(weight: Tensor) -> Tensor:
    return weight.detach().float().square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)


class NetworkPrior(PyroModule):
    """A prior over all sites of a network, which may have parameters and random quantities of its own.

    Subclasses say in :meth:`start` what they need of the pretrained weights and in :meth:`site_priors` what the
    laws are; ``hyper_priors`` names what is random in them, which the guide must sample, too.
    """

    def start(self, sites: Mapping[str, Tensor]) -> None:
        """Get to know the sites: their pretrained weights by name. Called once, by the network's model."""
        raise NotImplementedError

    def hyper_priors(self) -> dict[str, dist.TorchDistribution]:
        """Laws of the prior's own sample sites by name, in the order in which they are sampled."""
        return {}

    def site_priors(self, hyper: Mapping[str, Tensor]) -> dict[str, dist.TorchDistribution]:
        """The law of every site's weight tensor by name, given the values of the prior's own sites."""
        raise NotImplementedError

    def bind_codebooks(self, codebooks: Codebooks) -> None:
        """Get to know the guide's components, for priors that share them; others do nothing."""

    def forward(self) -> dict[str, dist.TorchDistribution]:
        """Sample the prior's own sites and return the law of every site by name."""
        return self.site_priors({name: pyro.sample(name, law) for name, law in self.hyper_priors().items()})


class FixedPrior(NetworkPrior):
    """A distribution for every weight, or a function of a site's name and pretrained value."""

    def __init__(self, prior: dist.TorchDistribution | SitePrior) -> None:
        super().__init__()
        self.prior = prior

    def start(self, sites: Mapping[str, Tensor]) -> None:
        """Make the law of each site.

        Raises:
            NetworkError: a law that is not one of single weights.
        """
        self._laws = {}
        for name, weight in sites.items():
            law = self.prior if isinstance(self.prior, dist.Distribution) else self.prior(name, weight)
            if law.event_shape:
                raise NetworkError(
                    f"The prior of '{name}' has event shape {tuple(law.event_shape)}, but must be a "
                    "distribution over single weights (event shape ()), batch shape () or the weight's."
                )
            self._laws[name] = law.expand(weight.shape).to_event(weight.dim())

    def site_priors(self, hyper: Mapping[str, Tensor]) -> dict[str, dist.TorchDistribution]:
        """The laws that were given."""
        return self._laws

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FixedPrior":
        """Move the laws' tensors together with the network's (``.to``, ``.cuda``)."""
        self._laws = {name: _apply_to_distribution(law, fn) for name, law in self._laws.items()}
        return super()._apply(fn, recurse)


class LearnedPrior(NetworkPrior):
    """The empirical prior ``(1-ρ) δ₀ + ρ Σₖ πₖ N(μₖ, σₖ²)`` whose components are the guide's.

    Under it the discrete part of the KL is the expected code length of gates and codes. ρ is a parameter of the
    model, learned by the ELBO's gradient or set by :meth:`set_inclusion`; μ, σ and π belong to the guide made
    last for the model. Before there is one, the components are equal-mass quantile bins of the pretrained
    weights.

    Args:
        inclusion: ρ at the start, in (0, 1).
        scope: ``"layer"`` learns a ρ for each site, ``"global"`` one for all.

    Raises:
        NetworkError: an impossible argument.
    """

    def __init__(self, inclusion: float = 0.5, scope: Scope = "layer") -> None:
        super().__init__()
        if not 0 < inclusion < 1:
            raise NetworkError(f"inclusion is {inclusion}, but must be above 0 and below 1.")
        check_scope(scope)
        self.scope, self._initial = scope, inclusion
        self._codebooks: tuple[Codebooks, ...] = ()  # in a tuple: a reference, not a submodule

    def start(self, sites: Mapping[str, Tensor]) -> None:
        """One ρ a site or one for all; quantile components of each site."""
        self._shapes = {name: weight.shape for name, weight in sites.items()}
        like = next(iter(sites.values()))
        count = 1 if self.scope == "global" else len(sites)
        start = torch.full((count,), self._initial, device=like.device)
        self.inclusion = PyroParam(start, constraints.unit_interval)
        for index, weight in enumerate(sites.values()):
            self.register_buffer(f"quantiles_{index}", _quantile_components(weight), persistent=False)

    def bind_codebooks(self, codebooks: Codebooks) -> None:
        """Share these components from here on."""
        self._codebooks = (codebooks,)

    def inclusions(self) -> dict[str, Tensor]:
        """ρ of each site, scalars."""
        inclusion = self.inclusion.expand(len(self._shapes))
        return dict(zip(self._shapes, inclusion, strict=True))

    @torch.no_grad()
    def set_inclusion(self, inclusion: Mapping[str, float]) -> None:
        """Set ρ of every site; for a prior with one ρ for all, their mean over weights.

        The ELBO's optimum is the mean of the site's gates λ.

        Raises:
            NetworkError: a site is missing, or a value is not in [0, 1].
        """
        missing = [name for name in self._shapes if name not in inclusion]
        wrong = [name for name, value in inclusion.items() if not 0 <= value <= 1]
        if missing or wrong:
            raise NetworkError(
                f"set_inclusion was given no probability for {', '.join(missing + wrong)}: give a number in "
                "[0, 1] for every site of the model."
            )
        values = torch.tensor([float(inclusion[name]) for name in self._shapes])
        if self.scope == "global":
            sizes = torch.tensor([shape.numel() for shape in self._shapes.values()])
            values = (values * sizes).sum(0, keepdim=True) / sizes.sum()
        self.inclusion = values.to(self.inclusion)

    def site_priors(self, hyper: Mapping[str, Tensor]) -> dict[str, dist.TorchDistribution]:
        """The laws with ρ and the components as they are now."""
        inclusions = self.inclusions()
        return {
            name: SpikeAndMixture(
                inclusions[name], *self._components(index, name), shape, validate_args=False
            ).to_event(len(shape))
            for index, (name, shape) in enumerate(self._shapes.items())
        }

    def _components(self, index: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
        if self._codebooks:
            return self._codebooks[0](name)
        loc, scale, log_mixing = self.get_buffer(f"quantiles_{index}")
        return loc, scale, log_mixing


def check_scope(scope: str) -> None:
    """Raise a :class:`NetworkError` unless ``scope`` is ``"layer"`` or ``"global"``."""
    if scope not in ("layer", "global"):
        raise NetworkError(f"scope is {scope!r}, but must be 'layer' or 'global'.")


def _quantile_components(weight: Tensor) -> Tensor:
    """loc, scale and log_mixing of equal-mass bins of a tensor's values, ``[3, 1, K]``."""
    ordered = weight.detach().float().flatten().sort().values
    bins = ordered.tensor_split(min(_QUANTILE_COMPONENTS, len(ordered)))
    loc = torch.stack([values.mean() for values in bins])
    scale = torch.stack([values.std(correction=0) for values in bins])
    floor = 1e-3 * _rms(weight)  # bins of equal values, or of one
    mixing = torch.tensor([len(values) / len(ordered) for values in bins], device=weight.device)
    return torch.stack([loc, scale.clamp_min(floor), mixing.log()]).unsqueeze(1)


def _apply_to_distribution(d: dist.TorchDistribution, fn: Callable[[Tensor], Tensor]) -> dist.TorchDistribution:
    """A shallow copy of ``d`` with ``fn`` applied to every tensor inside, nested distributions included."""
    moved = d.__class__.__new__(d.__class__)
    for key, value in d.__dict__.items():
        if isinstance(value, Tensor):
            value = fn(value)
        elif isinstance(value, torch.distributions.Distribution):
            value = _apply_to_distribution(value, fn)
        moved.__dict__[key] = value
    return moved
