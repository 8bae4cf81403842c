"""A spike-and-slab whose slabs are as wide as the data say."""

from collections.abc import Callable, Mapping

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor

from sqs_pyro.arguments import is_finite
from sqs_pyro.distributions import SpikeAndSlab
from sqs_pyro.documents import shown
from sqs_pyro.errors import NetworkError
from sqs_pyro.models.network_prior import NetworkPrior
from sqs_pyro.networks.weight_scale import weight_scale


class LearnedSlab(NetworkPrior):
    """Spike-and-slab ``(1-λ₀) δ₀ + λ₀ N(0, σ₀²)`` with a σ₀ for each layer, a parameter of the model.

    It is the maximum of the ELBO (empirical Bayes): the root of the mean of ``w² + s²`` over weights that are
    included. Where most of a layer's weights turn out to be zero, the few that are left can be large, which a
    width fixed beforehand would hold against them. Tensors of one dimension (biases) keep theirs: one number says
    nothing of the width it is from.

    Args:
        inclusion: λ₀, prior probability that a weight is not zero.
        slab_scale: σ₀ at the start, or a function of a site's name and value to it; by default the root mean
            square of the pretrained weights.

    Raises:
        NetworkError: an impossible argument.
    """

    def __init__(
        self, inclusion: float = 0.5, slab_scale: float | Callable[[str, Tensor], float] | None = None
    ) -> None:
        super().__init__()
        if not is_finite(inclusion) or not 0 < inclusion < 1:
            raise NetworkError(f"inclusion is {shown(inclusion)}, but must be above 0 and below 1.")
        self.inclusion, self._given = inclusion, slab_scale

    def start(self, sites: Mapping[str, Tensor]) -> None:
        """Make σ₀ of each site."""
        scales = [self._first(name, weight).float() for name, weight in sites.items()]
        for name, scale in zip(sites, scales, strict=True):
            if not bool(scale.isfinite() & (scale > 0)):
                raise NetworkError(f"slab_scale of '{name}' is {float(scale)}, but must be a positive number.")
        self._shapes = {name: weight.shape for name, weight in sites.items()}
        self.scale = PyroParam(torch.stack(scales), constraints.positive)  # [sites]
        self.register_buffer("first_scale", torch.stack(scales))

    def hold(self) -> None:
        """Go back to the first σ₀ and stay there, until :meth:`learn`.

        Weights of a network that has learned nothing yet are small, and slabs that follow them keep them so.
        """
        self.scale = self.get_buffer("first_scale").clone()
        self.scale_unconstrained.requires_grad_(False)
        self.scale_unconstrained.grad = None  # of zeros, momentum would go on

    def learn(self) -> None:
        """Learn σ₀ from here on, as at the start."""
        self.scale_unconstrained.requires_grad_(True)

    def _first(self, name: str, weight: Tensor) -> Tensor:
        rms = weight_scale(weight.detach())
        given = self._given(name, weight.detach()) if callable(self._given) else self._given
        return rms if given is None else torch.full_like(rms, given)

    def site_priors(self, hyper: Mapping[str, Tensor]) -> dict[str, dist.TorchDistribution]:
        """Return the distributions with σ₀ as it is now."""
        learned, first, found = self.scale, self.get_buffer("first_scale"), {}
        for index, (name, shape) in enumerate(self._shapes.items()):
            scale = learned[index] if len(shape) > 1 else first[index]
            slab = dist.Normal(torch.zeros_like(scale), scale, validate_args=False)
            prior = SpikeAndSlab(torch.full_like(scale, self.inclusion), slab, validate_args=False)
            found[name] = prior.expand(shape).to_event(len(shape))
        return found
