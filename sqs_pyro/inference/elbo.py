"""The evidence lower bound with analytic bounds on the KL of spike-and-GMM sites."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.trace_mean_field_elbo import _check_mean_field_requirement
from pyro.infer.util import check_fully_reparametrized, is_validation_enabled
from pyro.poutine import Trace, replay, trace, unwrap
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_if_enumerated, check_model_guide_match, check_site_shape, warn_if_nan
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sqs_pyro.arguments import is_positive, is_whole
from sqs_pyro.distributions import kl_bound, sampled_kl
from sqs_pyro.distributions.monte_carlo import draws_exactly
from sqs_pyro.errors import ArgumentError, ModelError, NotReparametrisedError
from sqs_pyro.inference.called import Args, Kwargs, PyroCallable
from sqs_pyro.models.sharding import added_over_ranks

KL_KINDS = ("jensen", "dominant", "monte_carlo")
Site = dict[str, Any]


@dataclass(frozen=True)
class ElboTerms:
    """The parts of one estimate of the loss, in nats, averaged over particles; scalars, differentiable.

    Attributes:
        nll: ``-E_q log p(data | weights)``, with Pyro's scales and masks
            (``plate("data", N, subsample_size=B)`` gives the factor N/B).
        kl: the sum of ``kl_by_site``, *not* multiplied by ``kl_weight``.
        kl_by_site: the KL of each latent site, auxiliary guide sites included; empty when ``kl_weight`` is 0,
            because nothing was evaluated then.
        kl_weight: β at the time of the estimate.
    """

    nll: Tensor
    kl: Tensor
    kl_by_site: dict[str, Tensor]
    kl_weight: float = 1.0

    @property
    def loss(self) -> Tensor:
        """``nll + β kl``; at β = 1 with an exact KL or Jensen's, an upper bound on ``-log p(data)``."""
        return self.nll + self.kl_weight * self.kl


