"""Compression in one call."""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from torch import nn

from sqs_pyro.atomic import check_place, resolved
from sqs_pyro.compression.finetune.allocation import check_own_bits, check_own_rates
from sqs_pyro.compression.finetune.loop import Driver, StepRecord
from sqs_pyro.compression.finetune.recipe import CompressionRecipe, PriorRecipe
from sqs_pyro.compression.finetune.telling import TellStep, told
from sqs_pyro.compression.layers import check_layers, of_layer
from sqs_pyro.compression.patience import Kept
from sqs_pyro.compression.precision import training_dtype, warn_of_slow_precision
from sqs_pyro.errors import RecipeError
from sqs_pyro.evaluation.first_minibatch import first_inputs, try_first_minibatch
from sqs_pyro.evaluation.judging import Judge, judge_by, judged
from sqs_pyro.fingerprint import described
from sqs_pyro.inference.findings import Finding, size_findings, unrepeatable
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.isolation import isolated, isolating
from sqs_pyro.kernels.network import running_network
from sqs_pyro.models import (
    HierarchicalInclusion,
    LearnedPrior,
    gaussian_spike_prior,
    normal_prior,
    scale_matched_prior,
)
from sqs_pyro.models.bayesian import BayesianNetwork, Prior
from sqs_pyro.models.distillation import DistillationLikelihood, DistilledLoader
from sqs_pyro.models.likelihoods import Categorical, LearnedLikelihood
from sqs_pyro.networks.calling import device_of
from sqs_pyro.networks.checks import check_network
from sqs_pyro.networks.loaders import check_training_loader
from sqs_pyro.networks.sites import select_sites
from sqs_pyro.packing import CodedTensor, PackedContents, PackedTensor, pack, pack_tensor, size_report
from sqs_pyro.packing.contents import with_metadata
from sqs_pyro.packing.finite import check_finite
from sqs_pyro.packing.layouts import get_layout
from sqs_pyro.ranks import ranks
from sqs_pyro.recipes import parse
from sqs_pyro.reporting.printed import Printed, Report
from sqs_pyro.resources import enough_resources
from sqs_pyro.shipping.agreement import check_agreement
from sqs_pyro.shipping.batch_norm import batch_norm_statistics, reestimate_batch_norm
from sqs_pyro.shipping.pack import hard_network
from sqs_pyro.shipping.rehearsal import rehearse
from sqs_pyro.shipping.shipped import check_stands_alone, copied, shipped_network
from sqs_pyro.shipping.widths import WIDTHS, with_widths

__all__ = ["CompressionResult", "Finding", "StepRecord", "compress"]


@dataclass(frozen=True, repr=False)
class CompressionResult(Printed):
    """What compression leaves; it prints itself in short.

    Attributes:
        network: the packed network: what is saved, shipped and measured.
        hard: the same network with dense float weights; both are compared on a minibatch of the training data.
        unrounded: the hard network before batch norms were folded and other parameters rounded.
        model: the Bayesian network.
        guide: its trained variational posterior.
        recipe: what was done.
        history: what training was like; the score of the last record is that of ``hard``, if it has one.
        findings: what is wrong with the posterior at the end, if anything.
        seconds: wall-clock time of the whole call; after a resumption, of all parts up to their checkpoints.
        kept: with ``patience``, which step's weights these are; None: those of the last.
    """

    network: nn.Module
    hard: nn.Module
    unrounded: nn.Module
    model: BayesianNetwork
    guide: SpikeGMMGuide
    recipe: CompressionRecipe
    history: list[StepRecord]
    findings: list[Finding]
    seconds: float
    kept: Kept | None = None

    def table(self) -> Report:
        """Return what the file weighs, how good the last hard network was, and the findings."""
        from sqs_pyro.reporting.tables import result_tables

        judged = [record.score for record in self.history if record.score is not None]
        return result_tables(
            {
                "size": size_report(self.network).to_dict(),
                "seconds": self.seconds,
                "validation": judged[-1] if judged else None,
                "findings": [asdict(finding) for finding in self.findings],
            }
        )


