"""What can go wrong with a posterior, found by looking at it: each finding names its site and the repair.

Nothing here trains, draws or changes anything. (What is wrong with *data* is told in ``input_checks``.)
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sqs_pyro.distributions.monte_carlo import has_atom
from sqs_pyro.errors import NetworkError
from sqs_pyro.inference.disagreement import expected_disagreement, temperature_for_disagreement
from sqs_pyro.inference.findings import THRESHOLDS, Finding, finding
from sqs_pyro.inference.guides.batch_norm import shared_batch_norm
from sqs_pyro.inference.guides.site import SiteGuide
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.isolation import isolated
from sqs_pyro.models.network_prior import FixedPrior, NetworkPrior
from sqs_pyro.networks.coverage import Coverage, Uncompressed, coverage
from sqs_pyro.networks.weight_scale import weight_scale

_SHARE_OF_ZEROS = 0.25  # from which on a codeword that is nearly zero is a waste


class Pruning(Protocol):
    """How weights are chosen to be zero, as far as findings depend on it."""

    @property
    def scope(self) -> str:
        """``"global"`` or ``"layer"``."""

    @property
    def saliency(self) -> str:
        """``"magnitude"``, ``"gate"`` or ``"activation"``."""


class TrainedBy(Protocol):
    """What findings depend on of a recipe, such as that of :func:`~sqs_pyro.compress`."""

    @property
    def allocation(self) -> str:
        """``"schedule"`` or ``"rate_distortion"``."""

    @property
    def pruning(self) -> Pruning:
        """Of a schedule."""

    @property
    def target_ratio(self) -> float | None:
        """Size to reach."""

    @property
    def kl_weight(self) -> float:
        """β."""

    @property
    def gate_learning_rate(self) -> float:
        """0 where gates do not learn."""


@isolated(sees_parameters=True)
@torch.no_grad()
def diagnose(
    model: Any, guide: nn.Module, *, averaging: bool = True, recipe: TrainedBy | None = None
) -> list[Finding]:
    """Look a posterior over: gates, layers, codebooks, draws, and how much of the network they are.

    Call it now and then in a training loop, or after it; it costs about as much as a step.

    Args:
        model: the Bayesian network; its ``priors`` say whether gates can close at all.
        guide: its guide, or a module with such guides as parts, such as Pyro's ``AutoGuideList``.
        averaging: whether draws are to be averaged, so that they should differ.
        recipe: by which it is trained; what a schedule, a target or a learned prior does on purpose is then no
            finding, and repairs name the keys that have an effect. None: the KL alone decides.

    Returns:
        Nothing if all is well.

    Raises:
        NetworkError: there is no :class:`SpikeGMMGuide` in the guide.
    """
    modules = guide.modules() if isinstance(guide, nn.Module) else ()
    parts = [part for part in modules if isinstance(part, SpikeGMMGuide)]
    if not parts:
        raise NetworkError(
            f"diagnose was given a {type(guide).__name__} without a SpikeGMMGuide: give one, or a module (such as "
            "an AutoGuideList) that has it as a part."
        )
    findings = [found for part in parts for found in _of_guide(model, part, averaging, recipe)]
    net = getattr(model, "net", None)
    if isinstance(net, nn.Module):
        findings += uncompressed(coverage(net, {name for part in parts for name in part.site_guides()}))
    return list(dict.fromkeys(findings))  # members of a mixture may have the same to say


def _of_guide(model: Any, guide: SpikeGMMGuide, averaging: bool, recipe: TrainedBy | None) -> list[Finding]:
    priors = getattr(model, "priors", {})
    intended, words = _intended(recipe), _repairs(model, recipe)
    findings: list[Finding] = []
    for name, site in guide.site_guides().items():
        # A plain Pyro model says nothing of its priors, and is taken to have a spike.
        has_spike = name not in priors or has_atom(priors[name])
        # A kind stands once for each site: measures are "higher is better", so that one comparison serves all.
        measured = _gate_measures(site, site.gates(guide.gate_temperature), has_spike, "gates_closed" in intended)
        if guide.stage != "dense":
            measured |= _codebook_measures(site, guide)
        elif name in priors and site.learns_widths:  # inference: later, weights go where the likelihood wants them
            measured |= _prior_measures(priors[name], site.gates(guide.gate_temperature), site)
        findings += [
            finding(kind, name, value, **words)
            for kind, value in measured.items()
            if value < THRESHOLDS[kind] and kind not in intended
        ]
    findings += _compared(guide, recipe) + _grown(model, guide, recipe)
    if averaging and guide.stage == "dense":
        findings += shared_batch_norm(model, guide)
    if averaging and guide.stage != "dense":
        findings += inert_averaging(guide)
    return findings


def uncompressed(found: Coverage) -> list[Finding]:
    """Return a finding if a good part of a network's weights is not compressed; it names the largest."""
    largest = found.largest()
    if found.share >= THRESHOLDS["uncompressed"] or not largest:
        return []
    listed = " and ".join(filter(None, [", ".join(map(_named, largest[:-1])), _named(largest[-1])]))
    return [finding("uncompressed", None, found.share, total=found.total, largest=listed)]


