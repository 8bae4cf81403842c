r"""A law of zeros: the probability that a weight is not zero, given the weights before it.

Weights ``[O, I, ...]`` are taken as ``[O, I, P]``: out-channel, in-channel, position in the kernel. Every weight
belongs to five contexts: its out-channel, its in-channel, its kernel, and its position in the kernels of either
channel. A context is a Pólya urn: it starts with A_j balls in the tensor's own shares of zeros and non-zeros, and
gets one more for each weight that is seen, of its kind. An urn says how far its odds have come from those at the
start, and what all five say is mixed:

    log odds(z_i = 1) = log odds(tensor) + bias + Σ_j w_j (log odds(urn j) - log odds(urn j at the start)),

with bias and w fitted to the tensor. With one urn and w = 1 it would be the Beta-Bernoulli law, whose rate of
zeros is integrated out; so no rate of a channel has to be stored. Multiplied over all weights it is one prior of
all the zeros of a tensor, and ``-log2`` of it their code length.

The order is by diagonal, o + i, then by position, then by out-channel. Weights of one diagonal and position have
no context in common, so that a decoder takes them at once.

All is in whole numbers (:mod:`~sqs_pyro.packing.odds`): every machine finds the same probabilities.
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad, softplus

from sqs_pyro.packing.odds import MOST, UNIT, log2, probabilities

Numbers = TypeVar("Numbers", Tensor, NDArray[np.int64])

#: What a weight belongs to, and the balls that its urn starts with. Part of the format, like all numbers here.
CONTEXTS = {
    "out-channel": 6,
    "in-channel": 6,
    "kernel": 3,
    "position of the out-channel": 4,
    "position of the in-channel": 4,
}
_KERNEL = list(CONTEXTS).index("kernel")
MIXING_BYTES = 1 + len(CONTEXTS)  # bias and weights
_BALL = 16  # what a ball counts: the few at the start can be shared finely
_MIXING_BITS = 5  # bias and weights are multiples of 1/32
_NATS = math.log(2) / UNIT
_RIDGE = 1.0  # precision of a Gaussian prior on bias and weights
_NEWTON_STEPS = 8
_HALVINGS = 8


class Urns:
    """The law of one tensor: its own log odds, and what its urns start with.

    Args:
        shape: of the weights, ``[O, I, P]``.
        nonzeros: how many of them are not zero: some, not all.
        device: of masks.

    Attributes:
        base: log odds of the tensor.
        growth: what n weights of a kind add to the logarithm of its balls, ``[2, F, most + 1]``: zeros, non-zeros.
    """

    def __init__(self, shape: torch.Size, nonzeros: int, device: torch.device | None = None) -> None:
        numel, most = shape.numel(), max(shape[:2]) * shape[2]
        balls = _BALL * torch.tensor([*CONTEXTS.values()], device=device)
        # Rounded, and at least one of a ball's parts of either kind.
        ones = torch.minimum(((balls * nonzeros + numel // 2) // numel).clamp_(min=1), balls - 1)
        start = torch.stack([balls - ones, ones])[:, :, None]  # [2, F, 1]
        self.growth = log2(start + _BALL * torch.arange(most + 1, device=device)) - log2(start)
        zero, one = log2(torch.tensor([numel - nonzeros, nonzeros])).tolist()
        self.base = one - zero

    def evidence(self, ones: Tensor, seen: Tensor) -> Tensor:
        """Return how far each urn's log odds have come, ``[F, O, I, P]``.

        Args:
            ones: non-zeros that it has seen, int64 ``[F, O, I, P]``.
            seen: weights that it has seen, int64 ``[F, O, I, P]``.
        """
        gained = self.growth[1].gather(1, ones.flatten(1)) - self.growth[0].gather(1, (seen - ones).flatten(1))
        return gained.view(seen.shape)

    def log_odds(self, mixed: Numbers) -> Numbers:
        """Return the log odds of a non-zero, of bias and evidence, each times its weight, added up."""
        # A shift rounds down, negative numbers too, wherever it is done.
        return ((mixed >> _MIXING_BITS) + self.base).clip(-MOST, MOST)


def as_kernels(weights: Tensor) -> Tensor:
    """Return ``[O, I, ...]`` or ``[O]`` as ``[O, I, P]``."""
    return weights.reshape(len(weights), weights.shape[1] if weights.dim() > 1 else 1, -1)


def inclusion_before(mask: Tensor, mixing: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the probability of every weight not to be zero given those before it, and bias and weights.

    Args:
        mask: of the weights that are not zero, bool ``[O, I, ...]``: some, not all.
        mixing: bias and weights, int64 ``[1 + F]``; None fits them.

    Returns:
        float64 of the mask's shape, and int64 ``[1 + F]``.
    """
    kernels = as_kernels(mask).long()
    seen = _before(kernels), _before(torch.ones_like(kernels))
    log_odds, mixing = _mixed(kernels, *seen, mixing)
    return probabilities(log_odds).view(mask.shape), mixing