_LOWER = "lower the batch size or num_components, or raise the limit"


@enough_resources("Compression", _LOWER)
def compress(
    net: nn.Module,
    train_loader: Any,
    recipe: CompressionRecipe | Mapping[str, Any] | None = None,
    *,
    validation: Any | None = None,
    likelihood: str | Callable[[Any], dist.TorchDistribution] = "categorical",
    judge: Judge | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool | TellStep | None = None,
    metadata: Mapping[str, Any] | None = None,
    branch: str | Path | None = None,
) -> CompressionResult:
    """Compress a trained network: prune, quantize, fine-tune and pack it.

    Calls in several threads take turns, and leave random states, default dtype, grad mode and Pyro's store as they
    were (:mod:`sqs_pyro.isolation`).

    Args:
        net: a trained network; it is copied, not changed.
        train_loader: minibatches of inputs and labels: ``(x, y)``, several inputs ``((u, v), y)`` or
            ``({"u": u, "v": v}, y)``, a mapping with ``"labels"``, see
            :func:`~sqs_pyro.networks.minibatches.split_minibatch`; with ``len(train_loader)`` and
            ``len(train_loader.dataset)``. The first one is tried before anything is trained.
        recipe: a :class:`CompressionRecipe`, or a mapping of its keys; by default the recipe's defaults.
        validation: minibatches on which the hard network is evaluated during training.
        likelihood: ``"categorical"`` (integer classes, one-hot or probabilities), ``"multilabel"`` (or
            ``"bernoulli"``), ``"gaussian"`` and :func:`others <sqs_pyro.models.likelihoods.resolve>`, one of
            :mod:`sqs_pyro.models.likelihoods` with arguments (class axis, labels to leave out, class weights,
            noise), or a callable from the network's output to a distribution. One with parameters is copied and
            learned: ``result.model.likelihood``.
        judge: ``(net, validation)`` to a figure of at most 1, how good a hard network is; by default accuracy of
            classes, the share of right labels of several at once, R² of numbers. One of your own is tried on the
            whole validation data before training.
        seed: of everything random in here: initialisation, draws, dropout, and what the data draws from torch,
            NumPy or Python. The order of the data comes from the loader's own seed; a loader without one (torch's
            with ``shuffle=True`` and no generator) follows this.
        checkpoint: file to resume from if it exists, renewed every epoch and on Ctrl-C, which takes effect after
            the step at hand. It belongs to this network, data, recipe, likelihood and seed: with others it is
            refused.
        progress: called with a :class:`StepRecord` every few steps; or whether a bar on stderr tells of them, by
            default on a terminal and in a notebook.
        metadata: written into the packed file, beside the recipe.
        branch: file of the state halfway, from which calls that differ in nothing but ``target_ratio`` go on:
            written if it does not exist, else this call begins there. Such calls share the first half.

    Returns:
        The packed network and everything that led to it.

    Raises:
        RecipeError, NetworkError, DataError, DivergenceError: one sentence that says what to repair; what can
            be checked is checked before training starts.
        OutputError: the checkpoint cannot be written.
        ResourceError: there is too little memory.
    """
    began = time.perf_counter()
    recipe = parse(CompressionRecipe, recipe or {}, "compression")
    check_network(net)
    check_training_loader(train_loader)
    if recipe.patience is not None and validation is None:
        raise RecipeError("Recipe key 'compression.patience' needs validation data: give it, or remove the key.")
    among = ranks()
    among.check(recipe.shards, "compression.shards")
    if checkpoint is not None:
        checkpoint = resolved(checkpoint)
    if branch is not None:
        branch = resolved(branch)
    for kept in (checkpoint, branch):
        if kept is not None and among.leads:
            check_place(kept)
    with isolated(net, seed=seed):
        begun = copied(net)
        model = network_model(
            begun,
            recipe,
            prior=_prior(recipe.prior),
            likelihood=copied(likelihood) if isinstance(likelihood, LearnedLikelihood) else likelihood,
        )
        # What is cheap to find out comes first: data and judge, then codebooks, then a file as it would be.
        check_finite(begun)
        warn_of_slow_precision(recipe.precision, device_of(begun))
        labels = _try(model, train_loader, validation, judge, recipe, checkpoint)
        guide = _guide(model, recipe)
        inputs = first_inputs(train_loader, model.net)
        rehearse(model.net, guide, recipe.storage, inputs, metadata)
        check_stands_alone(model.net, net, inputs)
        bits = None if recipe.target_ratio is None else _bits_for_symbols(model, guide, recipe, metadata)
        if bits is not None:
            check_own_bits(guide, recipe, bits)
        judge = judge or judge_by(model.likelihood)  # after `_try`, which may have settled the class axis
        with (
            _distilled(model, net, recipe, train_loader) as observed,
            enough_resources("Training", _LOWER),
            told(progress if among.leads else False) as tell,
        ):
            # A checkpoint knows recipe, network and data by itself; these decide the outcome, too.
            setting = {"seed": seed, "likelihood": described(likelihood)}
            driver = Driver(
                model, guide, recipe, observed, validation, tell, bits, judge, setting, inputs, labels, seed
            )
            history = driver.run(checkpoint, branch)
        with enough_resources("Packing"):
            coded = guide.harden(recipe.storage.codebook)
            unrounded = hard_network(model.net, coded).eval()
            # Statistics of training are those of soft or changing draws: the hard network has its own.
            if recipe.batch_norm_batches:
                reestimate_batch_norm(unrounded, train_loader, recipe.batch_norm_batches)
            # Folded and rounded first, then packed: the file holds exactly these values.
            hard = shipped_network(unrounded, coded, recipe.leftover_dtype, inputs)
            packed = running_network(hard, _packed(hard, coded, recipe, _about(recipe, metadata, guide)))
            difference = None if inputs is None else check_agreement(hard, packed, inputs)
            anew = recipe.batch_norm_batches and batch_norm_statistics(unrounded)
        last = history[-1] if history else None  # without epochs there is none
        earlier = last is not None and driver.kept is not None and driver.kept.best != last.step
        changed = last is not None and (anew or earlier or last.stage != "frozen")  # since it was judged last
        if validation is not None and last is not None and last.score is not None and changed:
            history[-1] = replace(last, score=judged(judge, copied(hard), validation, among))
    findings = driver.findings + ([] if difference is None else [unrepeatable(difference.relative)])
    if recipe.target_ratio is not None:
        most = max(site.num_components for site in guide.site_guides().values())
        findings += size_findings(recipe.target_ratio, size_report(packed).ratio, most)
    seconds = driver.earlier_seconds + time.perf_counter() - began
    return CompressionResult(
        packed, hard, unrounded, model, guide, recipe, history, findings, seconds, driver.kept
    )


