"""SVI of the whole network at fixed codes: codebooks, scales, norms and biases learn what the original says.

Blocks are compressed one after the other, each for its own output. Behind the last one everything that has no code
makes up together for what the blocks lost. The likelihood observes the original network's opinion as a whole
(:class:`~sqs_pyro.models.distillation.TaughtBy`), so that any text will do, and a text's own kind earns nothing.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sqs_pyro.compression.blockwise.forecast import IMPORTANCE_BATCH
from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.compression.blockwise.store import BlockStore, FinishRecord
from sqs_pyro.compression.blockwise.training import (
    falling_rates,
    in_units_of_scales,
    settling_optimizer,
    with_scales,
)
from sqs_pyro.compression.precision import training_autocast
from sqs_pyro.inference.elbo import SQSELBO
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.models import BayesianNetwork
from sqs_pyro.models.distillation import TaughtBy
from sqs_pyro.models.observation import Likelihood
from sqs_pyro.networks.calling import call_arguments, device_of, split_examples
from sqs_pyro.packing import CodedTensor
from sqs_pyro.packing.leftovers import round_to

_KEPT_EVERY = 10  # steps
_JUDGED_BY = 20  # one in so many minibatches is not learned from


@dataclass(frozen=True, eq=False)
class Finished:
    """What the whole network has learned.

    Attributes:
        coded: compressed weights, with new codebooks and scales, by parameter name.
        leftovers: norms and biases, as they are shipped.
        record: what is told of it.
    """

    coded: dict[str, CodedTensor]
    leftovers: dict[str, Tensor]
    record: FinishRecord


def finish(
    teacher: nn.Module,
    student: nn.Module,
    coded: Mapping[str, CodedTensor],
    minibatches: Sequence[Any],
    recipe: BlockwiseRecipe,
    likelihood: Likelihood,
    store: BlockStore,
    told: Callable[[int, int, float], None] | None = None,
) -> Finished:
    """Let everything without a code learn together.

    Args:
        teacher: the original network.
        student: the compressed one, dense; its norms and biases are changed in place.
        coded: the weights of its linear layers, by parameter name, as ``student`` has them.
        minibatches: the calibration.
        recipe: steps and learning rates.
        likelihood: of a network's output.
        store: keeps the state every few steps.
        told: called with steps done, all of them, and the divergence of the last minibatch, nats an example.
    """
    start = time.perf_counter()
    small = [part for inputs in minibatches for part in split_examples(inputs, IMPORTANCE_BATCH)]
    apart = min(_JUDGED_BY, len(small))
    judged = small[apart - 1 :: apart]
    learned = [part for i, part in enumerate(small, 1) if i % apart] or small  # of a single one there is no other
    taught = TaughtBy(likelihood)
    with in_units_of_scales(student, coded) as (codewords, scaled):
        for parameter in student.parameters():
            parameter.requires_grad_(parameter.dim() < 2)
        names = [f"^{name.replace('.', '[.]')}$" for name in coded]
        model = BayesianNetwork(student, likelihood=taught, include=names)
        guide = SpikeGMMGuide(model, coded=codewords, stage="frozen", estimator="straight_through")
        before = _divergence(teacher, student, judged, taught)
        with pyro.get_param_store().scope():
            _learn(model, guide, teacher, learned, recipe, store, told)
        found = guide.harden()
    after_coded = {name: with_scales(found[name], scaled.get(name)) for name in coded}
    leftovers = {
        name: round_to(value.detach(), recipe.leftover_dtype)
        for name, value in student.named_parameters()
        if value.dim() < 2
    }
    with torch.no_grad():
        for name, weight in after_coded.items():  # one dense weight at a time
            student.get_parameter(name).copy_(weight.dense())
        for name, value in leftovers.items():
            student.get_parameter(name).copy_(value)
    after = _divergence(teacher, student, judged, taught)  # as it ships
    record = FinishRecord(recipe.finish_steps, before, after, time.perf_counter() - start)
    return Finished(after_coded, leftovers, record)


def _learn(
    model: BayesianNetwork,
    guide: SpikeGMMGuide,
    teacher: nn.Module,
    minibatches: Sequence[Any],
    recipe: BlockwiseRecipe,
    store: BlockStore,
    told: Callable[[int, int, float], None] | None,
) -> None:
    # At fixed codes and gates the KL is a constant.
    steps, elbo = recipe.finish_steps, SQSELBO(kl_weight=0.0)
    optimizer = settling_optimizer(model, guide, recipe, steps)
    moved = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # All draws beforehand: a run that goes on sees the minibatches that it would have seen.
    generator = torch.Generator().manual_seed(recipe.seed)
    passes = -(-steps // len(minibatches))
    order = torch.cat([torch.randperm(len(minibatches), generator=generator) for _ in range(passes)]).tolist()
    first = _taken_up(store, optimizer, moved)
    for step in range(first, steps):
        inputs = minibatches[order[step]]
        with torch.no_grad(), training_autocast(recipe.precision, device_of(teacher)):
            args, kwargs = call_arguments(inputs, teacher)
            opinion = teacher(*args, **kwargs)
        falling_rates(optimizer, 1 - step / steps)
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            with training_autocast(recipe.precision, device_of(teacher)):
                terms = elbo.terms(model, guide, inputs, opinion)
            terms.loss.backward()
        optimizer.step()
        if (step + 1) % _KEPT_EVERY == 0 or step + 1 == steps:
            values = [parameter.detach() for parameter in moved]
            store.write_finish({"step": step + 1, "values": values, "optimizer": optimizer.state_dict()})
        if told is not None:
            told(step + 1, steps, float(terms.nll.detach()) / _size(inputs))


def _taken_up(store: BlockStore, optimizer: torch.optim.Optimizer, moved: Iterable[Tensor]) -> int:
    """Put back what an interrupted run has kept; return how many steps it made."""
    state = store.read_finish()
    if state is None:
        return 0
    with torch.no_grad():
        for parameter, value in zip(moved, state["values"], strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _size(inputs: Any) -> int:
    """Return how many examples a minibatch has."""
    return next(len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))


@torch.no_grad()
def _divergence(teacher: nn.Module, student: nn.Module, minibatches: Sequence[Any], taught: TaughtBy) -> float:
    """Return the mean of ``KL(teacher ‖ student)`` over examples, nats."""
    total, count = 0.0, 0
    for inputs in minibatches:
        args, kwargs = call_arguments(inputs, teacher)
        each = taught.divergence(student(*args, **kwargs), teacher(*args, **kwargs))
        total, count = total + float(each.sum()), count + len(each)
    return total / count
