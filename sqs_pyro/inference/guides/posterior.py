"""What Pyro's automatic guides answer of a posterior, by guides that know the distribution of each weight."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pyro.distributions import Beta, TorchDistribution
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from sqs_pyro.arguments import is_finite
from sqs_pyro.documents import shown
from sqs_pyro.errors import ArgumentError
from sqs_pyro.inference.called import PyroCallable
from sqs_pyro.models.ownership import OwningModule
from sqs_pyro.packing import CodedTensor


class PosteriorGuide(AutoGuide, OwningModule):
    """A guide that knows the distribution of every weight, with the methods of Pyro's ``AutoNormal``.

    It is an :class:`~pyro.infer.autoguide.AutoGuide`, so that it can be a part of an ``AutoGuideList``; arguments
    ``*args, **kwargs`` of its methods are the model's, as Pyro has it, and not used.

    Args:
        model: what it is a guide of.
    """

    def __init__(self, model: PyroCallable) -> None:
        # Past AutoGuide's, which would give the module a name, and with it its parameters others in the store.
        OwningModule.__init__(self)
        self.master: Any = None  # the AutoGuideList that it is a part of
        self._model = (model,)  # in a tuple: a reference, not a submodule whose parameters would be the guide's

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles: with the model, which Pyro's own guides leave out."""
        state = super(AutoGuide, self).__getstate__()
        return {**state, "master": None}  # a weak reference, which the list renews

    @property
    def site_names(self) -> tuple[str, ...]:
        """Names of the sites whose weights it draws, in the model's order."""
        raise NotImplementedError

    def get_posterior(
        self,
        *args: Any,
        temperature: float | None = None,
        gate_temperature: float | None = None,
        **kwargs: Any,
    ) -> dict[str, TorchDistribution]:
        """Return the distribution of every site by name: of single weights, in the site's shape."""
        raise NotImplementedError

    @torch.no_grad()
    def mean(self, temperature: float | None = None, gate_temperature: float | None = None) -> dict[str, Tensor]:
        """Return each site's posterior mean ``E θ = λ w``, or ``λ Σ_k φ_k μ_k``: a network that is not discrete.

        Args:
            temperature, gate_temperature: see :meth:`get_posterior`.
        """
        posterior = self.get_posterior(temperature=temperature, gate_temperature=gate_temperature)
        return {name: posterior[name].mean for name in self.site_names}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return quantiles of every weight, exactly 0 where the spike holds them, ``[Q, *shape]`` by site name.

        Args:
            quantiles: Q probabilities.

        Raises:
            ArgumentError: there is none, or one that is not between 0 and 1.
        """
        given = list(quantiles) if isinstance(quantiles, Iterable) else [None]
        if not given or not all(is_finite(q) and 0 <= float(q) <= 1 for q in given):
            raise ArgumentError(f"quantiles are {shown(quantiles)}, but must be numbers between 0 and 1.")
        probabilities = [float(q) for q in given]
        return {
            # One after the other: of a mixture each holds K numbers a weight.
            name: torch.stack([_quantile(distribution, q) for q in probabilities])
            for name, distribution in self.get_posterior().items()
        }

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of every weight by site name: exactly 0 where the spike holds it."""
        return {name: values[0] for name, values in self.quantiles([0.5]).items()}

    @torch.no_grad()
    def inclusion_probabilities(self) -> dict[str, Tensor]:
        """Return λ, the probability that a weight is not zero, of every weight by site name."""
        posterior: dict[str, Any] = self.get_posterior()
        return {name: posterior[name].gates for name in self.site_names}

    def draw_weights(
        self, num_samples: int, temperature: float | None = None, gate_temperature: float | None = None
    ) -> list[dict[str, Tensor]]:
        """Draw networks' weights from the posterior, by site name: of q itself while it is dense, then discrete.

        Args:
            num_samples: S.
            temperature, gate_temperature: see :meth:`get_posterior`.
        """
        raise NotImplementedError

    def draw_networks(
        self,
        num_samples: int,
        temperature: float | None = None,
        gate_temperature: float | None = None,
        codebook_dtype: torch.dtype = torch.float16,
    ) -> list[dict[str, CodedTensor]]:
        """Draw discrete networks that share codebooks: while the posterior is dense, its draws coded together.

        Args:
            num_samples: S.
            temperature, gate_temperature: see :meth:`get_posterior`.
            codebook_dtype: codewords are rounded to this type.
        """
        raise NotImplementedError


def _quantile(distribution: TorchDistribution, probability: float) -> Tensor:
    if isinstance(distribution, Beta):  # torch has no distribution function of it
        from scipy.special import betaincinv  # heavy, and only needed here

        counts = distribution.concentration1, distribution.concentration0
        found = betaincinv(*(count.double().cpu().numpy() for count in counts), probability)
        return torch.as_tensor(found).to(distribution.mean)
    mean = distribution.mean
    found = distribution.icdf(mean.new_full((), probability))
    return found.expand(mean.shape)