class SQSELBO(TraceMeanField_ELBO):
    """``-ELBO = -E_q log p(data | θ) + β KL(q‖p)`` with the KL of each site by type pair.

    Usable as ``SVI(model, guide, optim, loss=SQSELBO())`` and as ``SQSELBO()(model, guide)``, a module. For
    spike-and-GMM sites ``kl`` says which value stands for the KL (docs/method.md): ``"jensen"`` (default; the
    ELBO stays a lower bound), ``"dominant"`` (Eq. 8 of the paper; not a bound) or ``"monte_carlo"``
    (unbiased, for checking). Other latent sites are treated as in :class:`~pyro.infer.TraceMeanField_ELBO`:
    exact KL where one is registered, else ``log q - log p`` at the sampled value. Where an analytic term is
    used, neither the guide's nor the prior's ``log_prob`` of the site is evaluated.

    Args:
        kl: ``"jensen"``, ``"dominant"`` or ``"monte_carlo"``.
        kl_weight: β, multiplies all latent terms. Below 1 it is a cold posterior, and the loss no longer
            bounds the evidence. An ordinary attribute, so it can be annealed; 0 skips the KL altogether.
        num_particles: number of draws of the guide an estimate averages.
        **options: what :class:`~pyro.infer.elbo.ELBO` takes, such as ``vectorize_particles``.

    Raises:
        ArgumentError: (a ``ValueError``) for an unknown ``kl``, a ``kl_weight`` that is negative or not finite,
            or fewer than one particle.
    """

    def __init__(self, kl: str = "jensen", kl_weight: float = 1.0, num_particles: int = 1, **options: Any) -> None:
        if kl not in KL_KINDS:
            raise ArgumentError(f"SQSELBO: kl must be one of {', '.join(KL_KINDS)}, but got {kl!r}.")
        if not (is_positive(kl_weight) or kl_weight == 0):
            raise ArgumentError(f"SQSELBO: kl_weight must be a finite number >= 0, but got {kl_weight!r}.")
        if not is_whole(num_particles, 1):
            raise ArgumentError(f"SQSELBO: num_particles must be at least 1, but got {num_particles!r}.")
        super().__init__(num_particles=num_particles, **options)
        self.kl = kl
        self.kl_weight = kl_weight

    def terms(self, model: PyroCallable, guide: PyroCallable, *args: Any, **kwargs: Any) -> ElboTerms:
        """Return the parts of the loss, from which ``.loss`` follows without a second pass.

        Raises:
            ModelError: (a ``ValueError``) a latent site of the model is missing from the guide.
            NotReparametrisedError: (a ``NotImplementedError``, too) a guide site cannot be reparametrised.
        """
        particles = list(self._particles(model, guide, args, kwargs))
        # Particles are divided by their number already: sums are means.
        by_site: dict[str, Tensor] = {}  # particles may differ in their sites
        for particle in particles:
            for name, kl in particle.kl_by_site.items():
                by_site[name] = by_site[name] + kl if name in by_site else kl
        nll = torch.stack([particle.nll for particle in particles]).sum()
        total = torch.stack([particle.kl for particle in particles]).sum()
        return ElboTerms(nll, total, by_site, self.kl_weight)

    def differentiable_loss(self, model: PyroCallable, guide: PyroCallable, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss as a scalar tensor, differentiable with respect to model and guide parameters."""
        loss = self.terms(model, guide, *args, **kwargs).loss
        warn_if_nan(loss, "loss")
        return loss

    def loss(self, model: PyroCallable, guide: PyroCallable, *args: Any, **kwargs: Any) -> float:
        """Return the loss as a number, without gradients."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: PyroCallable, guide: PyroCallable, *args: Any, **kwargs: Any) -> float:
        """Return the loss as a number; gradients are added to the parameters' ``grad``, one particle at a time.

        Raises:
            ModelError: in inference mode, where nothing can be trained.
        """
        if torch.is_inference_mode_enabled():
            raise ModelError(
                "SVI.step was called in torch.inference_mode(), in which nothing can be trained: call it outside, "
                "or SVI.evaluate_loss for the loss alone."
            )
        with torch.enable_grad():
            return self._loss_and_grads(model, guide, args, kwargs)

    def _loss_and_grads(self, model: PyroCallable, guide: PyroCallable, args: Args, kwargs: Kwargs) -> float:
        total = 0.0
        for particle in self._particles(model, guide, args, kwargs):
            if particle.loss.requires_grad:  # one after the other: only one particle's graph is in memory
                particle.loss.backward(retain_graph=self.retain_graph)
            total += particle.loss.item()
        warn_if_nan(total, "loss")
        return total

    @torch.no_grad()
    def bracket(self, model: PyroCallable, guide: PyroCallable, *args: Any, **kwargs: Any) -> tuple[float, float]:
        """Return ``(low, high)``: this estimate of the ELBO at β = 1 with Jensen's bound and with the lower bound.

        The exact KL lies between the two, whatever ``kl`` is; their distance is ``Σᵢ λᵢ H(φᵢ)``.
        """
        low, high = 0.0, 0.0
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            nll = _negative_log_likelihood(model_trace)  # one draw for both ends: their distance is exact
            jensen, lower = (
                _total(self._kl_by_site(model_trace, guide_trace, kind), nll) for kind in ("jensen", "lower")
            )
            low += (-(nll + jensen)).item() / self.num_particles
            high += (-(nll + lower)).item() / self.num_particles
        return low, high

    def _particles(
        self, model: PyroCallable, guide: PyroCallable, args: Args, kwargs: Kwargs
    ) -> Iterator[ElboTerms]:
        """Yield the terms of each pair of traces, already divided by ``num_particles``."""
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            nll = _negative_log_likelihood(model_trace) / self.num_particles
            by_site: dict[str, Tensor] = {}
            if self.kl_weight != 0:  # 0 skips the KL's cost, too
                sums = self._kl_by_site(model_trace, guide_trace, self.kl)
                by_site = {name: kl / self.num_particles for name, kl in sums.items()}
            yield ElboTerms(nll, _total(by_site, nll), by_site, self.kl_weight)

    def _differentiable_loss_particle(self, model_trace: Trace, guide_trace: Trace) -> tuple[float, Tensor]:
        """Answer Pyro's hook for one pair of traces: the loss as a number and as a differentiable scalar."""
        nll = _negative_log_likelihood(model_trace)
        by_site = {} if self.kl_weight == 0 else self._kl_by_site(model_trace, guide_trace, self.kl)
        loss = nll + self.kl_weight * _total(by_site, nll)
        return loss.item(), loss

    def _kl_by_site(self, model_trace: Trace, guide_trace: Trace, kind: str) -> dict[str, Tensor]:
        latent = {name: site for name, site in sample_sites(model_trace) if not site["is_observed"]}
        by_site = {}
        for name, model_site in latent.items():
            guide_site = guide_trace.nodes.get(name)
            if guide_site is None:
                raise ModelError(
                    f"SQSELBO: the model samples '{name}' but the guide does not; add the site to the guide "
                    "or give the model an observed value for it."
                )
            mesh = guide_site["infer"].get("mesh")
            kl = partial(_site_kl, model_site, guide_site, kind)
            by_site[name] = kl() if mesh is None else _kl_of_rows(kl, mesh)
        # After the latent sites: what is left of the guide has no counterpart, and adds log q.
        for name, guide_site in sample_sites(guide_trace):
            if name not in model_trace.nodes:  # an auxiliary site of the guide
                by_site[name] = _auxiliary_kl(guide_site)
        return by_site

    def _get_trace(
        self, model: PyroCallable, guide: PyroCallable, args: Args, kwargs: Kwargs
    ) -> tuple[Trace, Trace]:
        """Return traces with the log-densities of observed sites only; Pyro's checks when validation is on."""
        # Pyro's own `get_importance_trace` evaluates every density; the rest of this method is what it does beside
        # that.
        model_trace, guide_trace = run_paired(model, guide, args, kwargs)
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
        guide_trace = prune_subsample_sites(guide_trace)
        model_trace = prune_subsample_sites(model_trace)
        # Densities of latent sites would cost [weights, K] each, and an analytic term takes their place.
        model_trace.compute_log_prob(site_filter=lambda name, site: site["is_observed"])
        if is_validation_enabled():
            for _, site in (*sample_sites(model_trace), *sample_sites(guide_trace)):
                # Pyro's check reads the shape of a log-density that is not there.
                check_site_shape(_with_log_prob_shape(site), self.max_plate_nesting)
            check_if_enumerated(guide_trace)
            _check_mean_field_requirement(model_trace, guide_trace)
        return model_trace, guide_trace


def run_paired(model: PyroCallable, guide: PyroCallable, args: Args, kwargs: Kwargs) -> tuple[Trace, Trace]:
    """Return traces of the model and of the guide that it replays, without any log-density."""
    unwrapped = unwrap(guide)
    if isinstance(unwrapped, Messenger):  # Pyro's GuideMessenger runs both at once
        guide(*args, **kwargs)
        return unwrapped.get_traces()
    guide_trace = trace(guide, graph_type="flat").get_trace(*args, **kwargs)
    replayed = replay(model, trace=guide_trace)  # the model at the guide's values
    return trace(replayed, graph_type="flat").get_trace(*args, **kwargs), guide_trace


def sample_sites(from_trace: Trace) -> list[tuple[str, Site]]:
    """Return names and sites of all that was sampled or observed."""
    return [(name, site) for name, site in from_trace.nodes.items() if site["type"] == "sample"]


def _with_log_prob_shape(site: Site) -> Site:
    """Return the site with a ``log_prob`` of the right shape, made without evaluating any density."""
    if "log_prob" in site:
        return site
    value, fn = site["value"], site["fn"]
    shape = torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])
    return {**site, "log_prob": value.new_empty(()).expand(shape)}  # expanded: no memory


