"""How much each output of a layer matters to what the network says: the Fisher information of its outputs."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.compression.blockwise.shares import Shares
from sqs_pyro.errors import DataError
from sqs_pyro.models.likelihoods import categorical_last
from sqs_pyro.models.observation import Likelihood
from sqs_pyro.networks.calling import call_arguments


def output_importance(
    net: nn.Module,
    layers: Mapping[str, nn.Module],
    minibatches: Sequence[Any],
    likelihood: Likelihood = categorical_last,
    seed: int = 0,
    *,
    whole: Collection[str] = (),
    shares: Shares | None = None,
) -> dict[str, Tensor]:
    """Return the mean squared gradient of ``log p(y | x)`` in every layer's outputs, y drawn from the network.

    Drawn labels make it the Fisher information (labels of data would make it the empirical one, which vanishes
    where the network is sure of them): g of :class:`~sqs_pyro.compression.blockwise.laplace.LayerLikelihood`.

    Args:
        net: the network, in evaluation mode; gradients of its parameters are left as they were.
        layers: by name; embeddings, and modules with a weight ``[N, M]`` whose outputs are ``[..., N]``.
        minibatches: inputs of the network, all of them on every rank.
        likelihood: from the network's output to the distribution of y.
        seed: of the draws; each minibatch has its own.
        whole: names of layers whose outputs' information is wanted with what is beside its diagonal.
        shares: the minibatches, each rank takes gradients of its own; if left out, there is no other rank.

    Returns:
        ``[N]`` float32 for each layer, nats over squared units of the output, a mean over all its calls' inputs;
        ``[N, N]`` for those in ``whole``.

    Raises:
        DataError: there is no minibatch.
    """
    shares = shares or Shares(len(minibatches))
    own = range(len(minibatches))[shares.own]
    watch = _OutputGradients(layers, whole)
    devices = [p.device for p in net.parameters() if p.device.type == "cuda"][:1]

    def gradients(part: slice) -> list[Tensor]:
        watch.start()
        for number in own[part]:
            torch.manual_seed(seed + number)  # draws do not depend on which rank makes them
            args, kwargs = call_arguments(minibatches[number], net)
            observation = likelihood(net(*args, **kwargs))
            drawn = observation.sample().detach()
            # Summed: examples do not meet in the network, so each keeps the gradient of its own log-density.
            torch.autograd.grad(observation.log_prob(drawn).sum(), watch.leaves)
            watch.leaves.clear()  # lets go of the graph, too
        return [torch.tensor(list(watch.counts.values())), *watch.totals.values()]

    with watch, _frozen(net), torch.random.fork_rng(devices), torch.enable_grad():
        counts, *totals = shares.sums(gradients)
    if not bool(counts.all()):
        raise DataError("The importance of outputs needs at least one minibatch that reaches every layer.")
    found = {name: total / int(count) for name, total, count in zip(layers, totals, counts, strict=True)}
    return {name: value if value.any() else _of_the_least(name, found) for name, value in found.items()}


def _of_the_least(name: str, found: Mapping[str, Tensor]) -> Tensor:
    """Return what stands for a layer whose outputs never mattered, such as of an expert that no token was sent to.

    It may be needed elsewhere: it is as the least of its neighbours, the other experts, that did matter.
    """
    place = name.rpartition(".")[0]
    near = (value.mean() for other, value in found.items() if other.rpartition(".")[0] == place and value.any())
    return torch.full_like(found[name], float(min(near, default=torch.tensor(0.0))))


class _OutputGradients:
    """Sums squared gradients of layers' outputs; a context manager.

    Attributes:
        leaves: outputs of layers whose inputs need no gradient: what to differentiate by.
    """

    def __init__(self, layers: Mapping[str, nn.Module], whole: Collection[str]) -> None:
        self.layers, self.whole = layers, whole
        self.leaves: list[Tensor] = []
        self.start()

    def start(self) -> None:
        """Begin sums anew."""
        self.counts = dict.fromkeys(self.layers, 0)
        self.totals = {name: self._nothing(name, layer) for name, layer in self.layers.items()}

    def _nothing(self, name: str, layer: nn.Module) -> Tensor:
        weight: Any = layer.weight
        size = weight.shape[1] if isinstance(layer, nn.Embedding) else weight.shape[0]
        return torch.zeros(size, size) if name in self.whole else torch.zeros(size)

    def __enter__(self) -> "_OutputGradients":
        self._hooks = [
            layer.register_forward_hook(partial(self._watch, name)) for name, layer in self.layers.items()
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _watch(self, name: str, layer: nn.Module, arguments: Any, output: Tensor) -> None:
        # With parameters frozen the first layers' outputs depend on nothing that learns: the graph begins there.
        if not output.requires_grad:
            self.leaves.append(output.requires_grad_())
        output.register_hook(partial(self._add, name))

    def _add(self, name: str, gradient: Tensor) -> None:
        each = gradient.detach().float().reshape(-1, gradient.shape[-1])  # [B, T, N] -> [B T, N]
        added = (each.T @ each if name in self.whole else each.square().sum(0)).cpu()
        self.totals[name] += added
        self.counts[name] += len(each)


@contextmanager
def _frozen(net: nn.Module) -> Iterator[None]:
    """Let no parameter of the network ask for a gradient inside: only outputs are differentiated by."""
    learning = [parameter for parameter in net.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
