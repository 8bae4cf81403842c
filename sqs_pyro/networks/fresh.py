"""A network as it would be at the start of training: new random values in the place of the present ones."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sqs_pyro.errors import NetworkError


@torch.no_grad()
def fresh_values(net: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return new first values of some parameters by name, as their modules draw them (torch's random state).

    Args:
        net: the network; it stays as it is.
        names: of parameters.

    Raises:
        NetworkError: a parameter's module does not know how it begins.
    """
    fresh = copy.deepcopy(net)
    begun: set[str] = set()
    for path, module in fresh.named_modules():
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
            begun |= {f"{path}.{name}".removeprefix(".") for name, _ in module.named_parameters()}
    values = dict(fresh.named_parameters())
    for name in names:
        if name not in begun:
            raise NetworkError(
                f"Nothing says how '{name}' begins, because its module has no reset_parameters(): add one, or "
                "give a start of your own, SpikeGMMGuide(model, init={site name: tensor})."
            )
    return {name: values[name].detach() for name in names}
