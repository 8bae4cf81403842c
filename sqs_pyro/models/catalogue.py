"""Every registered network as a Pyro model in one call."""

from collections.abc import Callable, Sequence
from typing import Any

from sqs_pyro.models.bayesian import BayesianNetwork, Prior
from sqs_pyro.models.observation import Likelihood
from sqs_pyro.networks import digits, resnet_cifar, resnet_torchvision
from sqs_pyro.networks.registry import build_network


def _bayesian(name: str) -> Callable[..., BayesianNetwork]:
    def constructor(
        *,
        prior: Prior | None = None,
        num_data: int | None = None,
        likelihood: str | Likelihood = "categorical",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        **options: Any,
    ) -> BayesianNetwork:
        net = build_network(name, **options)
        return BayesianNetwork(net, prior, likelihood, num_data, include, exclude)

    # As if written out: documentation and errors show the name, and `_bayesian` nowhere.
    constructor.__name__ = constructor.__qualname__ = name
    constructor.__doc__ = (
        f"{name} as a Pyro model. ``options`` go to its constructor, the rest to :class:`BayesianNetwork`."
    )
    return constructor


digits_net = _bayesian(digits.digits_net.__name__)
resnet20 = _bayesian(resnet_cifar.resnet20.__name__)
resnet32 = _bayesian(resnet_cifar.resnet32.__name__)
resnet44 = _bayesian(resnet_cifar.resnet44.__name__)
resnet56 = _bayesian(resnet_cifar.resnet56.__name__)
resnet18 = _bayesian(resnet_torchvision.resnet18.__name__)
resnet50 = _bayesian(resnet_torchvision.resnet50.__name__)
