r"""A minibatch in shards, which ranks share: draws and batch statistics are a shard's own, sums have one order.

With ``B_s`` of the B examples in shard s, and a draw ``θ_s`` of the weights for each, a step is one on

    Σ_s (B_s / B) (N / B_s) Σ_{i in s} -log p(y_i | x_i, θ_s)  +  β KL,

the objective of the whole minibatch under one draw, with less variance. Running statistics become the mean of the
shards', each of which starts from the same ones. What a shard gives depends on its number and the step, and not on
who computes it: the same bits come out of any number of ranks.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from sqs_pyro.errors import RecipeError
from sqs_pyro.fingerprint import described
from sqs_pyro.inference.elbo import ElboTerms
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.isolation import random_states_kept
from sqs_pyro.networks.calling import some_examples, tensors_in
from sqs_pyro.networks.loaders import undisturbed
from sqs_pyro.networks.minibatches import minibatches
from sqs_pyro.ranks import OrderedSum, Ranks, RankWarning, check_alike, slow_rank

#: Puts gradients of (inputs, labels, share of the minibatch, whether with the KL) in place, and returns the terms.
Backward = Callable[[Any, Tensor, float, bool], ElboTerms]
_KEY = "compression.shards"


def check_divisible(loader: Any, net: nn.Module, shards: int) -> int:
    """Check that the minibatches of a loader can be divided into so many shards.

    Returns:
        How many examples a whole minibatch has: the first one.

    Raises:
        RecipeError: it cannot be divided.
    """
    with undisturbed(loader):
        x, y = next(minibatches(loader, net, "training"))
    examples = len(y)
    one = [] if isinstance(x, PackedSequence) else tensors_in(some_examples(x, slice(1), examples))
    if examples > 1 and not any(each.dim() and len(each) == 1 for each in one):
        raise RecipeError(
            f"Recipe key '{_KEY}' is {shards}, but the {type(x).__name__} of a minibatch's inputs cannot be "
            "divided by examples: give tensors with the examples in their first dimension, or 1 shard."
        )
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
    least = 2 if norms else 1
    if examples < least * shards:
        of_two = " of at least two, of which batch norm takes statistics" if norms else ""
        raise RecipeError(
            f"Recipe key '{_KEY}' is {shards}, but a minibatch of {examples} examples cannot be divided into so "
            f"many{of_two}: give at most {max(examples // least, 1)}, or larger minibatches."
        )
    return examples


class Shards:
    """Gradients of a minibatch, shard by shard.

    Args:
        guide: whose draws of a step count as one.
        count: shards of a whole minibatch. A smaller one has fewer, none smaller than a whole one's.
        examples: of a whole minibatch.
        seed: of draws.
        ranks: that share the shards.
    """

    def __init__(self, guide: SpikeGMMGuide, count: int, examples: int, seed: int, ranks: Ranks) -> None:
        self.guide, self.count, self.examples, self.seed, self.ranks = guide, count, examples, seed, ranks
        self._seconds, self._computed, self._warned = 0.0, 0, False  # of own shards, since paces were compared

    def parts(self, examples: int) -> list[slice]:
        """Return the examples of each shard of a minibatch."""
        count = min(max(examples * self.count // self.examples, 1), self.count)
        ends = [shard * examples // count for shard in range(count + 1)]
        return [slice(*of_shard) for of_shard in pairwise(ends)]

    def backward(
        self,
        x: Any,
        y: Tensor,
        step: int,
        with_kl: bool,
        parameters: Sequence[nn.Parameter],
        statistics: Callable[[], Sequence[Tensor]],
        of_shard: Backward,
    ) -> tuple[Tensor, Tensor]:
        """Leave the gradients of a whole minibatch in place, the same on each rank.

        Args:
            x, y: the minibatch, the same on each rank.
            step: its number.
            with_kl: whether the KL is part of the loss. It is of weights, not of examples: one shard has it.
            parameters: that learn, without gradients yet.
            statistics: returns tensors that a forward pass may change: the shards' mean is kept, but whole numbers
                change as by one pass.
            of_shard: computes a shard.

        Returns:
            Negative log-likelihood and KL, nats.

        Raises:
            RankError: another rank has ended, or has another minibatch.
        """
        parts = self.parts(len(y))
        own = self.ranks.share(len(parts))
        before = [tensor.clone() for tensor in statistics()]
        gradients, others = OrderedSum(len(parts)), OrderedSum(len(parts))
        learned = [False] * len(parameters)
        begun = time.perf_counter()
        with self.guide.counted_once():
            for shard in own:
                part, share = parts[shard], (parts[shard].stop - parts[shard].start) / len(y)
                _put(statistics(), before)
                with random_states_kept(self._seed(step, shard)):
                    terms = of_shard(some_examples(x, part, len(y)), y[part], share, with_kl and shard == 0)
                learned = [has or p.grad is not None for has, p in zip(learned, parameters, strict=True)]
                gradients.add(shard, _taken(parameters))
                others.add(shard, _observed(terms, before, statistics(), share, counts=shard == 0))
        self._seconds, self._computed = self._seconds + time.perf_counter() - begun, self._computed + len(own)
        # Who has a gradient is known without a look at the device; a sum of zeros is not the same for momentum.
        learned = self._agreed(x, y, learned)
        # A rank without a shard in a small minibatch knows by shapes alone what the others give.
        like, like_others = None, None
        if not own:
            zero = parameters[0].new_zeros(())
            like = _taken(parameters)
            like_others = _observed(ElboTerms(zero, zero, {}), before, before, 0.0, counts=False)
        _give(parameters, learned, self.ranks.summed(gradients, like))
        nll, kl, *means = self.ranks.summed(others, like_others).split([1, 1, *map(_numel, before)])
        _put(statistics(), [_mean(old, mean) for old, mean in zip(before, means, strict=True)])
        return nll.squeeze(), kl.squeeze()

    def compare_paces(self) -> None:
        """Warn once, on the leader, of a rank that takes longer for a shard than the others do."""
        if self.ranks.size == 1 or self._warned:
            return
        # A GPU computes behind the clock's back: there it is the processor that is compared.
        found = slow_rank(self.ranks.gathered(self._seconds / max(self._computed, 1)))
        self._seconds, self._computed = 0.0, 0
        self._warned = found is not None  # on each rank alike
        if found is not None and self.ranks.leads:
            warnings.warn(
                f"Rank {found[0]} takes {found[1]:.1f} times as long for a shard as the others, who wait for it: "
                "look at what else runs on its machine, or start fewer ranks there.",
                RankWarning,
                stacklevel=2,
            )

    def _seed(self, step: int, shard: int) -> int:
        return int(np.random.SeedSequence((self.seed % 2**64, step, shard)).generate_state(1, np.uint64)[0])

    def _agreed(self, x: Any, y: Tensor, learned: list[bool]) -> list[bool]:
        """Return which parameters have a gradient on any rank; check that all have the same minibatch."""
        if self.ranks.size == 1:
            return learned
        data = described([tensors_in(some_examples(x, slice(1), len(y))), y])  # not all: a digest takes its time
        told = self.ranks.gathered((data, learned))
        check_alike([data for data, _ in told], _OTHER_DATA)
        return [any(of_all) for of_all in zip(*(of_rank for _, of_rank in told), strict=True)]


_OTHER_DATA = (
    "Ranks have different minibatches, but must be given the same and take their shards of it: leave out "
    "DistributedSampler, and seed the order of the data alike"
)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _numel(tensor: Tensor) -> int:
    return tensor.numel() * (1 + tensor.is_complex())


def _taken(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Take gradients away, zero where there is none, as one vector of float32 or finer."""
    dtype = reduce(torch.promote_types, (_real(p.detach()).dtype for p in parameters), torch.float32)
    vector = torch.zeros(sum(map(_numel, parameters)), dtype=dtype, device=parameters[0].device)
    for parameter, place in zip(parameters, vector.split([*map(_numel, parameters)]), strict=True):
        if parameter.grad is not None:
            place.copy_(_real(parameter.grad.to_dense()).reshape(-1))
            parameter.grad = None
    return vector


