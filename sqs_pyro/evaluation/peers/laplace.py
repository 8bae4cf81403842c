"""Laplace's approximation by laplace-torch (Daxberger et al. 2021): a normal distribution from the curvature."""

import copy
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sqs_pyro.arguments import is_whole
from sqs_pyro.documents import shown
from sqs_pyro.errors import ArgumentError, NetworkError
from sqs_pyro.evaluation.averaging import AveragedNetwork
from sqs_pyro.extras import needed_for
from sqs_pyro.isolation import isolating
from sqs_pyro.models.likelihoods import Categorical, Gaussian, resolve
from sqs_pyro.models.observation import Likelihood
from sqs_pyro.networks.loaders import examples_an_epoch
from sqs_pyro.networks.minibatches import minibatches


@isolating("net")
def laplace(
    net: nn.Module,
    loader: Iterable[Any],
    num_samples: int = 20,
    *,
    likelihood: str | Likelihood = "categorical",
    weights: Literal["last_layer", "all"] = "last_layer",
    structure: Literal["diag", "kron", "full"] = "kron",
    prior_precision: float | None = None,
    seed: int | None = 0,
) -> AveragedNetwork:
    """Fit a normal distribution around a trained network's weights, and average networks drawn from it.

    Of the last layer, in whose weights the network is linear, draws give the predictive distribution of the
    linearised network itself; of all weights they are known to be too wide (Immer et al. 2021).

    Args:
        net: a trained network; it stays as it is.
        loader: minibatches of training data, pairs of tensors.
        num_samples: S, networks to draw.
        likelihood: ``"categorical"``, or ``"gaussian"`` and ``Gaussian(scale)``.
        weights: which are random.
        structure: of the Hessian: generalised Gauss-Newton's diagonal, its Kronecker factors, or all of it.
        prior_precision: ``1 / σ²`` of the weights' normal prior; None: that of the highest marginal likelihood.
        seed: of the draws.

    Raises:
        MissingPackageError: laplace-torch is not installed.
        NetworkError: the likelihood is another one.
        ArgumentError: there would be no draw.
    """
    if not is_whole(num_samples, 1):
        raise ArgumentError(f"num_samples is {shown(num_samples)}, but must be at least 1 network.")
    with needed_for("Laplace's approximations"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what its dependencies import
        from laplace import Laplace
    how = resolve(likelihood)
    if not isinstance(how, (Categorical, Gaussian)):
        raise NetworkError(
            f"The likelihood is a {type(how).__name__}, but laplace-torch knows classes and normal noise: give "
            "'categorical', 'gaussian' or Gaussian(scale)."
        )
    kind = {"likelihood": "classification"}
    options: dict[str, Any] = {"subset_of_weights": weights, "hessian_structure": structure}
    if isinstance(how, Gaussian):
        kind, options["sigma_noise"] = {"likelihood": "regression"}, how.scale
    if prior_precision is not None:
        options["prior_precision"] = prior_precision
    posterior = Laplace(copy.deepcopy(net).requires_grad_(True).eval(), **kind, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells of its defaults
        posterior.fit(_Examples(loader, net))
        if prior_precision is None:
            posterior.optimize_prior_precision(pred_type="nn", method="marglik", prior_structure="scalar")
        flat = posterior.sample(num_samples)  # [S, weights]
    names = _names(net, posterior if weights == "last_layer" else None)
    return AveragedNetwork(net, [_by_name(row, names) for row in flat.detach()])


class _Examples:
    """A loader as laplace-torch wants it: pairs of tensors, and a data set that has a length."""

    def __init__(self, loader: Iterable[Any], net: nn.Module) -> None:
        self.loader, self.net = loader, net
        self.dataset = range(examples_an_epoch(loader, net))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from minibatches(self.loader, self.net, "training")


def _names(net: nn.Module, of_last_layer: Any) -> dict[str, torch.Size]:
    """Return the random parameters in the order of laplace-torch's vectors."""
    if of_last_layer is None:
        return {name: parameter.shape for name, parameter in net.named_parameters()}
    inside = of_last_layer.model
    path = next(path for path, module in inside.model.named_modules() if module is inside.last_layer)
    layer = inside.last_layer.named_parameters()
    return {f"{path}.{name}".removeprefix("."): parameter.shape for name, parameter in layer}


def _by_name(row: Tensor, names: dict[str, torch.Size]) -> dict[str, Tensor]:
    parts = row.split([shape.numel() for shape in names.values()])
    return {name: part.reshape(shape) for (name, shape), part in zip(names.items(), parts, strict=True)}
