"""Sample statements of a likelihood that several networks call, one after the other."""

from collections.abc import Callable, Iterable
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor

Message = dict[str, Any]


class LikelihoodSites(Messenger):
    """Effect handler: each site is sampled once, for all networks together, and each network sees its own value.

    In Pyro's plates of particles or samples a site has a value for each of them; a likelihood, which is called
    with the output of one network, expects one. It would also sample its sites as often as it is called.

    Args:
        networks: how many there are, in row-major order of the plates around.
    """

    def __init__(self, networks: int) -> None:
        super().__init__()
        self.networks = networks
        self._at = 0
        self._joint: dict[str, tuple[Tensor, int]] = {}  # values of sites and their event dimensions, by name

    def for_each(self, outputs: Iterable[Any], function: Callable[[Any], Any]) -> list[Any]:
        """Call a function, which may sample, with the output of each network."""
        found = []
        for self._at, output in enumerate(outputs):
            with self:
                found.append(function(output))
        return found

    def _pyro_sample(self, msg: Message) -> None:
        if msg["name"] in self._joint:
            msg["done"] = msg["stop"] = True  # handlers outside have seen it
            msg["value"] = self._own(*self._joint[msg["name"]])

    def _pyro_post_sample(self, msg: Message) -> None:
        if msg["name"] not in self._joint:
            self._joint[msg["name"]] = msg["value"], getattr(msg["fn"], "event_dim", 0)
            msg["value"] = self._own(*self._joint[msg["name"]])  # last: those outside have kept the whole

    def _own(self, value: Tensor, event_dims: int) -> Tensor:
        """Return the value of the network at hand, or what all of them share."""
        batch = value.shape[: value.dim() - event_dims]
        if self.networks == 1 or batch.numel() != self.networks:
            return value
        return value.reshape(self.networks, *value.shape[len(batch) :])[self._at]
