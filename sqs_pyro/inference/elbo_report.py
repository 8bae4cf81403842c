"""How far each bound on the KL is from the KL: site by site, for the whole ELBO, over temperatures."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.distributions import Distribution, Independent

from sqs_pyro.arguments import is_positive, is_whole
from sqs_pyro.distributions import SpikeGMM
from sqs_pyro.distributions.monte_carlo import draws_exactly
from sqs_pyro.documents import shown
from sqs_pyro.errors import ArgumentError, ModelError
from sqs_pyro.inference.called import Args, Kwargs, PyroCallable
from sqs_pyro.inference.elbo import Site, run_paired, sample_sites
from sqs_pyro.inference.kl_bounds import KLBounds, kl_bounds
from sqs_pyro.isolation import isolating
from sqs_pyro.networks.modes import evaluating
from sqs_pyro.reporting.printed import Printed, Report


@dataclass(frozen=True)
class ElboBounds:
    """The ELBO (β = 1) at one temperature.

    Attributes:
        temperature: τ; None where each of the guide's distributions keeps its own.
        sites: the KL of each latent site.
        nll: ``-E_q log p(data | weights)``, weights drawn from q itself, with Pyro's scales.
        nll_error: its standard error over those draws (what a minibatch leaves out is not in it).
    """

    temperature: float | None
    sites: tuple[KLBounds, ...]
    nll: float
    nll_error: float

    @property
    def total(self) -> KLBounds:
        """All sites together; where a site has no bound its estimate stands in, see ``uncertified``."""
        return KLBounds(
            name="all sites",
            num_weights=sum(site.num_weights for site in self.sites),
            gate_kl=sum(site.gate_kl or 0.0 for site in self.sites),
            lower=sum(_or_estimate(site.lower, site) for site in self.sites),
            jensen=sum(_or_estimate(site.jensen, site) for site in self.sites),
            dominant=sum(_or_estimate(site.dominant, site) for site in self.sites),
            dominant_below=sum(site.dominant_below for site in self.sites),
            monte_carlo=sum(site.monte_carlo for site in self.sites),
            monte_carlo_error=math.hypot(*(site.monte_carlo_error for site in self.sites)),  # independent
            code_entropy=sum(site.code_entropy for site in self.sites),
        )

    @property
    def uncertified(self) -> tuple[str, ...]:
        """Sites for which no bound is known: the bracket holds but for the error of their estimates."""
        return tuple(site.name for site in self.sites if site.lower is None or site.jensen is None)

    @property
    def elbo(self) -> tuple[float, float]:
        """``(low, high)``: the ELBO with Jensen's bound and with the lower end; the exact one is between."""
        total = self.total
        return -(self.nll + _or_estimate(total.jensen, total)), -(self.nll + _or_estimate(total.lower, total))


