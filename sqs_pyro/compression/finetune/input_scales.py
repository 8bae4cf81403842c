"""How large the inputs of each compressed weight are, followed while a network runs."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.errors import NetworkError

_MEMORY = 0.95  # of the running mean of squares, per minibatch
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class InputScales:
    """Root mean square of the inputs that every weight of linear and convolutional layers multiplies.

    A weight's part of a layer's output is ``w_ij x_j``, so ``|w_ij| √(E x_j²)`` is the root mean square of what is
    lost with it (Sun et al. 2024, "A simple and effective pruning approach for large language models"). It is
    also the root of the loss ``½ h w²`` under a likelihood with the diagonal curvature ``h_j = E x_j²``
    (:mod:`~sqs_pyro.compression.blockwise.laplace`).

    Args:
        net: whose forward passes in training mode are watched.
        weights: names of its parameters to follow, ``<layer>.weight``.

    Raises:
        NetworkError: a weight is not that of a linear or a convolutional layer.
    """

    def __init__(self, net: nn.Module, weights: Sequence[str]) -> None:
        self._layers = {name: _layer(net, name) for name in weights}
        # NaN where nothing was seen yet.
        self._squares = {name: _nothing_seen(layer) for name, layer in self._layers.items()}
        self._hooks = [
            layer.register_forward_pre_hook(partial(self._see, name)) for name, layer in self._layers.items()
        ]

    def scales(self) -> dict[str, Tensor]:
        """Return that of each weight, in a shape that broadcasts against it; 1 where no minibatch was seen."""
        return {
            name: _beside_weight(layer, self._squares[name].sqrt().nan_to_num(nan=1.0, posinf=torch.inf))
            for name, layer in self._layers.items()
        }

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state_dict(self) -> dict[str, Tensor]:
        """Return the mean squares of each layer's inputs, ``[inputs]``, NaN where none was seen."""
        return dict(self._squares)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from mean squares that were kept."""
        for name, value in state.items():
            self._squares[name] = value.to(self._squares[name].device)

    @torch.no_grad()
    def _see(self, name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not layer.training:
            return  # validation would tell of data that must not decide anything
        seen = _channels_last(layer, inputs[0].detach()).float().square().mean(0)  # [n, inputs] -> [inputs]
        before = self._squares[name].to(seen.device)
        before = torch.where(before.isnan(), seen, before)  # the first stands for all before it: no bias to 0
        self._squares[name] = before * _MEMORY + seen * (1 - _MEMORY)


def _nothing_seen(layer: nn.Module) -> Tensor:
    assert isinstance(layer, (nn.Linear, *_CONVOLUTIONS))
    inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    return torch.full((inputs,), torch.nan, device=layer.weight.device)


def _layer(net: nn.Module, name: str) -> nn.Module:
    path, _, parameter = name.rpartition(".")
    layer = net.get_submodule(path)
    if parameter != "weight" or not isinstance(layer, (nn.Linear, *_CONVOLUTIONS)):
        raise NetworkError(
            f"The inputs of '{name}' are unknown: it belongs to a {type(layer).__name__}, but saliency "
            "'activation' knows the weights of linear and convolutional layers; use 'magnitude' or exclude it."
        )
    return layer


def _channels_last(layer: nn.Module, x: Tensor) -> Tensor:
    """Bring ``[..., inputs]`` of a linear layer, ``[(B,) inputs, ...]`` of a convolution to ``[n, inputs]``."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2) if x.dim() > 1 else x[None]
    # The weight [out, in, ...] has as many places behind its channels as x has; x may be without a batch.
    channel = x.dim() - layer.weight.dim() + 1  # type: ignore[operator]
    return x.movedim(channel, -1).flatten(0, -2)


def _beside_weight(layer: nn.Module, scale: Tensor) -> Tensor:
    """Bring ``[inputs]`` to ``[1, inputs]``, or for a convolution to ``[outputs, inputs / groups, 1, ...]``."""
    if isinstance(layer, nn.Linear):
        return scale[None]
    assert isinstance(layer, _CONVOLUTIONS)
    # [inputs] -> [groups, inputs / groups] -> [outputs, inputs / groups]
    of_outputs = scale.view(layer.groups, -1).repeat_interleave(layer.out_channels // layer.groups, 0)
    return of_outputs.view(*of_outputs.shape, *[1] * (layer.weight.dim() - 2))