def _negative_log_likelihood(model_trace: Trace) -> Tensor:
    observed = [site["log_prob_sum"] for _, site in sample_sites(model_trace) if site["is_observed"]]
    return -sum(observed[1:], observed[0]) if observed else torch.zeros(())


def _total(by_site: dict[str, Tensor], like: Tensor) -> Tensor:
    return sum(by_site.values(), torch.zeros_like(like))


def _site_kl(model_site: Site, guide_site: Site, kind: str) -> Tensor:
    """Return the KL of one latent site, summed over it, with the guide's scale and mask as in Pyro."""
    q, p = guide_site["fn"], model_site["fn"]
    # Without such draws the likelihood's gradient would silently leave the guide out.
    if torch.is_grad_enabled() and not q.has_rsample:
        raise NotReparametrisedError(
            f"SQSELBO: the guide's distribution at site '{guide_site['name']}', {type(q).__name__}, has no "
            "reparametrised draws; all distributions in the guide must be fully reparameterized."
        )
    try:
        # A distribution with a spike; any other has its exact KL or, below, log q - log p at its own draw.
        if kind == "monte_carlo" and not draws_exactly(q):
            kl = sampled_kl(q, p).squeeze(0)
        else:
            kl = kl_bound(q, p, "jensen" if kind == "monte_carlo" else kind)  # [*batch_shape]
    # Neither a bound nor an exact KL is registered for the pair.
    except NotImplementedError:
        return _sampled_site_kl(model_site, guide_site)
    kl = scale_and_mask(kl, scale=guide_site["scale"], mask=guide_site["mask"])
    if not isinstance(kl, Tensor):  # Pyro's answer for a distribution masked by False
        return guide_site["value"].new_zeros(())
    if kl.shape != q.batch_shape:  # a sum would broadcast, and count weights twice
        raise ModelError(
            f"SQSELBO: the KL of site '{guide_site['name']}' has shape {list(kl.shape)}, but the guide's "
            f"distribution has batch shape {list(q.batch_shape)}: a registered bound must give a value for each "
            "weight of q, and prior and guide must sample the site in the same plates."
        )
    return kl.sum()


