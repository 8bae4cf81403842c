"""A mixture of guides: the posterior as several modes of the weights, each with a distribution around it.

One mean-field guide knows the surroundings of one mode, and is too sure of what the network does between data,
where modes differ (Foong et al. 2020, arXiv 1909.00719). Guides fitted from different starts disagree there.

With ``q = Σ_m w_m q_m`` and ``L_m`` the ELBOs of its members, the entropy of q is at least the mean of theirs and
at most that and the weights' own, so that

    Σ_m w_m L_m  <=  ELBO(q)  <=  Σ_m w_m L_m + H(w),

with equality on the right where members do not overlap, as modes of networks hardly do. That end is largest for
``w = softmax(L)``.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any, ClassVar, Self

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from sqs_pyro.arguments import is_whole
from sqs_pyro.distributions import SpikeGMM
from sqs_pyro.distributions.numerics import plogp
from sqs_pyro.documents import shown
from sqs_pyro.errors import ArgumentError, NetworkError
from sqs_pyro.inference.elbo import SQSELBO
from sqs_pyro.inference.guides.posterior import PosteriorGuide
from sqs_pyro.inference.guides.site import fit_shared_codebook
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.models.bayesian import BayesianNetwork
from sqs_pyro.models.ownership import OwningModule
from sqs_pyro.networks.fresh import fresh_values
from sqs_pyro.packing import CodedTensor


class Component(OwningModule):
    """Which member is drawn: a module of its own, so that Pyro's store shows its weights.

    Attributes:
        weights: w, ``[M]``, which sum to 1.
    """

    stored_buffers: ClassVar[tuple[str, ...]] = ("weights",)

    weights: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights)


class GuideMixture(PosteriorGuide):
    """Guides of one model as a mixture; called, it draws a member and then that member's sites.

    ``Predictive(model, guide=mixture, num_samples=S)`` draws from all members, with ``parallel=True`` too. Members
    are trained one by one, ``SVI(model, member, optim, SQSELBO())``; what of the model is no site (with
    ``include=".*"`` nothing) is one for all of them and would be trained by each.

    Args:
        members: guides of the same model.
        weights: of the members, positive; equal by default. :meth:`weigh` sets them by ELBOs.

    Raises:
        ArgumentError: no member, or impossible weights.
        NetworkError: members are of different models or sites.
    """

    def __init__(self, members: Sequence[SpikeGMMGuide], weights: Sequence[float] | None = None) -> None:
        # One guide is not a sequence of its parts.
        given = list(members) if isinstance(members, Iterable) else [members]
        _check_members(given, several=isinstance(members, Iterable))
        super().__init__(given[0].model)
        self.members = PyroModule[nn.ModuleList](given)
        device = next(given[0].parameters()).device
        self.component = Component(_normalised(weights, len(given)).to(device))

    @classmethod
    def restarts(cls, model: BayesianNetwork, num_members: int, **options: Any) -> Self:
        """Return a mixture to be trained: a guide from the network's own values, the others from new random ones.

        Args:
            model: the Bayesian network.
            num_members: M.
            **options: of each :class:`SpikeGMMGuide`.

        Raises:
            NetworkError: a module of the network does not know how it begins.
        """
        if not is_whole(num_members, 1):
            raise ArgumentError(f"num_members is {shown(num_members)}, but must be at least 1 guide.")
        own = model.site_values()
        starts = [own, *(fresh_values(model.net, own) for _ in range(num_members - 1))]
        return cls([SpikeGMMGuide(model, init=start, **options) for start in starts])

    @property
    def weights(self) -> Tensor:
        """w of the members, ``[M]``, which sum to 1."""
        return self.component.weights

    @property
    def site_names(self) -> tuple[str, ...]:
        """Names of the sites whose weights members draw."""
        return self._guides()[0].site_names

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw a member, at the auxiliary site ``"component"``, and its sites; in plates, one member each."""
        # Masked: a loss of the mixture is then the members' mean, the bound on the left.
        with poutine.mask(mask=False):
            component = pyro.sample(
                "component", dist.Categorical(self.weights, validate_args=False), infer={"is_auxiliary": True}
            )
        if component.numel() == 1:
            return self._chosen(int(component))(*args, **kwargs)
        every = [member.site_distributions() for member in self._guides()]
        return {
            name: pyro.sample(name, _selected(component, [distributions[name] for distributions in every]))
            for name in every[0]
        }

    def _guides(self) -> list[SpikeGMMGuide]:
        return list(self.members)

    def _chosen(self, index: int) -> SpikeGMMGuide:
        """Return a member, to whose components a learned prior is bound."""
        member = self._guides()[index]
        if hasattr(self.model, "bind_codebooks"):
            self.model.bind_codebooks(member.codebook)
        return member

    def get_posterior(
        self,
        *args: Any,
        temperature: float | None = None,
        gate_temperature: float | None = None,
        **kwargs: Any,
    ) -> dict[str, dist.TorchDistribution]:
        """Return the distribution of every single weight by site name, mixed; random inclusions are left out.

        Args:
            temperature, gate_temperature: as members have it.
        """
        every = [
            member.get_posterior(temperature=temperature, gate_temperature=gate_temperature)
            for member in self._guides()
        ]
        return {name: _mixed(self.weights, [posterior[name] for posterior in every]) for name in self.site_names}

    def elbos(self, *args: Any, num_particles: int = 16, **kwargs: Any) -> Tensor:
        """Estimate the members' ELBOs, ``[M]``, in nats.

        Args:
            *args, **kwargs: of the model, with data.
            num_particles: draws each.
        """
        loss = SQSELBO(num_particles=num_particles)
        losses = [
            loss.loss(self.model, self._chosen(index), *args, **kwargs) for index in range(len(self.members))
        ]
        return -torch.tensor(losses, device=self.weights.device)

    def bracket(self, *args: Any, num_particles: int = 16, **kwargs: Any) -> tuple[float, float]:
        """Return ``(low, high)``, between which the mixture's ELBO is, of estimates as :meth:`elbos` makes them.

        The upper end needs exact KLs, as dense guides have them against slabs of a known KL.
        """
        low = (self.weights * self.elbos(*args, num_particles=num_particles, **kwargs)).sum()
        return float(low), float(low - plogp(self.weights).sum())

    def weigh(self, *args: Any, num_particles: int = 16, **kwargs: Any) -> None:
        """Set weights by the members' ELBOs, ``softmax(L)``: few nats are enough for one member to count alone.

        Args:
            *args, **kwargs: of the model, with all of the data.
            num_particles: draws each.
        """
        self.component.weights = self.elbos(*args, num_particles=num_particles, **kwargs).softmax(0)

    def start_coding(self, fit_codebooks: bool = True) -> None:
        """End the members' dense stage, with codebooks that all of them share, also in training.

        Args:
            fit_codebooks: fit them by K-means of all members' surviving weights, or keep those there are.
        """
        guides = self._guides()
        for name in self.site_names if fit_codebooks else ():
            fit_shared_codebook([member.site_guides()[name] for member in guides])
        for member in guides:
            member.start_coding(fit_codebooks=False)

    def draw_weights(
        self, num_samples: int, temperature: float | None = None, gate_temperature: float | None = None
    ) -> list[dict[str, Tensor]]:
        """Draw networks' weights, as many of each member as its weight says: see :class:`PosteriorGuide`."""
        return [
            draw
            for member, count in self._drawn_members(num_samples)
            for draw in member.draw_weights(count, temperature, gate_temperature)
        ]

    def draw_networks(
        self,
        num_samples: int,
        temperature: float | None = None,
        gate_temperature: float | None = None,
        codebook_dtype: torch.dtype = torch.float16,
    ) -> list[dict[str, CodedTensor]]:
        """Draw discrete networks, as many of each member as its weight says: see :class:`PosteriorGuide`."""
        if any(member.stage == "dense" for member in self._guides()):
            drawn = self.draw_weights(num_samples, temperature, gate_temperature)
            return self._guides()[0].code_together(drawn, codebook_dtype)
        return [
            draw
            for member, count in self._drawn_members(num_samples)
            for draw in member.draw_networks(count, temperature, gate_temperature, codebook_dtype)
        ]

    def _drawn_members(self, num_samples: int) -> list[tuple[SpikeGMMGuide, int]]:
        """Return members and how many of the draws are theirs."""
        # One uniform number and equal steps from it: S draws of M equal weights have each member S/M times.
        places = (torch.rand(()) + torch.arange(num_samples)) / num_samples
        chosen = torch.searchsorted(self.weights.cpu().cumsum(0), places).clamp_max(len(self.members) - 1)
        counts = torch.bincount(chosen, minlength=len(self.members)).tolist()
        return list(zip(self._guides(), counts, strict=True))