@isolating("net")
def check_target(net: nn.Module, recipe: CompressionRecipe, metadata: Mapping[str, Any] | None = None) -> None:
    """Check that a network's file can be as small as a recipe asks, whatever its weights are.

    Before a network is trained: :func:`compress` checks it, too, but then training has been for nothing.
    ``metadata`` is what its file shall say, which counts.

    Raises:
        RecipeError: what is not compressed takes more.
    """
    if recipe.target_ratio is not None:
        model = network_model(copied(net), recipe)
        _bits_for_symbols(model, _guide(model, recipe), recipe, metadata)


@isolating("net")
def reachable_ratio(net: nn.Module, recipe: CompressionRecipe, metadata: Mapping[str, Any] | None = None) -> float:
    """Return how many times smaller than the fp32 network a file with such metadata would be without weights."""
    model = network_model(copied(net), recipe)
    rest, fp32 = _not_symbols(model, _guide(model, recipe), recipe, metadata)
    return fp32 / rest


def network_model(net: nn.Module, recipe: CompressionRecipe, **options: Any) -> BayesianNetwork:
    """Return a network as a model whose sites are the weights that a recipe compresses.

    Args:
        net: whose parameters become the model's.
        recipe: says which.
        options: prior and likelihood of the model.

    Raises:
        RecipeError, NetworkError: a pattern matches nothing, or nothing is left to compress.
    """
    sites = select_sites(net, recipe.include, recipe.exclude)
    check_layers(recipe.layers, sites, "compression.layers")
    taken = [name for name in sites if not of_layer(recipe.layers, name).get("skip")]
    check_own_rates(taken, recipe)
    skipped = [f"^{re.escape(name)}$" for name in sites if name not in taken]
    return BayesianNetwork(net, include=recipe.include, exclude=(*recipe.exclude, *skipped), **options)


