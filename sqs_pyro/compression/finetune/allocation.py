"""Which weights are zero during training: by a schedule of pruning, or by the learned prior."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sqs_pyro.compression.finetune.input_scales import InputScales
from sqs_pyro.compression.finetune.rate_distortion import RateDistortion, coded_bits
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.compression.finetune.structured_zeros import StructuredRateDistortion
from sqs_pyro.distributions.kmeans import kmeans_1d
from sqs_pyro.errors import RecipeError
from sqs_pyro.inference.guides.site import SiteGuide
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.inference.pruning import PruningSchedule
from sqs_pyro.packing import CodedTensor, pack_tensor
from sqs_pyro.packing.coded import count_codes

_RESIZE_EVERY = 5  # renewals of the masks between two corrections of the target rate: each is a K-means of all
_OBSERVE_EVERY = 4  # steps between two looks at the gradients
_MEMORY = 0.95  # of the running mean of squared gradients, per look
_FITS = 4  # at the end, each for the coder's share of the one before
_CLOSE = 2e-3  # to the size asked for
_OWN_LAWS = ("auto", "adaptive")  # layouts that may code symbols otherwise than by their frequencies


class Allocation(ABC):
    """Decides, step by step, which weights are zero."""

    #: Whether codebooks are made here, rather than by K-means when coding starts.
    makes_codebooks = False
    #: Whether the KL is optimised here, in closed form, rather than by gradients.
    optimises_kl = False

    @abstractmethod
    def before_step(self, step: int) -> None:
        """Do what is due before a step (not called once codes are frozen)."""

    @abstractmethod
    def finish(self) -> None:
        """Decide finally, before codes are frozen."""

    def statistics(self) -> list[Tensor]:
        """Return what a forward pass changes."""
        return []

    def after_backward(self, step: int, batch_size: int) -> None:  # noqa: B027
        """Look at the gradients of a step."""

    def after_step(self) -> None:  # noqa: B027
        """Correct what the optimiser has done."""

    @property
    def beta(self) -> float | None:
        """β on the KL, where it was found rather than given."""
        return None

    def kl(self) -> float | None:
        """Return the network's KL in nats, where it is known without asking the ELBO."""
        return None

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""