def _selected(component: Tensor, members: list[dist.TorchDistribution]) -> dist.TorchDistribution:
    """Return the distribution of the member that each plate's place has drawn."""

    def choose(before: dist.TorchDistribution, own: tuple[int, dist.TorchDistribution]) -> dist.TorchDistribution:
        return dist.MaskedMixture(component == own[0], before, own[1], validate_args=False)

    return reduce(choose, enumerate(members[1:], 1), members[0])


def _mixed(weights: Tensor, members: list[Any]) -> SpikeGMM:
    """Return the mixture of spike-and-mixtures of the same weights: one of all their components."""
    parts = [q if q.spike_scale is None else q.as_mixture() for q in members]
    shape = parts[0].batch_shape
    included = torch.stack([weight * q.gates for weight, q in zip(weights, parts, strict=True)], -1)  # [*shape, M]
    gates = included.sum(-1)
    # Of a weight that no member includes any share will do.
    share = torch.where(gates.unsqueeze(-1) > 0, included / gates.unsqueeze(-1), weights)

    def joined(values: Callable[[SpikeGMM], Tensor]) -> Tensor:
        return torch.cat([values(q).expand(*shape, q.num_components) for q in parts], -1)  # [*shape, M K]

    mixing = [part * q.responsibilities for part, q in zip(share.split(1, -1), parts, strict=True)]
    return SpikeGMM(
        gates.clamp_max(1),
        joined(lambda q: q.loc),
        joined(lambda q: q.scale),
        responsibilities=torch.cat(mixing, -1),
        estimator="pathwise",
        validate_args=False,
    )