def _guide(model: BayesianNetwork, recipe: CompressionRecipe) -> SpikeGMMGuide:
    return SpikeGMMGuide(
        model,
        {name: recipe.components_of(name) for name in model.site_values()},
        recipe.windows.build(),
        recipe.temperature,
        estimator=recipe.estimator,
        groups=recipe.groups,
        grid=recipe.grid,
        zero=recipe.zero,
        initial_gate=recipe.initial_gate,
        refresh_every=recipe.refresh_every,
        stage="dense",
    )


def _try(
    model: BayesianNetwork,
    train_loader: Any,
    validation: Any | None,
    judge: Judge | None,
    recipe: CompressionRecipe,
    checkpoint: Path | None,
) -> float:
    """Try data, likelihood and judge on the network; what that settles becomes the model's.

    Returns:
        How many labels an example has: 1, or as many as pixels or tokens.

    Raises:
        RecipeError: distillation, and the likelihood is not that of a classifier.
        DataError, NetworkError: they do not fit.
    """
    if recipe.distillation is not None and not isinstance(model.likelihood, Categorical):
        raise RecipeError("Recipe key 'compression.distillation' needs the likelihood 'categorical': remove it.")
    resumed = checkpoint is not None and checkpoint.exists()  # then it has been judged before
    tried = try_first_minibatch(
        model.net,  # a copy: the user's own network is not even run in training mode
        train_loader,
        model.likelihood,
        validation=None if resumed else validation,
        judge=judge,
        dtype=training_dtype(recipe.precision),
    )
    model.likelihood, model.num_data = tried.likelihood, tried.num_data
    return tried.labels


@contextmanager
def _distilled(
    model: BayesianNetwork, net: nn.Module, recipe: CompressionRecipe, train_loader: Any
) -> Iterator[Any]:
    """Yield minibatches to train on; where they observe the fp32 network, the model's likelihood does, too."""
    section, own = recipe.distillation, model.likelihood
    if section is None:
        yield train_loader
        return
    assert isinstance(own, Categorical)
    dtype = training_dtype(recipe.precision)
    # The teacher is a copy in eval mode: the user's own network may be in any.
    observed = DistilledLoader(train_loader, copied(net).eval(), section.temperature, dtype, own)
    model.likelihood = DistillationLikelihood(section.weight, section.temperature, own.class_axis or -1)
    try:
        yield observed
    finally:
        model.likelihood = own  # what comes after training, reports and bounds, is about the labels alone


def _packed(
    hard: nn.Module,
    coded: Mapping[str, CodedTensor | PackedTensor],
    recipe: CompressionRecipe,
    metadata: Mapping[str, Any] | None,
) -> PackedContents:
    """Return what the file of a network as it ships will hold: the same values, weight by weight."""
    made_by = with_metadata({"recipe": recipe.model_dump(mode="json", exclude_defaults=True)}, metadata)
    return pack(hard, coded, layout=recipe.storage.layout, leftover_dtype=None, metadata=made_by)