@dataclass(frozen=True)
class FullConditionals:
    """What all other weights of a tensor say of each, in nats.

    Attributes:
        elsewhere: log odds of a non-zero given all other weights, before and behind, ``[O, I, P]``.
        outside: the same given all other kernels, ``[O, I, P]``.
        within: what n zeros, and n non-zeros, of the same kernel add to the latter, ``[2, P + 1]``.
    """

    elsewhere: Tensor
    outside: Tensor
    within: Tensor

    def tempered(self, mask: Tensor, strength: float) -> "FullConditionals":
        """Return conditionals between those that know no structure, at 0, and these, at 1; of the same mask."""
        flat = constant_conditionals(mask, _share(mask)).elsewhere
        return FullConditionals(
            flat.lerp(self.elsewhere, strength), flat.lerp(self.outside, strength), strength * self.within
        )

    def of_kernels(self, mask: Tensor) -> Tensor:
        """Return the log probability of each kernel's zeros given all other kernels, ``[O, I]``.

        Args:
            mask: of the weights that are not zero, bool ``[O, I, P]``.
        """
        ones, seen = _up_to(mask.long(), 2), torch.arange(mask.shape[2], device=mask.device)
        odds = self.outside + self.within[1][ones] - self.within[0][seen - ones]
        return (mask * odds - softplus(odds)).sum(2)


def constant_conditionals(mask: Tensor, inclusion: float) -> FullConditionals:
    """Return conditionals that know no structure: every weight of a mask's shape has the same probability."""
    kernels = as_kernels(mask)
    odds = torch.full(kernels.shape, inclusion, dtype=torch.float64, device=mask.device).logit()
    return FullConditionals(odds, odds, odds.new_zeros(2, kernels.shape[2] + 1))


def full_conditionals(mask: Tensor) -> FullConditionals:
    """Return what a tensor's weights say of each other, at the bias and weights that fit what is before.

    Args:
        mask: of the weights that are not zero, bool ``[O, I, ...]``.
    """
    kernels = as_kernels(mask).long()
    nonzeros, numel = int(kernels.sum()), kernels.numel()
    if nonzeros in (0, numel):
        return constant_conditionals(mask, _share(mask))
    urns, (_, mixing) = Urns(kernels.shape, nonzeros, mask.device), inclusion_before(mask)
    weights = mixing[1:, None, None, None]

    def log_odds(ones: Tensor, seen: Tensor) -> Tensor:
        return _NATS * urns.log_odds((weights * urns.evidence(ones, seen)).sum(0) + UNIT * mixing[0]).double()

    within = urns.growth[:, _KERNEL, : kernels.shape[2] + 1] * mixing[1 + _KERNEL]
    return FullConditionals(
        log_odds(*(_elsewhere(counts) for counts in (kernels, torch.ones_like(kernels)))),
        log_odds(*(_outside(counts) for counts in (kernels, torch.ones_like(kernels)))),
        within.double() * _NATS / (1 << _MIXING_BITS),
    )


