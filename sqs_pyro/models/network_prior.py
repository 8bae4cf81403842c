"""What a prior over all the weights of a network is, and the plain one: a distribution for each site."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from sqs_pyro.distributions import Codebook
from sqs_pyro.errors import NetworkError
from sqs_pyro.models.ownership import OwningModule

SitePrior: TypeAlias = Callable[[str, Tensor], dist.TorchDistribution]
Scope = Literal["layer", "global"]
#: Where components of the weights' posterior are found, by the name of a site.
Codebooks: TypeAlias = Callable[[str], Codebook]


@dataclass(frozen=True)
class HyperPrior:
    """A random quantity of a prior.

    Attributes:
        distribution: its distribution.
        sites: names of the sites whose prior depends on it.
    """

    distribution: dist.TorchDistribution
    sites: tuple[str, ...]


class NetworkPrior(OwningModule):
    """A prior over all sites of a network, which may have parameters and random quantities of its own.

    Subclasses say in :meth:`start` what they need of the pretrained weights and in :meth:`site_priors` what the
    distributions are; ``hyper_priors`` names what is random in them, which the guide must sample, too.
    """

    belongs_to_a_network = False

    def start(self, sites: Mapping[str, Tensor]) -> None:
        """Get to know the sites: their pretrained weights by name. Called once, by the network's model."""
        raise NotImplementedError

    def hyper_priors(self) -> dict[str, HyperPrior]:
        """Return the prior's own sample sites by name, in the order in which they are sampled."""
        return {}

    def site_priors(self, hyper: Mapping[str, Tensor]) -> dict[str, dist.TorchDistribution]:
        """Return the distribution of each site's weights by name, given the values of the prior's own sites."""
        raise NotImplementedError

    def bind_codebooks(self, codebooks: Codebooks) -> None:
        """Get to know the guide's components, for priors that share them; others do nothing."""

    def forward(self) -> dict[str, dist.TorchDistribution]:
        """Sample the prior's own sites and return the distribution of every site by name."""
        return self.site_priors(
            {name: pyro.sample(name, own.distribution) for name, own in self.hyper_priors().items()}
        )