class ScheduledPruning(Allocation):
    """A cubic schedule of the non-zero rate; the least salient weights become zero.

    Args:
        guide: whose gates are closed.
        recipe: target rate, rates that layers have of their own, schedule and saliency.
        total_steps: of the training.
        bits: what symbols, tables and codebooks may take in the file; the target rate follows from it. None
            takes the recipe's target rate.
        input_scales: of the network, for saliency `activation`; no longer followed once the masks are final.
    """

    def __init__(
        self,
        guide: SpikeGMMGuide,
        recipe: CompressionRecipe,
        total_steps: int,
        bits: float | None = None,
        input_scales: InputScales | None = None,
    ) -> None:
        self.guide, self.recipe, self.bits = guide, recipe, bits
        pruning = recipe.pruning
        self.schedule = PruningSchedule(
            recipe.nonzero_rate, total_steps, pruning.start, pruning.end, pruning.every, pruning.scope
        )
        self.own_rates = own_rates(guide.site_guides(), recipe)
        self.input_scales = input_scales
        self._renewals = 0
        self._done = False

    def statistics(self) -> list[Tensor]:
        """Return the mean squares of inputs, while they are followed."""
        return [] if self.input_scales is None else list(self.input_scales.state_dict().values())

    def before_step(self, step: int) -> None:
        """Renew the masks where the schedule says so."""
        # With a target of 1 the network's own schedule has nothing to do, but layers with a rate may have.
        if any(replace(self.schedule, target=rate).due(step) for rate in self._rates()):
            if self.bits is not None and self._renewals % _RESIZE_EVERY == 0:
                self._resize()
            self._renewals += 1
            if step == self.schedule.end_step:
                self.finish()
            else:
                self._prune(step)

    def finish(self) -> None:
        """Prune to the target rate; with few steps that may fall after the last step."""
        if self._done:
            return
        # Each corrects the rate for the masks of the one before: a fixed point, close enough after four.
        for _ in range(4 if self.bits is not None else 0):
            self._resize()
        self._prune(self.schedule.end_step)
        self._done = True
        if self.input_scales is not None:
            self.input_scales.close()  # its hooks cost time at each forward pass, and nobody asks any more
        self.after_step()

    def after_step(self) -> None:
        """Hold gates that learn open once the masks are final: these alone say which weights are zero."""
        if self._done and self.recipe.gate_learning_rate > 0 and self.guide.stage != "frozen":
            self.guide.hold_gates_open()

    def _prune(self, step: int) -> None:
        self.guide.prune(self._masks(step))

    def _rates(self) -> set[float]:
        return {self.schedule.target, *self.own_rates.values()}

    def _masks(self, step: int) -> dict[str, Tensor]:
        """Return the weights to keep at a step: layers with a rate of their own each by itself."""
        shared = self._saliencies()
        masks: dict[str, Tensor] = {}
        for name, rate in self.own_rates.items():
            masks |= replace(self.schedule, target=rate).masks({name: shared.pop(name)}, step)
        return masks | (self.schedule.masks(shared, step) if shared else {})

    def _saliencies(self) -> dict[str, Tensor]:
        scales = None if self.input_scales is None else self.input_scales.scales()
        return self.guide.saliencies(self.recipe.pruning.saliency, scales)

    @torch.no_grad()
    def _resize(self) -> None:
        """Correct the target rate by what K-means of the weights that would be left now takes."""
        layout = self.recipe.storage.layout
        needed = _kmeans_bits(self.guide.site_guides(), self._masks(self.schedule.end_step), layout)
        own = sum(needed.pop(name) for name in self.own_rates)  # which this rate does not change
        assert self.bits is not None
        # Bits are nearly proportional to survivors. The bounds are those that a recipe's own rate has.
        rate = self.schedule.target * (self.bits - own) / sum(needed.values())
        self.schedule = replace(self.schedule, target=min(max(rate, 1e-4), 1.0))

    def state_dict(self) -> dict[str, Any]:
        """Return target rate and progress, and what the inputs have been."""
        scales = {} if self.input_scales is None else self.input_scales.state_dict()
        return {
            "target": self.schedule.target,
            "renewals": self._renewals,
            "done": self._done,
            "input_squares": scales,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.schedule = replace(self.schedule, target=state["target"])
        self._renewals, self._done = state["renewals"], state["done"]
        if self.input_scales is not None:
            self.input_scales.load_state_dict(state["input_squares"])
            if self._done:  # the masks were final: hooks that `__init__` has set are not needed
                self.input_scales.close()


def allocation(
    model: Any,
    guide: SpikeGMMGuide,
    recipe: CompressionRecipe,
    total_steps: int,
    num_data: int,
    labels: float,
    bits: float | None,
) -> Allocation:
    """Return the allocation that a recipe asks for."""
    if recipe.allocation == "rate_distortion":
        return LearnedAllocation(guide, model.prior, recipe, total_steps, num_data, labels, bits)
    watched = recipe.pruning.saliency == "activation"
    scales = InputScales(model.net, list(guide.site_guides())) if watched else None
    return ScheduledPruning(guide, recipe, total_steps, bits, scales)


class LearnedAllocation(Allocation):
    """The learned prior decides: E- and M-steps while the size falls cubically to the target, or at a given β.

    Args:
        guide: whose gates, codes and codebooks are written.
        prior: the model's learned prior, told ρ after every fit.
        recipe: schedule, scope and curvature.
        total_steps: of the training.
        num_data: N, to scale the gradients' curvature from a mean to the sum over the data.
        labels: that an example has; gradients are of nats a label.
        bits: what symbols, tables and codebooks may take in the file; None takes β = ``kl_weight``.
    """

    makes_codebooks = True
    optimises_kl = True

    def __init__(
        self,
        guide: SpikeGMMGuide,
        prior: Any,
        recipe: CompressionRecipe,
        total_steps: int,
        num_data: int,
        labels: float = 1.0,
        bits: float | None = None,
    ) -> None:
        self.guide, self.prior, self.recipe = guide, prior, recipe
        self.num_data, self.labels, self.bits = num_data, labels, bits
        inclusion = recipe.prior.inclusion
        self.fitting = (
            StructuredRateDistortion(guide, inclusion)
            if recipe.prior.scope == "structured"
            else RateDistortion(guide, recipe.prior.scope == "global", inclusion)
        )
        pruning = recipe.pruning
        # Its rate, from 1 to almost 0, is the share of the bits to be saved that are not saved yet.
        self.schedule = PruningSchedule(1e-9, total_steps, pruning.start, pruning.end, pruning.every)
        self._first_bits: float | None = None
        self._share = 1.0  # of what a fit counts, that the file's layout takes
        self._curvature: dict[str, Tensor] = {}
        self._kl = 0.0

    def before_step(self, step: int) -> None:
        """Fit every so many steps, at the size the schedule has come to."""
        if step % self.schedule.every == 0 and step >= self.schedule.start * self.schedule.total_steps:
            self._fit(step, rounds=1)

    def finish(self) -> None:
        """Fit the target once more, until the file's layout takes it."""
        for _ in range(_FITS):
            before = self._share
            self._fit(self.schedule.end_step, rounds=3)
            if abs(self._share - before) < _CLOSE * before:
                break

    @torch.no_grad()
    def after_backward(self, step: int, batch_size: int) -> None:
        """Follow the mean squared gradient of the weights that are not zero.

        A minibatch's mean gradient has 1/B of the variance of an example's; N examples have N times the curvature.
        """
        if step % _OBSERVE_EVERY:
            return
        for name, site in self.guide.site_guides().items():
            gradient, kept = site.latent_unconstrained.grad, site.gates() > 0.5
            if gradient is not None and kept.any():
                # The loss was divided by all labels; closed gates let no gradient through: the mean is over open
                # ones.
                seen = self.num_data * batch_size * self.labels**2 * gradient.square().sum() / kept.sum()
                before = self._curvature.get(name, seen)
                self._curvature[name] = before * _MEMORY + seen * (1 - _MEMORY)

    def _fit(self, step: int, rounds: int) -> None:
        if not self._curvature:
            return  # at the very first step there is no gradient yet to weigh a loss by
        # Once coding has started codewords are the optimiser's: two owners would undo each other's steps.
        options: dict[str, Any] = {"rounds": rounds, "move_codewords": self.guide.stage == "dense"}
        precision = self._precision()
        self.fitting.strength = 1 - self.schedule.rate(step)
        if self.bits is None:
            found = self.fitting.fit(precision, beta=self.recipe.kl_weight, **options)
        else:
            found = self.fitting.fit(precision, bits=self._bits_at(step, precision) / self._share, **options)
            if self.recipe.storage.layout in _OWN_LAWS:
                self._share = self._bits_in_the_file() / found.bits
        self._kl = found.kl
        # Findings and reports ask the model, not this fit, what ρ has come to.
        self.prior.set_inclusion(self.fitting.inclusions())

    def _bits_in_the_file(self) -> float:
        sites, storage = self.guide.site_guides().values(), self.recipe.storage
        return _stored_bits((site.harden(storage.codebook, keep_codes=True) for site in sites), storage.layout)

    def _bits_at(self, step: int, precision: Mapping[str, float]) -> float:
        """Return the target, to which the bits of the first fit fall with the cube of the time left."""
        assert self.bits is not None
        if self._first_bits is None:  # kept in checkpoints: the way down starts from the same height
            self._first_bits = max(self.bits, self.fitting.bits_at(0.0, precision))
        return self.bits + self.schedule.rate(step) * (self._first_bits - self.bits)

    def _precision(self) -> dict[str, float]:
        """Return h of each site; one for all where the recipe pools it."""
        sizes = {name: site.mask.numel() for name, site in self.guide.site_guides().items()}
        found = {name: float(value) for name, value in self._curvature.items()}
        mean = sum(found[name] * sizes[name] for name in found) / sum(sizes[name] for name in found)
        if self.recipe.curvature == "network":
            return dict.fromkeys(sizes, mean)
        # A layer without gradients would have a step β/h without end, and all its weights on one symbol.
        return {name: max(found.get(name, mean), 1e-6 * mean) for name in sizes}

    @property
    def beta(self) -> float | None:
        """β of the last fit."""
        return self.fitting.beta

    def kl(self) -> float | None:
        """Return the code length of all symbols, nats."""
        return self._kl

    def state_dict(self) -> dict[str, Any]:
        """Return the prior of symbols, β, curvature."""
        return {
            **self.fitting.state_dict(),
            "curvature": self._curvature,
            "first_bits": self._first_bits,
            "share": self._share,
            "kl": self._kl,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.fitting.load_state_dict(state)
        device = self.fitting.symbol_prior.inclusion.device
        self._curvature = {name: value.to(device) for name, value in state["curvature"].items()}
        self._first_bits, self._share, self._kl = state["first_bits"], state["share"], state["kl"]


def own_rates(names: Iterable[str], recipe: CompressionRecipe) -> dict[str, float]:
    """Return the non-zero rates of layers that have one of their own, by name."""
    return {name: rate for name in names if (rate := recipe.rate_of(name)) is not None}


def check_own_rates(names: Collection[str], recipe: CompressionRecipe) -> None:
    """Check that a target size has a layer whose zeros it can decide.

    Raises:
        RecipeError: every layer has a rate of its own.
    """
    if recipe.target_ratio is not None and len(own_rates(names, recipe)) == len(names):
        raise RecipeError(
            f"target_ratio={recipe.target_ratio:g} decides which weights are zero, but every layer has a "
            "nonzero_rate of its own in compression.layers: leave out the one or the other."
        )


@torch.no_grad()
def check_own_bits(guide: SpikeGMMGuide, recipe: CompressionRecipe, bits: float) -> None:
    """Check that layers with a non-zero rate of their own leave something of a target size to the others.

    Args:
        guide: before training: its largest weights are taken for those that will be left.
        recipe: target size and rates.
        bits: what symbols, tables and codebooks may take.

    Raises:
        RecipeError: they do not.
    """
    guides = guide.site_guides()
    sites = {name: guides[name] for name in own_rates(guides, recipe)}
    masks = {
        name: PruningSchedule(own, 1).masks({name: sites[name].latent.abs()}, 1)[name]
        for name, own in own_rates(sites, recipe).items()
    }
    needed = sum(_kmeans_bits(sites, masks, recipe.storage.layout).values())
    if needed >= bits:
        raise RecipeError(
            f"target_ratio={recipe.target_ratio:g} leaves {bits / 8:,.0f} bytes to weights, but the layers with a "
            f"nonzero_rate of their own take about {needed / 8:,.0f}: lower these rates, or ask for a lower ratio."
        )


def _stored_bits(coded: Iterable[CodedTensor], layout: str) -> float:
    """Return what weights take in the file."""
    return 8.0 * sum(pack_tensor(each, layout).num_bytes for each in coded)


def _kmeans_bits(sites: Mapping[str, SiteGuide], masks: Mapping[str, Tensor], layout: str) -> dict[str, float]:
    """Return what sites would take in the file if K-means coded the weights that masks leave."""
    found = {}
    for name, site in sites.items():
        coded = _kmeans_coded(site, masks[name])
        counts = count_codes(coded.codes.view(1, -1), coded.mask.view(1, -1), coded.num_components)
        zeros = coded.mask.numel() - coded.nonzeros
        found[name] = float(coded_bits(pad(counts, (1, 0), value=zeros), site.num_groups))
        if layout in _OWN_LAWS:
            found[name] += _stored_bits([coded], layout) - _stored_bits([coded], "entropy")
    return found


def _kmeans_coded(site: SiteGuide, mask: Tensor) -> CodedTensor:
    """Return a site's weights if K-means coded the survivors, with one codebook."""
    survivors = site.latent[mask]
    if len(survivors) > site.num_components:
        codewords = kmeans_1d(survivors.reshape(1, -1), site.num_components).loc[0]
    else:  # each has a codeword of its own
        codewords = pad(survivors, (0, site.num_components - len(survivors)))
    codewords = codewords.sort().values
    codes = torch.bucketize(site.latent.detach(), (codewords[1:] + codewords[:-1]) / 2).byte() * mask
    return CodedTensor(codes.cpu(), mask.cpu(), codewords.detach().float()[None].cpu())