def _share(mask: Tensor) -> float:
    """Return the share of non-zeros, with half a weight of either kind more: never 0 or 1."""
    return (float(mask.sum()) + 0.5) / (mask.numel() + 1)


def code_length(mask: Tensor) -> float:
    """Return the bits that a tensor's zeros take, bias and weights included."""
    if mask.all() or not mask.any():
        return 0.0
    inclusion, _ = inclusion_before(mask)
    return 8 * MIXING_BYTES - float(torch.where(mask, inclusion, 1 - inclusion).log2().sum())


def _before(mask: Tensor) -> Tensor:
    """Return sums over what comes before, context by context, ``[F, O, I, P]``."""
    kernel, inside = mask.sum(2, keepdim=True), _up_to(mask, 2)
    return torch.stack(
        [_up_to(kernel, 1) + inside, _up_to(kernel, 0) + inside, inside, _up_to(mask, 1), _up_to(mask, 0)]
    )


def _up_to(counts: Tensor, dim: int) -> Tensor:
    return counts.cumsum(dim) - counts


def _elsewhere(mask: Tensor) -> Tensor:
    """Return sums over all others, context by context, ``[F, O, I, P]``."""
    return torch.stack([mask.sum(dims, keepdim=True) - mask for dims in ((1, 2), (0, 2), 2, 1, 0)])


def _outside(mask: Tensor) -> Tensor:
    """Return sums over all other kernels, context by context, ``[F, O, I, P]``."""
    kernel = mask.sum(2, keepdim=True)
    others = [kernel.sum(dim, keepdim=True).expand_as(kernel) - kernel for dim in (1, 0)]
    whole = [other.expand_as(mask) for other in (*others, torch.zeros_like(kernel))]
    return torch.stack([*whole, mask.sum(1, keepdim=True) - mask, mask.sum(0, keepdim=True) - mask])


def _mixed(mask: Tensor, ones: Tensor, seen: Tensor, mixing: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return log odds ``[O, I, P]``, given what urns have seen, and bias and weights."""
    urns = Urns(mask.shape, int(mask.sum()), mask.device)
    evidence = urns.evidence(ones, seen)
    mixing = _fit(urns.base, evidence, mask) if mixing is None else mixing
    return urns.log_odds((mixing[1:, None, None, None] * evidence).sum(0) + UNIT * mixing[0]), mixing


def _fit(base: int, evidence: Tensor, mask: Tensor) -> Tensor:
    """Return the most probable bias and weights, int64 ``[1 + F]``, by Newton's method."""
    inputs = pad(evidence.flatten(1).double() * _NATS, (0, 0, 1, 0))  # [1 + F, N]
    inputs[0] = UNIT * _NATS  # of the bias
    kept, base_odds = mask.flatten().double(), base * _NATS

    def loss(mixing: Tensor) -> float:
        odds = base_odds + mixing @ inputs
        return float((softplus(odds) - kept * odds).sum() + 0.5 * _RIDGE * mixing.square().sum())

    mixing = inputs.new_zeros(len(inputs))
    for _ in range(_NEWTON_STEPS):
        inclusion = torch.sigmoid(base_odds + mixing @ inputs)
        gradient = inputs @ (inclusion - kept) + _RIDGE * mixing
        curved = (inputs * (inclusion * (1 - inclusion))) @ inputs.T + _RIDGE * torch.eye(len(inputs)).to(inputs)
        step = torch.linalg.solve(curved, gradient)
        # Where few weights are not zero a whole step can go too far.
        lengths = (0.5**halvings for halvings in range(_HALVINGS))
        here = loss(mixing)
        best = next((mixing - length * step for length in lengths if loss(mixing - length * step) < here), None)
        if best is None:
            break
        mixing = best
    return mixing.mul_(1 << _MIXING_BITS).round_().clamp_(-127, 127).long()