def _check_members(members: list[SpikeGMMGuide], *, several: bool) -> None:
    if not several:
        raise ArgumentError(
            f"A GuideMixture was given one {type(members[0]).__name__}, but takes a list of SpikeGMMGuides."
        )
    if not members or not all(isinstance(member, SpikeGMMGuide) for member in members):
        kinds = ", ".join(sorted({type(member).__name__ for member in members})) or "nothing"
        raise ArgumentError(f"A GuideMixture was given {kinds}, but needs at least one SpikeGMMGuide.")
    if len({id(member) for member in members}) < len(members):
        raise ArgumentError("A guide stands twice in a GuideMixture: give it a larger weight instead.")
    first = members[0]
    shapes = [{name: site.shape for name, site in member.site_guides().items()} for member in members]
    if any(member.model is not first.model for member in members) or any(own != shapes[0] for own in shapes):
        raise NetworkError(
            "The guides of a GuideMixture are of different models or sites: make all of them with the same model "
            "object, such as GuideMixture.restarts(model, num_members)."
        )


def _normalised(weights: Sequence[float] | None, num_members: int) -> Tensor:
    given = torch.as_tensor([1.0] * num_members if weights is None else weights, dtype=torch.float32)
    if given.shape != (num_members,) or not bool(given.isfinite().all() and (given > 0).all()):
        raise ArgumentError(
            f"weights are {shown(weights)}, but must be a positive number for each of the {num_members} guides."
        )
    return given / given.sum()
