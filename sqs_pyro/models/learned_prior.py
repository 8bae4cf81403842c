"""The learned prior of a network: a spike and the components of its guide."""

from collections.abc import Mapping
from typing import Literal

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor

from sqs_pyro.arguments import is_finite
from sqs_pyro.distributions import Codebook, SpikeAndMixture
from sqs_pyro.documents import shown
from sqs_pyro.errors import NetworkError
from sqs_pyro.models.network_prior import Codebooks, NetworkPrior, Scope, check_scope
from sqs_pyro.networks.weight_scale import weight_scale

_QUANTILE_COMPONENTS = 16


class LearnedPrior(NetworkPrior):
    """The empirical prior ``(1-ρ) δ₀ + ρ Σₖ πₖ N(μₖ, σₖ²)`` whose components are the guide's.

    Under it the discrete part of the KL is the expected code length of gates and codes. ρ is a parameter of the
    model, learned by the ELBO's gradient or set by :meth:`set_inclusion`; μ, σ and π belong to the guide made
    last for the model. Before there is one, the components are equal-mass quantile bins of the pretrained
    weights.

    Args:
        inclusion: ρ at the start, in (0, 1).
        scope: ``"layer"`` learns a ρ for each site, ``"global"`` one for all. With ``"structured"`` every weight
            has its own, which is only set, not learned: its probability given the weights before, by the law of
            :mod:`sqs_pyro.packing.urns`.

    Raises:
        NetworkError: an impossible argument.
    """

    def __init__(self, inclusion: float = 0.5, scope: Scope | Literal["structured"] = "layer") -> None:
        super().__init__()
        if not is_finite(inclusion) or not 0 < inclusion < 1:
            raise NetworkError(f"inclusion is {shown(inclusion)}, but must be above 0 and below 1.")
        if scope != "structured":
            check_scope(scope)
        self.scope, self._initial = scope, inclusion
        self._codebooks: tuple[Codebooks, ...] = ()  # in a tuple: a reference, not a submodule

    def start(self, sites: Mapping[str, Tensor]) -> None:
        """Make one ρ a site or one for all, and quantile components of each site."""
        self._shapes = {name: weight.shape for name, weight in sites.items()}
        like = next(iter(sites.values()))
        if self.scope == "structured":
            count = sum(weight.numel() for weight in sites.values())
            self.register_buffer("inclusion", torch.full((count,), self._initial, device=like.device))
        else:
            count = 1 if self.scope == "global" else len(sites)  # one parameter for all sites: [1] or [sites]
            start = torch.full((count,), self._initial, device=like.device)
            self.inclusion = PyroParam(start, constraints.unit_interval)
        for index, weight in enumerate(sites.values()):
            # By number: names of sites have points, which buffers' names must not. Not saved, as it follows from
            # the weights.
            self.register_buffer(f"quantiles_{index}", _quantile_components(weight), persistent=False)

    def bind_codebooks(self, codebooks: Codebooks) -> None:
        """Share these components from here on."""
        self._codebooks = (codebooks,)

    def inclusions(self) -> dict[str, Tensor]:
        """Return ρ of each site, scalars; of a structured prior that of each weight."""
        if self.scope == "structured":
            parts = self.inclusion.split([shape.numel() for shape in self._shapes.values()])
            return {
                name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
            }
        inclusion = self.inclusion.expand(len(self._shapes))
        return dict(zip(self._shapes, inclusion, strict=True))

    @torch.no_grad()
    def set_inclusion(self, inclusion: Mapping[str, float | Tensor]) -> None:
        """Set ρ of every site; for a prior with one ρ for all, their mean over weights.

        The ELBO's optimum is the mean of the site's gates λ. A structured prior takes a ρ for each weight, too.

        Raises:
            NetworkError: a site is missing, or a value is not in [0, 1].
        """
        missing = [name for name in self._shapes if name not in inclusion]
        given = {name: torch.as_tensor(value) for name, value in inclusion.items()}
        wrong = [name for name, value in given.items() if not self._takes(name, value)]
        if missing or wrong:
            raise NetworkError(
                f"set_inclusion was given no probability for {', '.join(missing + wrong)}: give a number in "
                "[0, 1] for every site of the model."
            )
        if self.scope == "structured":
            parts = [given[name].expand(shape).reshape(-1) for name, shape in self._shapes.items()]
            self.inclusion = torch.cat(parts).to(self.inclusion)
            return
        values = torch.tensor([float(given[name]) for name in self._shapes])
        if self.scope == "global":
            sizes = torch.tensor([shape.numel() for shape in self._shapes.values()])
            # The ELBO's optimum of one ρ: every weight counts the same, whichever layer it is in.
            values = (values * sizes).sum(0, keepdim=True) / sizes.sum()
        self.inclusion = values.to(self.inclusion)

    def _takes(self, name: str, inclusion: Tensor) -> bool:
        """Return whether a site can have such probabilities: one, or of a structured prior one a weight."""
        shapes = [torch.Size(), self._shapes.get(name)] if self.scope == "structured" else [torch.Size()]
        return inclusion.shape in shapes and bool(((inclusion >= 0) & (inclusion <= 1)).all())

    def site_priors(self, hyper: Mapping[str, Tensor]) -> dict[str, dist.TorchDistribution]:
        """Return the distributions with ρ and the components as they are now."""
        inclusions = self.inclusions()
        return {
            name: SpikeAndMixture(
                inclusions[name], *self._components(index, name), shape, validate_args=False
            ).to_event(len(shape))
            for index, (name, shape) in enumerate(self._shapes.items())
        }

    def _components(self, index: int, name: str) -> Codebook:
        # The guide's own tensors: KL terms know by identity that the components are shared.
        if self._codebooks:
            return self._codebooks[0](name)
        return Codebook(*self.get_buffer(f"quantiles_{index}"))


def _quantile_components(weight: Tensor) -> Tensor:
    """Return loc, scale and log_mixing of equal-mass bins of a tensor's values, ``[3, 1, K]``."""
    ordered = weight.detach().float().flatten().sort().values
    bins = ordered.tensor_split(min(_QUANTILE_COMPONENTS, len(ordered)))  # of equal counts, but for one
    loc = torch.stack([values.mean() for values in bins])
    scale = torch.stack([values.std(correction=0) for values in bins])
    floor = 1e-3 * weight_scale(weight)  # bins of equal values, or of one
    mixing = torch.tensor([len(values) / len(ordered) for values in bins], device=weight.device)
    return torch.stack([loc, scale.clamp_min(floor), mixing.log()]).unsqueeze(1)