class FixedPrior(NetworkPrior):
    """A distribution for every weight, or a function of a site's name and pretrained value."""

    def __init__(self, prior: dist.TorchDistribution | SitePrior) -> None:
        super().__init__()
        self.prior = prior

    def start(self, sites: Mapping[str, Tensor]) -> None:
        """Make the distribution of each site.

        Raises:
            NetworkError: one that is not of single weights, or that cannot be expanded to a tensor of them; or the
                function cannot be called.
        """
        # Of one weight each: expanded at every call, which costs no memory, so that KL terms see what is shared.
        self._priors: dict[str, dist.TorchDistribution] = {}
        self._shapes: dict[str, torch.Size] = {}
        # At the start, so that a prior that cannot be used is told when the model is made.
        for name, weight in sites.items():
            prior = self._prior(name, weight.detach())
            _check_prior(name, prior, weight.shape)
            self._priors[name], self._shapes[name] = prior, weight.shape

    def take_shapes(self, shapes: Mapping[str, torch.Size]) -> None:
        """Be of other shapes from here on, by the name of a site: of the rows that a rank keeps.

        Raises:
            NetworkError: a site's weights have priors of their own, one by one.
        """
        for name, prior in self._priors.items():
            if prior.batch_shape.numel() > 1:
                raise NetworkError(
                    f"The prior of '{name}' has batch shape {tuple(prior.batch_shape)}, but sites that ranks "
                    "share need one distribution for all weights of a layer: give one of batch shape ()."
                )
        self._shapes = dict(shapes)

    def _prior(self, name: str, weight: Tensor) -> Any:
        given = self.prior
        # What is neither is told by `_check_prior`, with the site's name.
        if isinstance(given, Distribution) or not callable(given):
            return given
        # Also callable: it would be made of a name and a weight.
        if isinstance(given, type):
            raise NetworkError(
                f"The prior is the class {given.__name__}, but must be a distribution made with it, such as "
                "pyro.distributions.Normal(0.0, 1.0), or a function (name, weight) -> distribution."
            )
        try:
            return given(name, weight)
        except Exception as error:
            raise NetworkError(
                f"The prior's function failed for '{name}' with {type(error).__name__}: {error}; it is called "
                "with a site's name and its pretrained weight, and returns a Pyro distribution."
            ) from error

    def site_priors(self, hyper: Mapping[str, Tensor]) -> dict[str, dist.TorchDistribution]:
        """Return the distributions that were given, of as many weights as a site has."""
        return {name: of_shape(prior, self._shapes[name]) for name, prior in self._priors.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FixedPrior":
        """Move the distributions' tensors together with the network's (``.to``, ``.cuda``)."""
        # Distributions are no modules: `Module._apply` does not reach the tensors in them.
        self._priors = {name: _apply_to_distribution(prior, fn) for name, prior in self._priors.items()}
        return super()._apply(fn, recurse)


def of_shape(prior: dist.TorchDistribution, shape: torch.Size) -> dist.TorchDistribution:
    """Return the prior of independent weights of a shape, each with the one given."""
    return prior.expand(shape).to_event(len(shape))


def _check_prior(name: str, prior: Any, shape: torch.Size) -> None:
    """Raise a :class:`NetworkError` unless a distribution can be the prior of every weight of a site."""
    kind = type(prior).__name__
    # torch's own distributions have no to_event; Pyro's of the same names do.
    if not isinstance(prior, Distribution) or not hasattr(prior, "to_event"):
        raise NetworkError(
            f"The prior of '{name}' is a {kind}, but must be a Pyro distribution of single weights, such as "
            "pyro.distributions.Normal(0.0, 1.0), or a function (name, weight) -> distribution."
        )
    if prior.event_shape:
        raise NetworkError(
            f"The prior of '{name}' has event shape {tuple(prior.event_shape)}, but must be a "
            "distribution over single weights (event shape ()), batch shape () or the weight's."
        )
    if len(prior.batch_shape) > len(shape) or not all(
        own in (1, wanted) for own, wanted in zip(reversed(prior.batch_shape), reversed(shape), strict=False)
    ):
        raise NetworkError(
            f"The prior of '{name}' has batch shape {tuple(prior.batch_shape)}, which does not broadcast to the "
            f"weight's, {tuple(shape)}: give a distribution of one weight (batch shape ()), or one for each."
        )
    try:
        # Tried now, and not in the midst of training.
        expanded = of_shape(prior, shape)
    except NotImplementedError as error:
        raise NetworkError(
            f"The prior of '{name}', a {kind}, cannot be expanded to the weight's shape: a class with an __init__ "
            "of its own needs expand(self, batch_shape, _instance=None), which returns the same one with a larger "
            f"batch shape ({error})."
        ) from None
    # A foreign `expand` may forget what it was asked for; weights would then be drawn in another shape.
    returned = expanded.batch_shape + expanded.event_shape
    if returned != shape:
        raise NetworkError(
            f"The prior of '{name}', a {kind}, was expanded to {tuple(shape)}, but its expand() returned batch "
            f"shape {tuple(returned)}: it must return the batch shape it is given."
        )


def check_scope(scope: str) -> None:
    """Raise a :class:`NetworkError` unless ``scope`` is ``"layer"`` or ``"global"``."""
    if scope not in ("layer", "global"):
        raise NetworkError(f"scope is {scope!r}, but must be 'layer' or 'global'.")


def _apply_to_distribution(d: dist.TorchDistribution, fn: Callable[[Tensor], Tensor]) -> dist.TorchDistribution:
    """Return a shallow copy of ``d`` with ``fn`` applied to every tensor inside, nested distributions included."""
    # Past __init__, whose arguments a class may name as it likes; tensors are found among the attributes.
    moved = d.__class__.__new__(d.__class__)
    for key, value in d.__dict__.items():
        if isinstance(value, Tensor):
            value = fn(value)
        elif isinstance(value, Codebook):
            value = Codebook(*map(fn, value))
        elif isinstance(value, Distribution):
            value = _apply_to_distribution(value, fn)
        moved.__dict__[key] = value
    return moved
