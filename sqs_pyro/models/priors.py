"""Priors of a network's weights, swapped by one argument: ``BayesianNetwork(net, prior=...)``.

A prior is one distribution for every weight, a function ``(name, weight) -> distribution``, or a
:class:`~sqs_pyro.models.network_prior.NetworkPrior`, which may have parameters and random quantities of its own.
"""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor

from sqs_pyro.distributions import GaussianSpikeAndSlab, SpikeAndSlab
from sqs_pyro.errors import NetworkError
from sqs_pyro.models.network_prior import FixedPrior, HyperPrior, Scope, SitePrior, check_scope
from sqs_pyro.networks.weight_scale import weight_scale

Slab = Literal["normal", "laplace", "student_t"]

_SPIKE_OF_SLAB = 0.05  # width of a Gaussian spike, in units of the slab's


def scale_matched_prior(
    inclusion: float = 0.5,
    slab: Slab = "normal",
    *,
    slab_scale: float | None = None,
    degrees_of_freedom: float = 4.0,
) -> SitePrior:
    """Return a spike-and-slab; its slab has mean 0 and the root mean square of the layer's pretrained weights
    (:func:`~sqs_pyro.networks.weight_scale.weight_scale`).

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

    return partial(_spike_and_slab, inclusion, slab, slab_scale, degrees_of_freedom)


def normal_prior(slab_scale: float | None = None) -> SitePrior:
    """Return a Normal without a spike, the paper's ablation: weights are small, but none need be zero.

    Args:
        slab_scale: its standard deviation, instead of the root mean square of the layer's pretrained weights.
    """

    return partial(_normal, slab_scale)


def gaussian_spike_prior(
    inclusion: float = 0.5, *, spike_scale: float | None = None, slab_scale: float | None = None
) -> SitePrior:
    """Return two Gaussians around zero, a narrow one in place of the point mass (as DGMS has it).

    Args:
        inclusion: λ₀, prior probability of the wide one.
        spike_scale: standard deviation of the narrow one, instead of a twentieth of the wide one's.
        slab_scale: standard deviation of the wide one, instead of the root mean square of the layer's pretrained
            weights.
    """

    return partial(_two_gaussians, inclusion, spike_scale, slab_scale)


# Priors of a site are functions of a module with their options bound, not closures: those can be pickled.


def _spike_and_slab(
    inclusion: float, slab: Slab, slab_scale: float | None, degrees_of_freedom: float, name: str, weight: Tensor
) -> dist.TorchDistribution:
    scale = weight_scale(weight)
    return SpikeAndSlab(torch.full_like(scale, inclusion), _slab(slab, scale, slab_scale, degrees_of_freedom))


def _normal(slab_scale: float | None, name: str, weight: Tensor) -> dist.TorchDistribution:
    return _slab("normal", weight_scale(weight), slab_scale, 4.0)


def _two_gaussians(
    inclusion: float, spike_scale: float | None, slab_scale: float | None, name: str, weight: Tensor
) -> dist.TorchDistribution:
    scale = weight_scale(weight)
    slab = scale if slab_scale is None else slab_scale
    spike = slab * _SPIKE_OF_SLAB if spike_scale is None else spike_scale
    return GaussianSpikeAndSlab(torch.full_like(scale, inclusion), spike, slab)


def _slab(kind: Slab, rms: Tensor, scale: float | None, degrees_of_freedom: float) -> dist.TorchDistribution:
    """Return a slab of mean 0 with a given scale parameter, or with a given root mean square."""
    given = None if scale is None else torch.full_like(rms, scale)
    # In the weight's dtype and on its device, as `rms` is.
    zero = torch.zeros_like(rms)
    if kind == "laplace":
        return dist.Laplace(zero, rms / 2**0.5 if given is None else given)  # Var = 2 b²
    if kind == "student_t":
        matched = rms * (1 - 2 / degrees_of_freedom) ** 0.5  # Var = s² ν / (ν - 2)
        return dist.StudentT(torch.full_like(rms, degrees_of_freedom), zero, matched if given is None else given)
    return dist.Normal(zero, rms if given is None else given)


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
            # Its inclusion is replaced at every draw; the slabs are what is used of it.
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
        # The network may be on a GPU already, and is not moved again then.
        self.concentrations = self.concentrations.to(next(iter(sites.values())).device)

    def hyper_priors(self) -> dict[str, HyperPrior]:
        """Return one Beta for each site, or one for all."""
        beta = dist.Beta(*self.concentrations)
        if self.scope == "global":
            return {"inclusion": HyperPrior(beta, tuple(self._priors))}
        return {self._hyper_site(name): HyperPrior(beta, (name,)) for name in self._priors}

    def site_priors(self, hyper: Mapping[str, Tensor]) -> dict[str, dist.TorchDistribution]:
        """Return spikes and slabs with the inclusions given; their batch shapes come before the weights' shape."""
        found = {}
        for name, prior in self._priors.items():
            inclusion, shape = hyper[self._hyper_site(name)], self._shapes[name]
            aligned = inclusion.reshape(*inclusion.shape, *[1] * len(shape))  # [*plates, 1..]
            joint = SpikeAndSlab(aligned, prior.base_slab, validate_args=False).expand(inclusion.shape + shape)
            found[name] = joint.to_event(len(shape))
        return found

    def _hyper_site(self, name: str) -> str:
        return "inclusion" if self.scope == "global" else f"{name}.inclusion"
