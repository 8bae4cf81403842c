"""The variational family over a network: a spike-and-GMM guide for every compressed tensor."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn

from sqs_pyro.distributions import Codebook, CodebookGMM, LatentSpikeAndSlab
from sqs_pyro.distributions.monte_carlo import has_atom
from sqs_pyro.distributions.sharded_tensor import anywhere
from sqs_pyro.distributions.temperatures import Temperatures, check_temperatures
from sqs_pyro.errors import ArgumentError, NetworkError
from sqs_pyro.inference.called import PyroCallable
from sqs_pyro.inference.guides.batch_norm import warn_of_batch_norm
from sqs_pyro.inference.guides.checks import (
    DRAWING,
    HARD,
    check_arguments,
    check_components,
    check_like_sites,
    check_support,
    check_zero,
    initial_values,
)
from sqs_pyro.inference.guides.evidence import prior_logits
from sqs_pyro.inference.guides.inclusion import InclusionGuide
from sqs_pyro.inference.guides.joint_coding import code_together
from sqs_pyro.inference.guides.posterior import PosteriorGuide
from sqs_pyro.inference.guides.progress import GuideProgress, Stage
from sqs_pyro.inference.guides.site import Grid, Groups, SiteGuide, Zero
from sqs_pyro.inference.guides.site_rows import SiteRows
from sqs_pyro.inference.guides.windows import PerWeight, Windows
from sqs_pyro.models.prediction import guide_predicts
from sqs_pyro.packing import CodedTensor

Estimator = Literal["local", "pathwise", "one_hot", "straight_through", "ttq", "lsq", "soft", "concrete"]

_OF_ALL_WEIGHTS = (
    "This needs all weights of a site, but ranks have rows of each (shard_sites): gather the guide's state dict "
    "(full_tensor() of each DTensor), and load it into a guide of a model that is not divided."
)
_LEAST_OPEN_LOGIT = 1e-3  # of the gate: λ = 0.50025


class SpikeGMMGuide(PosteriorGuide):
    """Spike-and-mixture guide at every site of a model; as it stands, a posterior to infer and to draw from.

    Stage ``"dense"`` is inference: ``q(θ_i) = (1-λ_i) δ_0 + λ_i N(w_i, s_i²)``, a gate and a width for each
    weight, which the ELBO trains by draws of q. :meth:`start_coding` makes codebooks of it, and in the stages
    ``"coded"`` and ``"frozen"``, which settle what ships, ``q(θ_i) = (1-λ_i) δ_0 + λ_i Σ_k φ_ik N(μ_k, σ_k²)``
    with components from 1-D K-means.

    In training mode a draw is made by ``estimator``. In evaluation mode (``guide.eval()``), and whenever
    ``pyro.infer.Predictive`` asks, it is an exact one of q in the dense stage; later, a discrete network (gates
    and codes drawn, slab noise left out), at :meth:`evaluation_temperatures`: what Bayesian averaging averages.

    Args:
        model: a :class:`~sqs_pyro.models.BayesianNetwork`, or any Pyro model together with ``init``.
        num_components: K, 1 to 256; or that of each site, by name.
        windows: how weights share responsibilities.
        temperature: τ of the responsibilities in training; an ordinary attribute, so a schedule can set it.
        evaluation_temperature: what the logits of codes *and* gates are divided by in evaluation mode: 1 draws
            from the posterior as its logits say, towards 0 draws become the hard network. By default codes are
            drawn at ``temperature`` and gates at ``gate_temperature``, as in training. Of ``"one_hot"`` draws it
            multiplies the variances, by default 1.
        evaluation_gate_temperature: of the gates alone, in place of ``evaluation_temperature``.
        gate_temperature: s in ``λ = sigmoid(g / s)``.
        estimator: ``"local"`` (draws of q, linear and convolutional layers output by output) and ``"pathwise"``
            (draws of q with unbiased gradients of higher variance) train the ELBO of q, widths and gates included.
            ``"straight_through"`` (hard value forward, identity gradient to survivors' latents; σ and π stay as
            K-means found them; ``"ttq"`` and ``"lsq"`` have the gradients of these methods instead), ``"soft"``
            (the expectation) and ``"concrete"`` (Gumbel-softmax codes and relaxed gates) train the network that
            ships, and ``"one_hot"`` what is drawn around it: the first of these with the components' widths, in
            training and evaluation mode. See :class:`~sqs_pyro.distributions.SpikeGMM`.
        groups: weights that share a codebook: ``"layer"``, ``"channel"`` (first dimension), or the number of
            consecutive weights of a tile.
        init: pretrained value of each site, by site name; by default ``model.site_values()``.
        coded: codes, mask and codebook that a site starts from instead of K-means, by site name; they also say its
            ``num_components`` and ``groups``. Codes follow latents from the first step on, so latents that they
            are not of (``init``) give others.
        grid: ``"free"`` codewords, or ``"uniform"``: whole numbers times a step of each codebook, which learns.
        zero: ``"gate"``: closed gates say which weights are zero. ``"codeword"``: zero is one more codeword, which
            responsibilities, or the nearest, give to weights; gates stay open. A number t below 1, with two
            ``num_components``: weights of at most t times the largest of their codebook are zero, the others have
            the codeword of their sign.
        initial_gate: g at the start.
        init_scale: widths s at the start, in units of the layer's root mean square weight.
        refresh_every: draws between two renewals of cached hard codes in training.
        spike_scale: standard deviation of a Gaussian spike in place of the point mass at zero, for priors without
            an atom. By default such a site of a ``BayesianNetwork`` takes the width of its prior's spike or, if
            that has none, of its own components; a plain Pyro model with such priors must give it.
        stage: to start in: ``"dense"``, ``"coded"`` or ``"frozen"``. None is dense for the estimators that draw
            from q, unless ``coded`` is given, and coded for the others.

    Raises:
        ArgumentError: an impossible value.
        NetworkError: a layer with fewer weights a codebook than components, a prior that excludes some values, or
            no ``init``.
    """

    def __init__(
        self,
        model: PyroCallable,
        num_components: int | Mapping[str, int] = 16,
        windows: Windows | None = None,
        temperature: float = 0.1,
        *,
        evaluation_temperature: float | None = None,
        evaluation_gate_temperature: float | None = None,
        gate_temperature: float = 1.0,
        estimator: Estimator = "local",
        groups: Groups = "layer",
        init: Mapping[str, Tensor] | None = None,
        coded: Mapping[str, CodedTensor] | None = None,
        grid: Grid = "free",
        zero: Zero = "gate",
        initial_gate: float = 5.0,
        init_scale: float = 0.1,
        refresh_every: int = 1,
        spike_scale: float | None = None,
        stage: Stage | None = None,
    ) -> None:
        super().__init__(model)
        check_arguments(windows, estimator, refresh_every, spike_scale, init_scale, initial_gate, init, coded)
        check_temperatures(
            ("temperature", "gate_temperature"),
            temperature=temperature,
            evaluation_temperature=evaluation_temperature,
            evaluation_gate_temperature=evaluation_gate_temperature,
            gate_temperature=gate_temperature,
        )
        values = initial_values(model, init)  # by site, in the order in which the model samples
        check_components(num_components, values)
        zero = check_zero(zero, num_components, estimator, grid, coded)
        if grid not in ("free", "uniform") or (grid == "uniform" and coded):
            beside = " beside coded, whose codewords are what they are" if coded else ""
            raise ArgumentError(f"grid is {grid!r}{beside}, but must be {'free' if coded else 'free or uniform'}.")
        unknown = sorted(set(coded or ()) - set(values))
        if unknown:
            raise NetworkError(
                f"There is no site '{unknown[0]}' to start as coded: sites are {', '.join(values)}."
            )
        draws = estimator in DRAWING
        if stage is None:
            stage = "dense" if draws and coded is None else "coded"
        priors = getattr(model, "priors", {})  # of a plain Pyro model nothing is known
        self.num_components = dict(num_components) if isinstance(num_components, Mapping) else num_components
        self.grid, self.zero = grid, zero
        self.estimator = estimator
        self.temperature = temperature
        self.evaluation_temperature = evaluation_temperature
        self.evaluation_gate_temperature = evaluation_gate_temperature
        self.gate_temperature = gate_temperature
        self.refresh_every = refresh_every
        # Ranks among which the model's sites are divided: this guide's are, too.
        self.mesh: Any = getattr(model, "mesh", None)
        self.sites = PyroModule[nn.ModuleDict]()
        for name, value in values.items():
            if hasattr(value, "full_tensor"):  # one site at a time is whole
                value = value.full_tensor()
            start = (coded or {}).get(name)
            # Inference takes biases and other small tensors along: codebooks of as many values as they have.
            components = self._components(name)
            if stage == "dense" and draws:
                components = min(components, value.numel())
            site = SiteGuide(
                name, value, components, groups, windows or PerWeight(), initial_gate, start, grid, zero
            )
            prior = getattr(priors.get(name), "base_dist", None)  # of single weights: to_event is taken off
            check_support(name, prior, value)
            # Against a density a point mass has an infinite KL: the spike takes a width of its own.
            if spike_scale is not None or (prior is not None and not has_atom(prior)):
                site.spread_spike(getattr(prior, "spike_scale", None) if spike_scale is None else spike_scale)
            site.learn_shape(estimator not in HARD)
            if stage == "dense" and draws:
                site.learn_widths(init_scale)
            self.sites[_key(name)] = site if self.mesh is None else SiteRows.keep(site, self.mesh)
        self.inclusions = PyroModule[nn.ModuleDict]()
        for name, hyper in model.hyper_priors().items() if hasattr(model, "hyper_priors") else ():
            inclusion = InclusionGuide(name, hyper.distribution, hyper.sites)
            self._fit_inclusion(inclusion)  # to the gates at the start, which need the sites above
            self.inclusions[_key(name)] = inclusion
        # The stage is a buffer of a module of its own: state dicts and Pyro's store carry it with the parameters.
        self.progress = GuideProgress(stage)
        self._codes_are_held = self._warned = self._counts_once = False
        self._hold_codes()
        self.register_load_state_dict_post_hook(_hold_loaded_codes)  # a loaded stage decides what learns
        if hasattr(model, "bind_codebooks"):
            model.bind_codebooks(self.codebook)  # a learned prior reads the components as they are at each step

    @property
    def stage(self) -> Stage:
        """``"dense"``, ``"coded"`` or ``"frozen"``."""
        return self.progress.stage

    @stage.setter
    def stage(self, stage: Stage) -> None:
        self.progress.stage = stage

    @property
    def draws(self) -> int:
        """Draws in training so far, which say when codes are renewed."""
        return self.progress.draws

    @draws.setter
    def draws(self, draws: int) -> None:
        self.progress.draws = draws

    @property
    def site_names(self) -> tuple[str, ...]:
        """Names of the sites whose weights it draws, in the model's order."""
        return tuple(self.own_sites())

    def site_guides(self) -> dict[str, SiteGuide]:
        """Return the parts of the guide by site name, in the model's order.

        Raises:
            NetworkError: this rank has rows of them alone.
        """
        if self.mesh is not None:
            raise NetworkError(_OF_ALL_WEIGHTS)
        return self.own_sites()

    def own_sites(self) -> dict[str, SiteGuide]:
        """Return the parts of the guide by site name: of rows, where ranks share sites."""
        return {site.site_name: site for site in self.sites.values()}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every site's weights, after the model's hyper-sites; the arguments are the model's and not used."""
        self._hold_codes()  # a stage may have been loaded into Pyro's store since the last draw
        # Temperatures are plain attributes that schedules set: checked where they are used.
        check_temperatures(temperature=self.temperature, gate_temperature=self.gate_temperature)
        if not self._counts_once:
            self._count_draw()
        if self.stage == "dense" and guide_predicts() and not self._warned:
            self._warned = True  # once: an average calls this for every draw of every minibatch
            warn_of_batch_norm(self.model, self)
        infer = {} if self.mesh is None else {"mesh": self.mesh}  # whose rows make up the site
        return {
            name: pyro.sample(name, drawn, infer=dict(infer)) for name, drawn in self.site_distributions().items()
        }

    @contextmanager
    def counted_once(self) -> Iterator[None]:
        """Count the draws of the body as one: those of one step, for the parts of a minibatch."""
        self._hold_codes()
        self._count_draw()
        self._counts_once = True
        try:
            yield
        finally:
            self._counts_once = False

    def _count_draw(self) -> None:
        if self._trains() and self.stage == "coded" and self.estimator in HARD:
            # Hard codes follow the latents every few draws only: an argmax over K of every weight takes its time.
            if self.draws % self.refresh_every == 0:
                for site in self.own_sites().values():
                    site.refresh_codes()
            self.draws += 1

    def site_distributions(self) -> dict[str, TorchDistribution]:
        """Return what a call samples, by name of site and in this order."""
        # Before the weights: their prior depends on these.
        drawn: dict[str, TorchDistribution] = {
            inclusion.site_name: inclusion.distribution() for inclusion in self.inclusions.values()
        }
        sites = self.own_sites().items()
        return drawn | {name: self.distribution(site).to_event(len(site.shape)) for name, site in sites}

    def distribution(self, site: SiteGuide) -> CodebookGMM | LatentSpikeAndSlab:
        """Return the variational distribution of one site at the guide's present stage, mode and temperatures."""
        if self.estimator == "one_hot":
            if self._trains():
                return site.one_hot_distribution(1.0, "local", self.stage != "dense")
            return self._one_hot(site)
        if self.stage == "dense":
            return site.dense_distribution(self.gate_temperature, self.estimator if self._trains() else "pathwise")
        if not self._trains():
            return site.coded_distribution(self.evaluation_temperatures(), "discrete")
        # Frozen codes are the shipped network's: whatever came before, it is trained as it will be.
        estimator = "straight_through" if self.stage == "frozen" else self.estimator
        codes = site.codes if estimator in HARD else None  # others take φ itself, or draw
        return site.coded_distribution(Temperatures(self.temperature, self.gate_temperature), estimator, codes)

    def _one_hot(self, site: SiteGuide, temperature: float | None = None) -> LatentSpikeAndSlab:
        temperature = temperature or self.evaluation_temperature or 1.0
        return site.one_hot_distribution(temperature, "pathwise", self.stage != "dense")

    @property
    def _draws_codes(self) -> bool:
        """Whether a draw of q is a discrete network."""
        return self.stage != "dense" and self.estimator != "one_hot"

    def _trains(self) -> bool:
        return self.training and not guide_predicts()  # Predictive never calls eval()

    def _components(self, name: str) -> int:
        own = self.num_components
        return own[name] if isinstance(own, dict) else own

    def codebook(self, name: str) -> Codebook:
        """Return the codebook of a site, which a learned prior shares."""
        return self.own_sites()[name].codebook()

    def evaluation_temperatures(
        self, temperature: float | None = None, gate_temperature: float | None = None
    ) -> Temperatures:
        """Return what logits are divided by in evaluation mode.

        Args:
            temperature: in place of ``evaluation_temperature``, for codes and, times s, for gates.
            gate_temperature: in place of ``evaluation_gate_temperature``, for gates alone.

        Raises:
            ArgumentError: one that is not above 0.
        """
        check_temperatures(temperature=temperature, gate_temperature=gate_temperature)
        # An argument comes first, then the guide's evaluation temperature, then that of training.
        temperature = temperature or self.evaluation_temperature  # `or`: none of them is 0
        gate_temperature = gate_temperature or self.evaluation_gate_temperature
        return Temperatures(
            temperature or self.temperature, gate_temperature or self.gate_temperature * (temperature or 1.0)
        )

    def fit_inclusions(self) -> None:
        """Set the posteriors of random inclusion probabilities to their optimum for the present gates."""
        for inclusion in self.inclusions.values():
            self._fit_inclusion(inclusion)

    def _fit_inclusion(self, inclusion: InclusionGuide) -> None:
        sites = self.site_guides()
        inclusion.fit(sites[name].gates(self.gate_temperature) for name in inclusion.weight_sites)

    def start_coding(self, fit_codebooks: bool = True) -> None:
        """End the warm-up: fit codebooks to the weights that survived pruning, or keep those there are."""
        # Codebooks there are already came with `coded`, or were fitted on the way.
        for site in self.own_sites().values() if fit_codebooks else ():
            site.fit_codebook()
        self.stage = "coded"

    def freeze_codes(self) -> None:
        """From here on codes and gates stay as they are; only codebooks (and other parameters) learn."""
        for site in self.own_sites().values():
            site.refresh_codes()  # of the latents as they are now, which from here on do not move
        self.resume("frozen", self.draws)

    def resume(self, stage: Stage, draws: int) -> None:
        """Continue in ``stage`` after ``draws`` draws, with the state that was loaded."""
        self.stage, self.draws = stage, draws
        self._hold_codes()

    def take_loaded(self) -> None:
        """Take over as every :class:`OwningModule`; a stage that was loaded says what learns."""
        super().take_loaded()
        self._hold_codes()

    def _hold_codes(self) -> None:
        """Let latents and gates learn, or not: they do not while codes are frozen."""
        held = self.stage == "frozen"
        if held != self._codes_are_held:  # asked at every draw, written once
            self._codes_are_held = held
            for site in self.own_sites().values():
                site.latent_unconstrained.requires_grad_(not held)
                site.gate_logit_unconstrained.requires_grad_(not held)

    @torch.no_grad()
    def saliencies(
        self, kind: str = "magnitude", input_scales: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the importance of every weight, each of its site's shape: a ``DTensor`` where ranks share sites.

        Args:
            kind: ``"gate"`` is λ (the paper's), ``"magnitude"`` is ``λ |w|``, ``"activation"`` is ``λ |w| s``.
            input_scales: s of each site, in a shape that broadcasts: root mean square of what each weight
                multiplies (:class:`~sqs_pyro.compression.finetune.input_scales.InputScales`); on ranks that share
                sites rank 0's.

        Raises:
            ArgumentError: an unknown kind, or ``"activation"`` without ``input_scales``.
        """
        if kind not in ("gate", "magnitude", "activation"):
            raise ArgumentError(f"Saliency {kind!r} is unknown: use 'gate', 'magnitude' or 'activation'.")
        if kind == "activation" and input_scales is None:
            raise ArgumentError("Saliency 'activation' needs input_scales, which only the network's inputs tell.")
        found = {}
        for name, site in self.own_sites().items():
            # The gate without its mask: a weight that was pruned can come back while the schedule runs.
            values = torch.sigmoid(site.gate_logit / self.gate_temperature)
            if kind != "gate":
                values = values * site.latent.abs()
            if kind == "activation" and input_scales is not None:
                values = values * site.beside(input_scales[name])
            found[name] = site.placed(values)
        return found

    @torch.no_grad()
    def prune(self, masks: Mapping[str, Tensor]) -> None:
        """Set the gates of weights whose mask is False to exactly 0.

        Args:
            masks: by site name, each of its site's shape, of bool or of zeros and ones; where ranks share sites
                divided as saliencies are.

        Raises:
            NetworkError: a mask is of no site, of another shape, or divided otherwise.
            ArgumentError: it holds something else than zeros and ones.
        """
        guides = self.own_sites()
        own = {name: site.placed(site.mask) for name, site in guides.items()}
        for name, mask in masks.items():
            check_like_sites("mask", name, mask, own)
            if mask.dtype is not torch.bool and anywhere((mask != 0) & (mask != 1)):
                raise ArgumentError(
                    f"The mask of '{name}' holds other values than 0 and 1: compare it with a threshold."
                )
        for name, mask in masks.items():  # all are right: none is set before
            # Copied: the caller's tensor may change; assigned, so that Pyro's store shows the new mask.
            guides[name].mask = mask.to(guides[name].mask.device, torch.bool, copy=True)

    @torch.no_grad()
    def hold_gates_open(self) -> None:
        """Raise closed gates to just above ½; those of pruned weights stay exactly 0."""
        for site in self.own_sites().values():  # in place, so that optimizers keep the parameter they know
            site.gate_logit_unconstrained.clamp_(min=_LEAST_OPEN_LOGIT * self.gate_temperature)

    def nonzero_rate(self) -> float:
        """Return the share of weights that are not zero: gate open (above ½), and codeword not 0."""
        sites = list(self.own_sites().values())
        # As `harden` counts: a drawn network's share of non-zeros is the mean of the gates instead.
        kept = sum(int(site.gathered(site.kept(self.gate_temperature).sum()).sum()) for site in sites)
        return kept / sum(site.placed(site.mask).numel() for site in sites)

    def harden(self, codebook_dtype: torch.dtype = torch.float16) -> dict[str, CodedTensor]:
        """Return the most probable network, weight by weight: what is shipped.

        Args:
            codebook_dtype: codewords are rounded to this type, so that the file holds them exactly; a codebook
                whose values do not survive that (beyond 65504 or below 6e-8 in float16) stays float32.
        """
        self._check_coded()
        keep_codes = self.stage == "frozen"  # what was trained is what ships; before, codes follow the latents
        return {name: site.harden(codebook_dtype, keep_codes) for name, site in self.own_sites().items()}

    def draw(
        self,
        temperature: float | None = None,
        gate_temperature: float | None = None,
        codebook_dtype: torch.dtype = torch.float16,
    ) -> dict[str, CodedTensor]:
        """Draw a discrete network from the posterior: as a call in evaluation mode, but codes and gates.

        Args:
            temperature, gate_temperature: see :meth:`evaluation_temperatures`.
            codebook_dtype: codewords are rounded to this type.
        """
        self._check_coded()
        temperatures = self.evaluation_temperatures(temperature, gate_temperature)
        return {name: site.draw(codebook_dtype, temperatures) for name, site in self.site_guides().items()}

    @torch.no_grad()
    def draw_weights(
        self, num_samples: int, temperature: float | None = None, gate_temperature: float | None = None
    ) -> list[dict[str, Tensor]]:
        """Draw networks' weights from the posterior, by site name: of q itself while it is dense, then discrete.

        Args:
            num_samples: S.
            temperature, gate_temperature: see :meth:`get_posterior`.
        """
        if not self._draws_codes:
            q = self.get_posterior(temperature=temperature, gate_temperature=gate_temperature)
            drawn_values = {name: q[name].sample(torch.Size([num_samples])) for name in self.site_names}
            return [{name: values[s] for name, values in drawn_values.items()} for s in range(num_samples)]
        drawn = self.draw_networks(num_samples, temperature, gate_temperature, torch.float32)
        places = {name: site.latent.device for name, site in self.site_guides().items()}  # codes are the CPU's
        return [{name: coded.dense().to(places[name]) for name, coded in draw.items()} for draw in drawn]

    def draw_networks(
        self,
        num_samples: int,
        temperature: float | None = None,
        gate_temperature: float | None = None,
        codebook_dtype: torch.dtype = torch.float16,
    ) -> list[dict[str, CodedTensor]]:
        """Draw discrete networks that share codebooks: while the guide is dense, draws of q coded together.

        Args:
            num_samples: S.
            temperature, gate_temperature: see :meth:`get_posterior`.
            codebook_dtype: codewords are rounded to this type.
        """
        if not self._draws_codes:
            drawn = self.draw_weights(num_samples, temperature, gate_temperature)
            return self.code_together(drawn, codebook_dtype)
        return [self.draw(temperature, gate_temperature, codebook_dtype) for _ in range(num_samples)]

    def code_together(
        self, draws: Sequence[Mapping[str, Tensor]], codebook_dtype: torch.dtype
    ) -> list[dict[str, CodedTensor]]:
        """Return drawn weights in codes of one codebook of K components a group.

        Args:
            draws: weights by site name.
            codebook_dtype: codewords are rounded to this type.
        """
        sites = self.site_guides()
        coded = {  # of K, and not of a site's own number: a bias of one weight has many draws
            name: code_together(
                [draw[name] for draw in draws], self._components(name), site.num_groups, codebook_dtype
            )
            for name, site in sites.items()
        }
        return [{name: coded[name][s] for name in sites} for s in range(len(draws))]

    def get_posterior(
        self,
        *args: Any,
        temperature: float | None = None,
        gate_temperature: float | None = None,
        **kwargs: Any,
    ) -> dict[str, TorchDistribution]:
        """Return q of every site by name, single weights in the site's shape, and of random inclusions.

        Args:
            temperature, gate_temperature: see :meth:`evaluation_temperatures`; while the guide is dense, they are
                of gates alone, and by default those of training.
        """
        check_temperatures(temperature=temperature, gate_temperature=gate_temperature)
        posterior: dict[str, TorchDistribution] = {
            inclusion.site_name: inclusion.distribution() for inclusion in self.inclusions.values()
        }
        for name, site in self.site_guides().items():
            if self.estimator == "one_hot":
                posterior[name] = self._one_hot(site, temperature)
            elif self.stage == "dense":
                of_gates = gate_temperature or self.gate_temperature * (temperature or 1.0)
                posterior[name] = site.dense_distribution(of_gates, "pathwise")
            else:
                temperatures = self.evaluation_temperatures(temperature, gate_temperature)
                posterior[name] = site.coded_distribution(temperatures, "pathwise")
        return posterior

    @torch.no_grad()
    def evidence(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the data's evidence for each weight, ``logit λ - logit λ₀``, by site name.

        It is the logarithm of the Bayes factor of the weight being non-zero against being zero: at 0 the data say
        nothing, below 0 they speak for zero. Weights that a schedule has pruned have minus infinity.

        Args:
            *args, **kwargs: of the model, which a plain Pyro model is called with to see its priors.

        Raises:
            NetworkError: a prior has no inclusion probability.
        """
        sites = self.site_guides()
        prior = prior_logits(self.model, self.inclusions, list(sites), args, kwargs)
        found = {name: site.gate_logit / self.gate_temperature - prior[name] for name, site in sites.items()}
        return {name: value.masked_fill(~sites[name].mask, -torch.inf) for name, value in found.items()}

    def _check_coded(self) -> None:
        if self.stage == "dense":
            raise NetworkError(
                "The guide is still in its dense stage, without codes: "
                "call start_coding() before pack(), harden() or draw()."
            )


def _hold_loaded_codes(guide: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(guide, SpikeGMMGuide)
    guide._hold_codes()


def _key(name: str) -> str:
    """Return a site's key in a ModuleDict, which allows no point, nor a name that the dictionary has itself."""
    key = name.replace(".", "/")
    return f"{key}/" if hasattr(nn.ModuleDict, key) else key