@torch.no_grad()
def _give(parameters: Sequence[nn.Parameter], learned: Sequence[bool], vector: Tensor) -> None:
    """Put gradients back where there is one; the vector's memory becomes theirs."""
    places = vector.split([*map(_numel, parameters)])
    for parameter, has, place in zip(parameters, learned, places, strict=True):
        if has:
            shaped = place.view(_real(parameter).shape).to(_real(parameter).dtype)
            shaped = torch.view_as_complex(shaped) if parameter.is_complex() else shaped
            # Fused optimizers want the parameter's own order in memory, channels_last say.
            parameter.grad = shaped if parameter.is_contiguous() else torch.empty_like(parameter).copy_(shaped)


@torch.no_grad()
def _observed(
    terms: ElboTerms, before: Sequence[Tensor], after: Sequence[Tensor], share: float, counts: bool
) -> Tensor:
    """Return what a shard adds to the NLL, the KL, and the mean of each statistic, as one vector.

    In float64, in which the mean of what does not change is just that. Whole numbers are told by their change.
    """
    dtype = torch.float32 if terms.nll.device.type == "mps" else torch.float64
    parts = [terms.nll.detach(), terms.kl.detach()]
    for old, new in zip(before, after, strict=True):
        if old.is_floating_point() or old.is_complex():
            parts.append(_real(new).to(dtype) * share)
        else:
            parts.append((new.to(dtype) - old.to(dtype)) * counts)
    return torch.cat([part.to(parts[0].device, dtype).reshape(-1) for part in parts])


def _mean(before: Tensor, total: Tensor) -> Tensor:
    """Return a statistic from the sum over shards."""
    if before.is_complex():
        return torch.view_as_complex(total.view(*before.shape, 2)).to(before.dtype)
    total = total.view(before.shape)
    return (total if before.is_floating_point() else before.to(total) + total).to(before.dtype)


@torch.no_grad()
def _put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