def _bits_for_symbols(
    model: BayesianNetwork, guide: SpikeGMMGuide, recipe: CompressionRecipe, metadata: Mapping[str, Any] | None
) -> float:
    """Return what symbols, tables and codebooks may take if the whole file is to have the target size.

    Raises:
        RecipeError: the target is smaller than what is not compressed.
    """
    rest, fp32 = _not_symbols(model, guide, recipe, metadata)
    assert recipe.target_ratio is not None
    target = fp32 / recipe.target_ratio
    if target <= rest:
        raise RecipeError(
            f"target_ratio={recipe.target_ratio:g} asks for a file of {target:,.0f} bytes, but {rest:,} go to "
            "what is not compressed (norms, biases, excluded layers, names): ask for a ratio well below "
            f"{fp32 / rest:.0f}, or compress more layers."
        )
    return 8 * (target - rest)  # bytes to bits


def _not_symbols(
    model: BayesianNetwork, guide: SpikeGMMGuide, recipe: CompressionRecipe, metadata: Mapping[str, Any] | None
) -> tuple[int, int]:
    """Return the bytes of a file that are no symbols, tables or codebooks, and those of the fp32 network."""
    coded = {
        name: site.harden(recipe.storage.codebook, keep_codes=False) for name, site in guide.site_guides().items()
    }
    # Rehearsed with the weights as they are: what is not symbols takes the same space after training.
    hard = hard_network(model.net, coded)
    with torch.no_grad():  # a bias that is still constant takes no space; after training it will
        for name, parameter in hard.named_parameters():
            if name not in coded and model.net.get_parameter(name).requires_grad:
                spread = torch.linspace(0, 1, parameter.numel(), device=parameter.device)
                parameter.add_(spread.view_as(parameter))
    shipped = shipped_network(hard, coded, recipe.leftover_dtype)
    about = _about(recipe, metadata, guide)
    if WIDTHS in about and recipe.curvature == "network":  # √(β/h), then one number for all
        about = {**about, WIDTHS: 0.01234}
    packed = {name: pack_tensor(value, _likely_layout(value, recipe)) for name, value in coded.items()}
    size = size_report(_packed(shipped, packed, recipe, about))
    return size.total - size.codes - size.masks - size.codebooks - size.tables, size.fp32_bytes


def _likely_layout(weights: CodedTensor, recipe: CompressionRecipe) -> str:
    """Return the layout of weights once some are zero; what surrounds them depends on it."""
    layout = recipe.storage.layout
    adaptive = layout == "auto" and get_layout("adaptive").is_automatic(weights.codes.numel())
    return "adaptive" if adaptive else layout


def _about(
    recipe: CompressionRecipe, metadata: Mapping[str, Any] | None, guide: SpikeGMMGuide
) -> Mapping[str, Any]:
    """Return a file's metadata, with the posterior's widths where they are such."""
    # K-means' widths are those of its cells; only an E-step's are a posterior's.
    return with_widths(metadata, guide) if recipe.allocation == "rate_distortion" else metadata or {}


def _prior(recipe: PriorRecipe) -> Prior:
    """Return the prior that a recipe names."""
    if recipe.kind == "learned":
        return LearnedPrior(recipe.inclusion, recipe.scope)
    if recipe.kind == "hierarchical":
        assert recipe.scope != "structured"  # which only the learned prior has
        return HierarchicalInclusion(
            recipe.concentration1, recipe.concentration0, recipe.scope, slab_scale=recipe.slab_scale
        )
    if recipe.kind == "plain_normal":
        return normal_prior(recipe.slab_scale)
    if recipe.kind == "gaussian_spike":
        return gaussian_spike_prior(recipe.inclusion, spike_scale=recipe.spike_scale, slab_scale=recipe.slab_scale)
    return scale_matched_prior(
        recipe.inclusion,
        recipe.kind,
        slab_scale=recipe.slab_scale,
        degrees_of_freedom=recipe.degrees_of_freedom,
    )