def _compared(guide: SpikeGMMGuide, recipe: TrainedBy | None) -> list[Finding]:
    """Return findings if pruning compares what cannot be compared."""
    # Before anything is pruned there is nothing that was compared.
    if recipe is None or recipe.allocation != "schedule" or guide.nonzero_rate() == 1:
        return []
    sites = guide.site_guides()
    if recipe.pruning.saliency == "gate":
        logits = [site.gate_logit for site in sites.values()]
        spread = float(torch.stack([x.max() for x in logits]).max() - torch.stack([x.min() for x in logits]).min())
        return [finding("equal_gates", None, spread)] if spread < THRESHOLDS["equal_gates"] else []
    if recipe.pruning.scope != "global" or recipe.pruning.saliency != "magnitude":
        return []
    sizes = {name: _size(site) for name, site in sites.items()}
    # Magnitudes under one threshold: which layer is pruned then depends on how large its weights happen to be.
    smallest, largest = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    measured = sizes[smallest] / sizes[largest] if sizes[largest] else 1.0
    if measured >= THRESHOLDS["unequal_layers"]:
        return []
    return [finding("unequal_layers", smallest, measured, largest=largest)]


def _grown(model: Any, guide: SpikeGMMGuide, recipe: TrainedBy | None) -> list[Finding]:
    """Return findings for layers that training has thrown far from where they started."""
    before = model.site_values() if hasattr(model, "site_values") else {}
    # Before over now: below 1 where weights have grown. Latents that are all zero have not.
    sizes = {name: _size(site) for name, site in _in(guide, before)}
    found = {name: float(weight_scale(before[name])) / size for name, size in sizes.items() if size}
    or_kl = "" if recipe is not None and recipe.kl_weight == 0 else " or kl_weight"
    return [
        finding("grown_weights", name, measured, times=1 / measured, or_kl=or_kl)
        for name, measured in found.items()
        if measured < THRESHOLDS["grown_weights"]
    ]


def _in(guide: SpikeGMMGuide, names: Mapping[str, Any]) -> list[tuple[str, SiteGuide]]:
    return [(name, site) for name, site in guide.site_guides().items() if name in names]


def _size(site: SiteGuide) -> float:
    """Return the root mean square of the latents."""
    return float(site.latent.double().square().mean().sqrt())


def _named(other: Uncompressed) -> str:
    return f"'{other.name}' ({other.numel:,}{', ' if other.reason else ''}{other.reason})"


def _intended(recipe: TrainedBy | None) -> set[str]:
    """Return kinds that are no findings: what decides instead of the KL means them, or the KL has no gradient."""
    if recipe is None:
        return set()
    if recipe.allocation == "rate_distortion":  # closes gates and drops components in closed form
        return {"gates_closed", "gates_open", "unused_components", "narrow_component"}
    held = {"gates_closed", "gates_open"} if recipe.gate_learning_rate == 0 else set()
    return held | ({"narrow_component"} if recipe.kl_weight == 0 else set())


def _repairs(model: Any, recipe: TrainedBy | None) -> dict[str, str]:
    """Return clauses that name what has an effect."""
    prior = getattr(model, "prior", None)
    given = not isinstance(prior, NetworkPrior) or isinstance(prior, FixedPrior)  # else λ₀ follows the gates
    by_kl = recipe is None or (recipe.kl_weight > 0 and recipe.allocation == "schedule")
    denser = "raise nonzero_rate, prune by layer instead of globally"
    if recipe is not None and recipe.target_ratio is not None:
        denser = "lower target_ratio"
    elif recipe is not None and recipe.allocation == "rate_distortion":
        denser = "lower kl_weight"
    return {
        "denser": denser,
        "gentler": "lower kl_weight or the codebook's learning rate" if by_kl else "lower codebook_learning_rate",
        "inclusion": " or raise the prior's inclusion" if given else "",
        "schedule": (" or the prior's inclusion" if given else "")
        + (", or let a pruning schedule decide" if recipe is None else ""),
    }


