"""Linear layers in other words, as linear layers: transformers' ``Conv1D`` and the fused experts of its mixtures.

``Conv1D`` stores the weight of a linear layer transposed, ``[in, out]``; the experts of a mixture are one
parameter ``[experts, out, in]`` for each of their two layers. Both are put in a form of ``nn.Linear`` modules that
share the weights' memory, under names of their own, so that a file tells which form it is of:

=================================  ===========================================================
in the network                     in linear form
=================================  ===========================================================
``c_attn.weight``, ``[in, out]``   ``c_attn.linear.weight``, ``[out, in]``
``c_attn.bias``                    ``c_attn.linear.bias``
``experts.gate_up_proj``           ``experts.gate_up_proj.0.weight``, ``[out, in]``, and so on
``experts.down_proj``              ``experts.down_proj.0.weight`` and so on
=================================  ===========================================================
"""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

#: The linear layer in what stands for a ``Conv1D``.
LINEAR = "linear"
_UP, _DOWN = "gate_up_proj", "down_proj"

#: Tokens that the router has sent to each expert ``[experts]``, by the path of the mixture in its network.
Reached = dict[str, Tensor]
_every_token: ContextVar[Reached | None] = ContextVar("every_token", default=None)


class LinearForm(nn.Module):
    """Base: what stands for a module that is linear layers in other words."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        # All of it but its weights, which are never copied; in a tuple, so that it is no child.
        shell = copy.copy(replaced)
        shell._parameters = dict.fromkeys(replaced._parameters)
        self._shell = (shell,)
        self.train(replaced.training)

    def parameters_before(self) -> dict[str, nn.Parameter | None]:
        """Return the parameters of the replaced module, made of those that are here."""
        raise NotImplementedError

    def before(self) -> nn.Module:
        """Return the module that was replaced, with the weights that are here now."""
        module = copy.copy(self._shell[0])
        module._parameters = dict(self.parameters_before())
        return module.train(self.training)


class LinearConv1D(LinearForm):
    """What a ``Conv1D`` computes, by a linear layer."""

    def __init__(self, conv: Any) -> None:
        super().__init__(conv)
        self.linear = _linear(conv.weight.detach().T, conv.bias)

    @property
    def weight(self) -> Tensor:
        """The weight ``[in, out]``, to code that reads it."""
        return self.linear.weight.T

    def parameters_before(self) -> dict[str, nn.Parameter | None]:
        """Return ``weight``, ``[in, out]``, and ``bias``."""
        return {"weight": nn.Parameter(self.linear.weight.detach().T.contiguous()), "bias": self.linear.bias}

    def forward(self, x: Tensor) -> Tensor:
        """Args: x ``[..., in]``. Returns ``[..., out]``."""
        return self.linear(x)


class LinearExperts(LinearForm):
    """What the experts of a mixture compute, by linear layers for each of them.

    Attributes:
        gate_up_proj: of each expert gate and value, one above the other, ``[2 I, D]``.
        down_proj: of each expert the way back, ``[D, I]``.
    """

    def __init__(self, experts: Any, path: str) -> None:
        super().__init__(experts)
        self.path, self.act_fn = path, experts.act_fn
        self.gate_up_proj = nn.ModuleList(_linear(weight) for weight in experts.gate_up_proj.detach())
        self.down_proj = nn.ModuleList(_linear(weight) for weight in experts.down_proj.detach())

    def parameters_before(self) -> dict[str, nn.Parameter | None]:
        """Return ``gate_up_proj`` and ``down_proj``, ``[experts, out, in]``."""
        return {_UP: _stacked(self.gate_up_proj), _DOWN: _stacked(self.down_proj)}

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Mix the experts that the router has chosen for each token.

        Args:
            hidden: ``[T, D]``.
            chosen: numbers of experts, ``[T, k]``.
            weights: of the chosen, ``[T, k]``.

        Returns:
            ``[T, D]``.
        """
        reached = _every_token.get()
        if reached is not None:
            return self._of_every_token(hidden, chosen, weights, reached)
        mixed = torch.zeros_like(hidden)
        for i in chosen.unique().tolist():
            token, place = torch.where(chosen == i)
            said = self._expert(i, hidden[token]) * weights[token, place, None]
            mixed.index_add_(0, token, said.to(mixed.dtype))
        return mixed

    def _of_every_token(self, hidden: Tensor, chosen: Tensor, weights: Tensor, reached: Reached) -> Tensor:
        counts = torch.bincount(chosen.reshape(-1), minlength=len(self.down_proj)).cpu()
        reached[self.path] = reached.get(self.path, 0) + counts
        shares = hidden.new_zeros(len(hidden), len(self.down_proj)).scatter(1, chosen, weights.to(hidden.dtype))
        mixed = torch.zeros_like(hidden)
        for i, share in enumerate(shares.unbind(1)):
            mixed = mixed + share[:, None] * self._expert(i, hidden)
        return mixed

    def _expert(self, i: int, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj[i](x).chunk(2, dim=-1)
        return self.down_proj[i](self.act_fn(gate) * up)


@contextmanager
def every_token_to_every_expert() -> Iterator[Reached]:
    """Let all experts compute all tokens inside; what a token's router did not choose counts for nothing.

    So calibration sees every expert, with as many tokens as there are.

    Yields:
        how many tokens each expert was chosen for, so far.
    """
    reached: Reached = {}
    before = _every_token.set(reached)
    try:
        yield reached
    finally:
        _every_token.reset(before)


def to_linear_form(net: nn.Module, names: Collection[str] | None = None) -> dict[str, nn.Module]:
    """Put a network in linear form, in place.

    Args:
        net: the network; its weights may be anywhere, and stay there.
        names: tensors of the linear form: only modules of which there are some are replaced; None: all modules.

    Returns:
        the modules that were replaced, by path.
    """
    replaced: dict[str, nn.Module] = {}
    for path, module in list(net.named_modules()):
        form = _form(module, path)
        if (
            form is None
            or not path
            or (names is not None and not any(f"{path}.{name}" in names for name in form.state_dict()))
        ):
            continue
        replaced[path] = module
        net.set_submodule(path, form)
    return replaced


@contextmanager
def in_linear_form(net: nn.Module, names: Collection[str] | None = None) -> Iterator[None]:
    """Put a network in linear form inside; arguments as of :func:`to_linear_form`."""
    replaced = to_linear_form(net, names)
    try:
        yield
    finally:
        for path, module in replaced.items():
            net.set_submodule(path, module)


def from_linear_form(net: nn.Module) -> nn.Module:
    """Give a network back the modules that it had before, in place, with the weights that it has now."""
    for path, module in list(net.named_modules()):
        if isinstance(module, LinearForm):
            net.set_submodule(path, module.before())
    return net


def has_linear_form(net: nn.Module) -> bool:
    """Return whether a network has modules that are linear layers in other words."""
    return any(_is_conv1d(module) or _is_experts(module) for module in net.modules())


def _form(module: nn.Module, path: str) -> nn.Module | None:
    if _is_conv1d(module):
        return LinearConv1D(module)
    return LinearExperts(module, path) if _is_experts(module) else None


def _is_conv1d(module: nn.Module) -> bool:
    # By name: transformers is not imported to find out that a module is not of it.
    return _named(type(module), "transformers.pytorch_utils", "Conv1D")


def _is_experts(module: Any) -> bool:
    """Return whether a module is fused experts of the common kind: gated, no biases, ``[experts, out, in]``."""
    if module._parameters.keys() != {_UP, _DOWN} or module._buffers or not hasattr(module, "act_fn"):
        return False
    others = ("has_bias", "is_transposed", "has_post_expert_norm")
    gate = getattr(type(module), "_apply_gate", None)
    return (
        getattr(module, "has_gate", False)
        and not any(getattr(module, name, False) for name in others)
        and _named(gate, "transformers.integrations.moe", "_default_apply_gate")
    )


def _named(value: Any, module: str, name: str) -> bool:
    return getattr(value, "__module__", None) == module and getattr(value, "__name__", None) == name


def _stacked(layers: nn.ModuleList) -> nn.Parameter:
    return nn.Parameter(torch.stack([layer.get_parameter("weight").detach() for layer in layers]))


def _linear(weight: Tensor, bias: nn.Parameter | None = None) -> nn.Linear:
    """Return a linear layer of a weight ``[out, in]``, whose memory it shares."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    layer.register_parameter("bias", bias)
    return layer
