"""What a prior over all the weights of a network is, and the plain one: a law for each site."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from sqs_pyro.errors import NetworkError
from sqs_pyro.models.ownership import OwningModule

SitePrior: TypeAlias = Callable[[str, Tensor], dist.TorchDistribution]
Scope = Literal["layer", "global"]
#: Where components of the weights' posterior are found: ``name -> (loc, scale, log_mixing)``, each ``[G, K]``.
Codebooks: TypeAlias = Callable[[str], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class HyperPrior:
    """A random quantity of a prior.

    Attributes:
        law: its distribution.
        sites: names of the sites whose prior depends on it.
    """

    law: dist.TorchDistribution
    sites: tuple[str, ...]


class NetworkPrior(OwningModule):
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
            NetworkError: a law that is not one of single weights, or that cannot be expanded to a tensor of them;
                or the function cannot be called.
        """
        self._laws: dict[str, dist.TorchDistribution] = {}
        self._shapes: dict[str, torch.Size] = {}
        for name, weight in sites.items():
            law = self._law(name, weight.detach())
            _check_law(name, law, weight.shape)
            self._laws[name], self._shapes[name] = law, weight.shape

    def _law(self, name: str, weight: Tensor) -> Any:
        given = self.prior
        if isinstance(given, Distribution) or not callable(given):
            return given
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
        """The laws that were given, of as many weights as a site has."""
        return {name: of_shape(law, self._shapes[name]) for name, law in self._laws.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FixedPrior":
        """Move the laws' tensors together with the network's (``.to``, ``.cuda``)."""
        self._laws = {name: _apply_to_distribution(law, fn) for name, law in self._laws.items()}
        return super()._apply(fn, recurse)


def of_shape(law: dist.TorchDistribution, shape: torch.Size) -> dist.TorchDistribution:
    """The law of independent weights of a shape, each with the ``law``."""
    return law.expand(shape).to_event(len(shape))


def _check_law(name: str, law: Any, shape: torch.Size) -> None:
    """Raise a :class:`NetworkError` unless a law can be that of every weight of a site."""
    kind = type(law).__name__
    if not isinstance(law, Distribution) or not hasattr(law, "to_event"):
        raise NetworkError(
            f"The prior of '{name}' is a {kind}, but must be a Pyro distribution of single weights, such as "
            "pyro.distributions.Normal(0.0, 1.0), or a function (name, weight) -> distribution."
        )
    if law.event_shape:
        raise NetworkError(
            f"The prior of '{name}' has event shape {tuple(law.event_shape)}, but must be a "
            "distribution over single weights (event shape ()), batch shape () or the weight's."
        )
    if len(law.batch_shape) > len(shape) or not all(
        own in (1, wanted) for own, wanted in zip(reversed(law.batch_shape), reversed(shape), strict=False)
    ):
        raise NetworkError(
            f"The prior of '{name}' has batch shape {tuple(law.batch_shape)}, which does not broadcast to the "
            f"weight's, {tuple(shape)}: give a law of one weight (batch shape ()), or one for each."
        )
    try:
        expanded = of_shape(law, shape)
    except NotImplementedError as error:
        raise NetworkError(
            f"The prior of '{name}', a {kind}, cannot be expanded to the weight's shape: a class with an __init__ "
            "of its own needs expand(self, batch_shape, _instance=None), which returns the same law with a larger "
            f"batch shape ({error})."
        ) from None
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
    """A shallow copy of ``d`` with ``fn`` applied to every tensor inside, nested distributions included."""
    moved = d.__class__.__new__(d.__class__)
    for key, value in d.__dict__.items():
        if isinstance(value, Tensor):
            value = fn(value)
        elif isinstance(value, Distribution):
            value = _apply_to_distribution(value, fn)
        moved.__dict__[key] = value
    return moved