def inert_averaging(
    guide: SpikeGMMGuide,
    temperature: float | None = None,
    gate_temperature: float | None = None,
    disagreement: float = 0.1,
) -> list[Finding]:
    """Return a finding if drawn networks hardly differ, so that averaging them does nothing.

    Args:
        guide: it has codebooks.
        temperature, gate_temperature: see :meth:`SpikeGMMGuide.evaluation_temperatures`.
        disagreement: share of different weights for which the finding names a temperature.
    """
    measured = expected_disagreement(guide, temperature, gate_temperature)
    if measured >= THRESHOLDS["inert_averaging"]:
        return []
    remedy = temperature_for_disagreement(guide, disagreement, gate_temperature)
    repair = "no evaluation temperature changes that, because gates and codes leave too little to draw"
    if remedy is not None:
        repair = f"an evaluation temperature of {remedy:.2g} makes {disagreement:.0%} differ"
    return [finding("inert_averaging", None, measured, repair=repair)]


def _gate_measures(site: SiteGuide, gates: Tensor, has_spike: bool, closed_on_purpose: bool) -> dict[str, float]:
    free = gates[site.mask]  # those that pruning has left
    num_open = int((free > 0.5).sum())
    measured = {"gates_closed": num_open / len(free)} if len(free) else {}
    # A site whose gates have collapsed starves as well; that is told once, as the collapse it is. An output can do
    # without its bias, and what inference closes on its own evidence is no starvation.
    collapsed = len(free) and measured["gates_closed"] < THRESHOLDS["gates_closed"] and not closed_on_purpose
    if not collapsed and len(site.shape) > 1 and not site.learns_widths:
        measured["starving_layer"] = num_open / site.shape[0]
    # Gates of survivors of pruning are open because they were chosen, which says nothing of the posterior.
    if has_spike and len(free) == gates.numel():
        measured["gates_open"] = float(1 - free.min())
    return measured


def _prior_measures(prior: Any, gates: Tensor, site: SiteGuide) -> dict[str, float]:
    """Return how wide the prior's slab is beside the weights in it; nothing of a slab without a variance."""
    while hasattr(prior, "base_dist") and not hasattr(prior, "slab"):
        prior = prior.base_dist
    slab = getattr(prior, "slab", prior)
    try:
        width = slab.variance + slab.mean.square()  # E w², as that of the posterior
    except (AttributeError, NotImplementedError):
        return {}
    square = gates * (site.latent.square() + site.latent_scale.square())
    ratio = float((gates * width).sum() / square.sum())
    return {"narrow_prior": math.sqrt(ratio)} if 0 < ratio < math.inf else {}


def _codebook_measures(site: SiteGuide, guide: SpikeGMMGuide) -> dict[str, float]:
    """Return figures of the means that surviving weights use."""
    kept = site.grouped(site.gates(guide.gate_temperature) > 0.5)  # [G, n]
    loc, scale, latent = site.loc, site.scale, site.grouped(site.latent)
    if not bool(latent.isfinite().all()):
        return {}  # training has failed, which is told elsewhere
    codes = (site.codes if guide.stage == "frozen" else site.most_probable_codes()).long()
    kept = kept if site.zero == "gate" else kept & (codes > 0)

    def sum_by_code(values: Tensor) -> Tensor:
        return torch.zeros_like(loc).scatter_add_(1, codes, values * kept)  # [G, K]

    count, square = sum_by_code(torch.ones_like(latent)), sum_by_code(latent.square())
    if site.zero != "gate":  # the first codeword is zero itself, which no survivor uses
        loc, scale, count, square = loc[:, 1:], scale[:, 1:], count[:, 1:], square[:, 1:]
    used = count > 0
    large = kept.sum(1) >= site.num_components  # a group of fewer weights cannot use all
    spread = (square.sum(1, keepdim=True) / count.sum(1, keepdim=True)).sqrt()  # [G, 1]
    measured = {
        "narrow_component": _smallest((scale / spread)[used]),
        "merged_components": _closest(loc, scale, used),
        "unused_components": _smallest(used[large].float().mean(1)),
    }
    if float(kept.float().mean()) <= 1 - _SHARE_OF_ZEROS:
        # Without many zeros a codeword near zero is one like the others. (0 / 0 where unused is left out.)
        measured["vanishing_component"] = _smallest((loc.abs() / (square / count).sqrt())[used])
    return measured


def _smallest(values: Tensor) -> float:
    """Return the smallest value; infinite where there is nothing to measure."""
    return min(values.tolist(), default=math.inf)


def _closest(loc: Tensor, scale: Tensor, used: Tensor) -> float:
    """Return the smallest distance of neighbouring used means of a group, in units of their mean width."""
    order = loc.where(used, torch.inf).argsort(1)  # unused ones come last
    ordered, width = loc.where(used, torch.inf).gather(1, order), scale.gather(1, order)
    distance = ordered.diff(dim=1) / ((width[:, 1:] + width[:, :-1]) / 2)  # inf or NaN where one is unused
    return _smallest(distance[distance.isfinite()])
