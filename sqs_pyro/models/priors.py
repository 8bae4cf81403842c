"""Priors of a network's weights, swapped by one argument: ``BayesianNetwork(net, prior=...)``.

A prior is one distribution for every weight, a function ``(name, weight) -> distribution``, or a
:class:`NetworkPrior`, which may have parameters and random quantities of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from sqs_pyro.distributions import GaussianSpikeAndSlab, SpikeAndMixture, SpikeAndSlab
from sqs_pyro.errors import NetworkError

SitePrior: TypeAlias = Callable[[str, Tensor], dist.TorchDistribution]
Slab = Literal["normal", "laplace", "student_t"]
Scope = Literal["layer", "global"]
#: Where components of the weights' posterior are found: ``name -> (loc, scale, log_mixing)``, each ``[G, K]``.
Codebooks: TypeAlias = Callable[[str], tuple[Tensor, Tensor, Tensor]]

_QUANTILE_COMPONENTS = 16
_SPIKE_OF_SLAB = 0.05


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


def normal_prior(slab_scale: float | None = None) -> SitePrior:
    """A Normal without a spike, the paper's ablation: weights are small, but nothing says that they are zero.

    Args:
        slab_scale: its standard deviation, instead of the root mean square of the layer's pretrained weights.
    """

    def prior(name: str, weight: Tensor) -> dist.TorchDistribution:
        return _slab("normal", _rms(weight), slab_scale, 4.0)

    return prior


def gaussian_spike_prior(
    inclusion: float = 0.5, *, spike_scale: float | None = None, slab_scale: float | None = None
) -> SitePrior:
    """Two Gaussians around zero, a narrow one in place of the point mass (as DGMS has it).

    Args:
        inclusion: λ₀, prior probability of the wide one.
        spike_scale: standard deviation of the narrow one, instead of a twentieth of the wide one's.
        slab_scale: standard deviation of the wide one, instead of the root mean square of the layer's pretrained
            weights.
    """

    def prior(name: str, weight: Tensor) -> dist.TorchDistribution:
        slab = _rms(weight) if slab_scale is None else slab_scale
        spike = slab * _SPIKE_OF_SLAB if spike_scale is None else spike_scale
        return GaussianSpikeAndSlab(torch.full_like(_rms(weight), inclusion), spike, slab)

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


@dataclass(frozen=True)
class HyperPrior:
    """A random quantity of a prior.

    Attributes:
        law: its distribution.
        sites: names of the sites whose prior depends on it.
    """

    law: dist.TorchDistribution
    sites: tuple[str, ...]


class NetworkPrior(PyroModule):
    """A prior over all sites of a network, which may have parameters and random quantities of its own.

    Subclasses say in :meth:`start` what they need of the pretrained weights and in :meth:`site_priors` what the
    laws are; ``hyper_priors`` names what is random in them, which the guide must sample, too.
    """

    belongs_to_a_network = False

    def start(self, sites: Mapping[str, Tensor]) -> None:
        """Get to know the sites: their pretrained weights by name. Called once, by the network's model."""
        raise NotImplementedError

    def hyper_priors(self) -> dict[str, HyperPrior]:
        """The prior's own sample sites by name, in the order in which they are sampled."""
        return {}

    def site_priors(self, hyper: Mapping[str, Tensor]) -> dict[str, dist.TorchDistribution]:
        """The law of every site's weight tensor by name, given the values of the prior's own sites."""
        raise NotImplementedError

    def bind_codebooks(self, codebooks: Codebooks) -> None:
        """Get to know the guide's components, for priors that share them; others do nothing."""

    def forward(self) -> dict[str, dist.TorchDistribution]:
        """Sample the prior's own sites and return the law of every site by name."""
        return self.site_priors({name: pyro.sample(name, own.law) for name, own in self.hyper_priors().items()})


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
        self._laws: dict[str, dist.TorchDistribution] = {}
        self._shapes: dict[str, torch.Size] = {}
        for name, weight in sites.items():
            law = self.prior if isinstance(self.prior, dist.Distribution) else self.prior(name, weight)
            if law.event_shape:
                raise NetworkError(
                    f"The prior of '{name}' has event shape {tuple(law.event_shape)}, but must be a "
                    "distribution over single weights (event shape ()), batch shape () or the weight's."
                )
            self._laws[name], self._shapes[name] = law, weight.shape

    def site_priors(self, hyper: Mapping[str, Tensor]) -> dict[str, dist.TorchDistribution]:
        """The laws that were given, of as many weights as a site has."""
        return {name: of_shape(law, self._shapes[name]) for name, law in self._laws.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FixedPrior":
        """Move the laws' tensors together with the network's (``.to``, ``.cuda``)."""
        self._laws = {name: _apply_to_distribution(law, fn) for name, law in self._laws.items()}
        return super()._apply(fn, recurse)


class HierarchicalInclusion(FixedPrior):
    """Spike-and-slab whose inclusion probability is random: ``λ₀ ~ Beta(a, b)``, a sample site of the model.

    The site is called ``"<parameter name>.inclusion"``, or ``"inclusion"`` if there is one for all layers; the
    guide learns a Beta posterior for it, so that the share of zeros follows from the data.

    Args:
        concentration1, concentration0: a, b > 0; the prior mean of λ₀ is a / (a + b), and a + b counts as so many
            weights seen before.
        scope: ``"layer"`` or ``"global"``.
        slab, slab_scale, degrees_of_freedom: see :func:`scale_matched_prior`.

    Raises:
        NetworkError: an impossible argument.
    """

    concentrations: Tensor

    def __init__(
        self,
        concentration1: float = 1.0,
        concentration0: float = 1.0,
        scope: Scope = "layer",
        slab: Slab = "normal",
        *,
        slab_scale: float | None = None,
        degrees_of_freedom: float = 4.0,
    ) -> None:
        super().__init__(
            scale_matched_prior(0.5, slab, slab_scale=slab_scale, degrees_of_freedom=degrees_of_freedom)
        )
        if not (concentration1 > 0 and concentration0 > 0):
            raise NetworkError(
                f"The Beta prior has concentrations {concentration1} and {concentration0}, but both must be "
                "positive."
            )
        check_scope(scope)
        self.scope = scope
        self.register_buffer("concentrations", torch.tensor([concentration1, concentration0]), persistent=False)

    def start(self, sites: Mapping[str, Tensor]) -> None:
        """Make the slab of each site."""
        super().start(sites)
        self.concentrations = self.concentrations.to(next(iter(sites.values())).device)

    def hyper_priors(self) -> dict[str, HyperPrior]:
        """One Beta for each site, or one for all."""
        law = dist.Beta(*self.concentrations)
        if self.scope == "global":
            return {"inclusion": HyperPrior(law, tuple(self._laws))}
        return {self._hyper_site(name): HyperPrior(law, (name,)) for name in self._laws}

    def site_priors(self, hyper: Mapping[str, Tensor]) -> dict[str, dist.TorchDistribution]:
        """Spike-and-slab with the inclusions given; their batch shapes come before the weights' shape."""
        laws = {}
        for name, law in self._laws.items():
            inclusion, shape = hyper[self._hyper_site(name)], self._shapes[name]
            aligned = inclusion.reshape(*inclusion.shape, *[1] * len(shape))
            joint = SpikeAndSlab(aligned, law.base_slab, validate_args=False).expand(inclusion.shape + shape)
            laws[name] = joint.to_event(len(shape))
        return laws

    def _hyper_site(self, name: str) -> str:
        return "inclusion" if self.scope == "global" else f"{name}.inclusion"


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


def of_shape(law: dist.TorchDistribution, shape: torch.Size) -> dist.TorchDistribution:
    """The law of independent weights of a shape, each with the ``law``."""
    return law.expand(shape).to_event(len(shape))


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