def _kl_of_rows(kl: Callable[[], Tensor], mesh: Any) -> Tensor:
    """Return the KL of a site of which ranks have rows; the backward pass computes it anew."""
    return added_over_ranks(checkpoint(kl, use_reentrant=False), mesh)


def _sampled_site_kl(model_site: Site, guide_site: Site) -> Tensor:
    """Return an unbiased KL where none is registered: of draws of a spike, else at the site's own value."""
    q, p = guide_site["fn"], model_site["fn"]
    if not draws_exactly(q):  # its value is one to run a network with, not a draw
        kl = sampled_kl(q, p).squeeze(0)
        return scale_and_mask(kl, scale=guide_site["scale"], mask=guide_site["mask"]).sum()
    log_p = scale_and_mask(p.log_prob(guide_site["value"]), scale=model_site["scale"], mask=model_site["mask"])
    return _auxiliary_kl(guide_site) - log_p.sum()


def _auxiliary_kl(guide_site: Site) -> Tensor:
    """Return ``log q`` of a guide site at its own value, with Pyro's check that it is fully reparametrised."""
    # Pyro's split of log q: of a reparametrised site the entropy term is log q, gradients flow through the value.
    parts = guide_site["fn"].score_parts(guide_site["value"])
    parts = parts.scale_and_mask(guide_site["scale"], guide_site["mask"])
    if not torch.is_grad_enabled():
        return parts.log_prob.sum()
    if is_validation_enabled():
        check_fully_reparametrized({**guide_site, "score_parts": parts})
    return parts.entropy_term.sum()