@dataclass(frozen=True, repr=False)
class ElboReport(Printed):
    """What :func:`elbo_report` found; it prints itself.

    Attributes:
        at: the bounds at each temperature asked for.
        num_samples: Monte Carlo draws of each weight.
        num_particles: networks drawn for the likelihood, at most.
    """

    at: tuple[ElboBounds, ...]
    num_samples: int
    num_particles: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: nats, with totals, widths, bits; None for what is unknown or infinite."""
        return {
            "num_samples": self.num_samples,
            "num_particles": self.num_particles,
            "temperatures": [_elbo_dict(bounds) for bounds in self.at],
        }

    def table(self) -> Report:
        """Return a row a temperature, then a row a site at the first temperature; ``print`` shows it."""
        from sqs_pyro.reporting.tables import bounds_tables

        return bounds_tables(self.to_dict())


@torch.no_grad()
@isolating("model", "guide", sees_parameters=True)
@torch.no_grad()
def elbo_report(
    model: PyroCallable,
    guide: PyroCallable,
    *args: Any,
    temperatures: Sequence[float] | None = None,
    num_samples: int = 16,
    num_particles: int = 8,
    standard_error: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    **kwargs: Any,
) -> ElboReport:
    """Bracket the KL of every site, with dominant value and Monte Carlo estimate, and the ELBO.

    Model and guide run in evaluation mode and are left as they were, the parameter store too. A prior that
    depends on other latent sites is taken at one draw of those. The largest tensors are a few of the size of
    one site's responsibilities, ``[weights, K]``.

    Args:
        model: a Pyro model.
        guide: its guide; sites of any distribution, temperatures matter for :class:`SpikeGMM`.
        *args: of model and guide: the data, whole or a minibatch.
        temperatures: τ of the responsibilities; by default the guide's present ``temperature``.
        num_samples: Monte Carlo draws of each weight.
        num_particles: networks drawn from q for the likelihood.
        standard_error: of the likelihood's estimate, as a share of it, at which no more networks are drawn; at
            least 2 are. None draws all ``num_particles``.
        progress: called as ``progress(done, total)``, often.
        **kwargs: of model and guide.

    Raises:
        ArgumentError: fewer than 2 draws, which give no standard error, or a temperature that is not positive.
        ModelError: (a ``ValueError``) a latent site of the model is missing from the guide.
        NotImplementedError: when a site's KL can be neither bounded nor estimated.
    """
    wanted = _checked(num_samples, num_particles, temperatures, getattr(guide, "temperature", None))
    modules = [each for each in (model, guide) if isinstance(each, nn.Module)]  # functions have no mode
    # In evaluation mode neither batch-norm statistics nor the guide's cached codes change.
    with evaluating(*modules), _as_in_training(guide):
        # One run of both: what a prior depends on is drawn once, and is the same at every temperature.
        latent = _latent_sites(model, guide, args, kwargs)
        values = {name: q["value"] for name, (q, _) in latent.items()}
        at: list[ElboBounds] = []
        for temperature in wanted:
            # A step for the KL, then one for each network drawn.
            tell = _part_of(progress, len(at), len(wanted), num_particles + 1)
            posteriors = {name: _at_temperature(q["fn"], temperature) for name, (q, _) in latent.items()}
            sites = tuple(
                kl_bounds(name, posteriors[name], p["fn"], num_samples, q["scale"], q["mask"])
                for name, (q, p) in latent.items()
            )
            tell(1)
            drawn = _negative_log_likelihoods(model, posteriors, values, args, kwargs)
            nll, error = _mean_and_error(drawn, num_particles, standard_error, tell)
            at.append(ElboBounds(temperature, sites, nll, error))
    return ElboReport(tuple(at), num_samples, num_particles)


def _checked(
    num_samples: int, num_particles: int, temperatures: Iterable[float] | None, own: float | None
) -> Sequence[float | None]:
    """Return the temperatures to report at, after a look at the other numbers."""
    for name, count in (("num_samples", num_samples), ("num_particles", num_particles)):
        if not is_whole(count, 2):
            raise ArgumentError(
                f"elbo_report: {name} is {shown(count)}, but must be at least 2 to give a standard error."
            )
    if temperatures is None:
        return [own]
    if isinstance(temperatures, str) or not isinstance(temperatures, Iterable):
        raise ArgumentError(f"elbo_report: temperatures is {shown(temperatures)}, but must be a list of numbers.")
    wanted = list(temperatures)
    for temperature in wanted:
        if not is_positive(temperature):
            raise ArgumentError(f"elbo_report: a temperature is {shown(temperature)}, but must be positive.")
    return wanted or [own]


@contextmanager
def _as_in_training(guide: Any) -> Iterator[None]:
    """Let a guide keep its temperatures of training in evaluation mode: they are what the ELBO is about."""
    own = ("evaluation_temperature", "evaluation_gate_temperature")
    temperatures = {name: getattr(guide, name) for name in own if hasattr(guide, name)}
    try:
        for name in temperatures:  # None: those of training
            setattr(guide, name, None)
        yield
    finally:
        for name, temperature in temperatures.items():
            setattr(guide, name, temperature)


def _latent_sites(
    model: PyroCallable, guide: PyroCallable, args: Args, kwargs: Kwargs
) -> dict[str, tuple[Site, Site]]:
    """Return each latent site of the model: the guide's site and the model's."""
    model_trace, guide_trace = (prune_subsample_sites(t) for t in run_paired(model, guide, args, kwargs))
    latent = {name: site for name, site in sample_sites(model_trace) if not site["is_observed"]}
    if len(latent) == len(sample_sites(model_trace)) and _observes(guide_trace):
        raise ModelError(
            "elbo_report: the guide observes data and the model none: give the model first, then its guide."
        )
    if any(site["infer"].get("mesh") is not None for _, site in sample_sites(guide_trace)):
        raise ModelError(
            "elbo_report: ranks have rows of each site (shard_sites), but a report is of all weights: load the "
            "guide's state into one of a model that is not divided."
        )
    # Told here, in a sentence with its name; the look-up below would raise KeyError.
    missing = [name for name in latent if name not in guide_trace]
    if missing:
        raise ModelError(f"elbo_report: the model samples '{missing[0]}' but the guide does not; add it there.")
    return {name: (guide_trace.nodes[name], site) for name, site in latent.items()}


def _observes(guide_trace: Trace) -> bool:
    return any(site["is_observed"] for _, site in sample_sites(guide_trace))


def _at_temperature(q: Distribution, temperature: float | None) -> Distribution:
    if isinstance(q, Independent):
        # Rebuilt around another base: `to_event` itself has no temperature.
        return type(q)(_at_temperature(q.base_dist, temperature), q.reinterpreted_batch_ndims)
    if not isinstance(q, SpikeGMM):
        return q
    # Also where the temperature stays: its `sample` is then exact, whatever the estimator was.
    return q.at_temperature(q.temperature if temperature is None else temperature)


def _negative_log_likelihoods(
    model: PyroCallable,
    posteriors: dict[str, Distribution],
    values: dict[str, Tensor],
    args: Args,
    kwargs: Kwargs,
) -> Iterator[float]:
    """Yield ``-log p(data | weights)`` without an end, at draws of what has an atom and other sites as given."""
    while True:
        # What makes network values instead of draws is drawn from q itself: the report is about q.
        drawn = {name: values[name] if draws_exactly(q) else q.sample() for name, q in posteriors.items()}
        # Conditioned sites count as observed, too: the likelihood is that of what was observed before.
        replayed = prune_subsample_sites(poutine.trace(poutine.condition(model, drawn)).get_trace(*args, **kwargs))
        observed = [name for name, site in sample_sites(replayed) if site["is_observed"] and name not in drawn]
        # Only the data's: densities of weights would cost as much as their KL.
        replayed.compute_log_prob(site_filter=lambda name, site, names=frozenset(observed): name in names)
        yield -sum(float(replayed.nodes[name]["log_prob_sum"]) for name in observed)


def _mean_and_error(
    drawn: Iterator[float], most: int, standard_error: float | None, tell: Callable[[int], None]
) -> tuple[float, float]:
    """Return mean and standard error of the first ``most`` values, or of as many as the error takes."""
    values: list[float] = []
    while True:
        values.append(next(drawn))
        tell(1 + len(values))
        # A standard error takes two.
        if len(values) < 2:
            continue
        nll = torch.tensor(values, dtype=torch.float64)
        mean, error = nll.mean().item(), nll.std().item() / math.sqrt(len(values))
        if len(values) == most or (standard_error is not None and error <= standard_error * abs(mean)):
            tell(1 + most)  # a bar ends full, however early this does
            return mean, error


def _part_of(
    progress: Callable[[int, int], None] | None, part: int, parts: int, steps: int
) -> Callable[[int], None]:
    """Tell ``progress`` of the steps of one of several parts of equal length."""
    return lambda done: None if progress is None else progress(part * steps + done, parts * steps)


def _or_estimate(bound: float | None, site: KLBounds) -> float:
    return site.monte_carlo if bound is None else bound


def _elbo_dict(bounds: ElboBounds) -> dict[str, Any]:
    low, high = bounds.elbo
    return {
        "temperature": bounds.temperature,
        "nll": _finite(bounds.nll),
        "nll_error": _finite(bounds.nll_error),
        "elbo_low": _finite(low),
        "elbo_high": _finite(high),
        "uncertified": list(bounds.uncertified),
        "total": _kl_dict(bounds.total),
        "sites": [_kl_dict(site) for site in bounds.sites],
    }


def _kl_dict(kl: KLBounds) -> dict[str, Any]:
    values = {**asdict(kl), "width": kl.width, "bits_per_weight": kl.bits_per_weight}
    return {key: _finite(value) if isinstance(value, float) else value for key, value in values.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
