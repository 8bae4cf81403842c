"""The variational family over a network: a spike-and-GMM guide for every compressed tensor."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import pyro
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from sqs_pyro.distributions import CodebookGMM, LatentSpikeAndSlab
from sqs_pyro.errors import NetworkError, RecipeError
from sqs_pyro.inference.kmeans import kmeans_1d
from sqs_pyro.inference.windows import PerWeight, Windows
from sqs_pyro.packing import CodedTensor

#: ``"dense"``: latents without a codebook (warm-up); ``"coded"``: codes follow the latents; ``"frozen"``:
#: codes and gates stay, only codebooks learn.
Stage = Literal["dense", "coded", "frozen"]
Estimator = Literal["straight_through", "soft", "concrete"]
Groups = Literal["layer", "channel"] | int

_LEAST_OPEN_LOGIT = 1e-3  # of the gate: λ = 0.50025


class SiteGuide(PyroModule):
    """The variational parameters of one site and the distribution they make.

    Attributes:
        latent: latent weights w, the site's shape.
        gate_logit: g, the site's shape; ``λ = sigmoid(g / gate_temperature)`` where ``mask``, else 0.
        loc, scale, mixing_logits: the codebook of each group, ``[G, K]``; ``π = softmax(mixing_logits)``.
        mask: weights that pruning has left, bool, the site's shape.
        codes: hard codes, uint8 ``[G, n]``; renewed by :meth:`refresh_codes`.
        anchor: what responsibilities are computed from: ``latent`` or its window's mean.
    """

    mask: Tensor
    codes: Tensor
    edges: Tensor

    def __init__(
        self,
        name: str,
        weight: Tensor,
        num_components: int,
        groups: Groups,
        windows: Windows,
        initial_gate: float,
    ) -> None:
        super().__init__()
        self.site_name = name
        self.shape = weight.shape
        self.num_groups = _num_groups(name, weight.shape, groups)
        self.num_components = num_components
        self.windows = windows
        per_group = weight.numel() // self.num_groups
        if per_group < num_components:
            raise NetworkError(
                f"Layer '{name}' has {per_group} weights a codebook, fewer than num_components={num_components}: "
                "use fewer components, larger groups, or exclude the layer."
            )
        initial = weight.detach().clone().float()
        self.latent = PyroParam(initial, constraints.real)
        self.gate_logit = PyroParam(torch.full_like(initial, initial_gate), constraints.real)
        self.register_buffer("mask", torch.ones_like(initial, dtype=torch.bool))
        self.register_buffer(
            "codes", torch.zeros(self.num_groups, per_group, dtype=torch.uint8, device=weight.device)
        )
        self.register_buffer("edges", initial.new_empty(0))
        codebook = initial.new_zeros(self.num_groups, num_components)
        self.loc = PyroParam(codebook, constraints.real)
        self.scale = PyroParam(codebook + 1.0, constraints.positive)
        self.mixing_logits = PyroParam(codebook.clone(), constraints.real)
        self.fit_codebook()

    def gates(self, gate_temperature: float = 1.0) -> Tensor:
        """λ, the site's shape: posterior inclusion probabilities, exactly 0 for pruned weights."""
        return torch.sigmoid(self.gate_logit / gate_temperature) * self.mask

    def grouped(self, value: Tensor) -> Tensor:
        """A tensor of the site's shape as ``[G, n]``."""
        return value.reshape(self.num_groups, -1)

    def anchor(self) -> Tensor:
        """The latents as their windows represent them, the site's shape."""
        return self.windows.represent(self.latent, self.edges)

    @torch.no_grad()
    def fit_codebook(self) -> None:
        """K-means of the surviving latents, window edges and codes anew."""
        survivors = self.latent[self.mask]
        self.edges = self.windows.edges(survivors if survivors.numel() else self.latent)
        codebook = kmeans_1d(
            self.grouped(self.anchor()), self.num_components, self.grouped(self.mask).to(self.latent.dtype)
        )
        self.loc, self.scale, self.mixing_logits = codebook.loc, codebook.scale, codebook.mixing.log()
        self.refresh_codes()

    def learn_shape(self, learn: bool) -> None:
        """Whether σ and π learn by gradient, or stay as K-means found them.

        The straight-through value does not depend on σ and π. Only the KL would move them: σ towards the
        prior's width and π towards the component with the smallest KL, with nothing to hold against it, and
        the hard codes would follow.
        """
        self.scale_unconstrained.requires_grad_(learn)
        self.mixing_logits_unconstrained.requires_grad_(learn)

    @torch.no_grad()
    def refresh_codes(self) -> None:
        """Give each weight its most probable component."""
        self.codes.copy_(self.most_probable_codes())

    def most_probable_codes(self) -> Tensor:
        """``argmax_k φ_k`` of each weight, uint8 ``[G, n]``."""
        return self.coded_distribution(1.0, 1.0, "straight_through").map_codes()

    def dense_distribution(self, gate_temperature: float) -> LatentSpikeAndSlab:
        """Warm-up: the slab is a Gaussian around the weight's own latent, as wide as a codebook component."""
        scale = self.scale.mean(1, keepdim=True).detach().expand(self.codes.shape).reshape(self.shape)
        return LatentSpikeAndSlab(self.gates(gate_temperature), self.latent, scale, validate_args=False)

    def coded_distribution(
        self, temperature: float, gate_temperature: float, estimator: str, codes: Tensor | None = None
    ) -> CodebookGMM:
        """Spike-and-GMM over the site's weights."""
        return CodebookGMM(
            self.gates(gate_temperature),
            self.latent,
            self.loc,
            self.scale,
            self.mixing_logits.log_softmax(-1),
            anchor=self.anchor(),
            codes=codes,
            temperature=temperature,
            estimator=estimator,
            validate_args=False,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Window edges differ in number from fit to fit: take the number that was saved."""
        saved = state_dict.get(prefix + "edges")
        if saved is not None:
            self.edges = self.edges.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def harden(self, codebook_dtype: torch.dtype, keep_codes: bool) -> CodedTensor:
        """The most probable network's weights: gate above ½ or zero, most probable component's mean.

        Args:
            codebook_dtype: codewords are rounded to this type.
            keep_codes: use ``codes`` as they are; else the latents' most probable components.
        """
        mask = self.gates() > 0.5
        codes = self.codes if keep_codes else self.most_probable_codes()
        codes = codes.view(self.shape).masked_fill(~mask, 0)
        codebook = self.loc.detach().to(codebook_dtype, copy=True).float()
        return CodedTensor(codes.cpu(), mask.cpu(), codebook.cpu())


class SpikeGMMGuide(PyroModule):
    """Spike-and-GMM guide: ``q(θ_i) = (1-λ_i) δ_0 + λ_i Σ_k φ_ik N(μ_k, σ_k²)`` at every site of a model.

    Codebooks are initialised by 1-D K-means of the pretrained weights. In training mode a draw is made by
    ``estimator``; in evaluation mode (``guide.eval()``) it is a discrete network (gates and codes drawn, slab
    noise left out), at ``evaluation_temperature``: what Bayesian averaging averages.

    Args:
        model: a :class:`~sqs_pyro.models.BayesianNetwork`, or any Pyro model together with ``init``.
        num_components: K, 1 to 256.
        windows: how weights share responsibilities.
        temperature: τ of the responsibilities in training; an ordinary attribute, so a schedule can set it.
        evaluation_temperature: τ of codes drawn in evaluation mode; by default ``temperature``.
        gate_temperature: s in ``λ = sigmoid(g / s)``.
        estimator: ``"straight_through"`` (hard value forward, identity gradient to survivors' latents; σ and π
            stay as K-means found them), ``"soft"`` (the expectation) or ``"concrete"`` (Gumbel-softmax codes and
            relaxed gates).
        groups: weights that share a codebook: ``"layer"``, ``"channel"`` (first dimension), or the number of
            consecutive weights of a tile.
        init: pretrained value of each site, by site name; by default ``model.site_values()``.
        initial_gate: g at the start.
        refresh_every: draws between two renewals of cached hard codes in training.

    Raises:
        RecipeError: an impossible value.
        NetworkError: a layer with fewer weights a codebook than components, or no ``init``.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_components: int = 16,
        windows: Windows | None = None,
        temperature: float = 0.1,
        *,
        evaluation_temperature: float | None = None,
        gate_temperature: float = 1.0,
        estimator: Estimator = "straight_through",
        groups: Groups = "layer",
        init: Mapping[str, Tensor] | None = None,
        initial_gate: float = 5.0,
        refresh_every: int = 1,
        stage: Stage = "coded",
    ) -> None:
        super().__init__()
        _check_arguments(
            num_components, temperature, evaluation_temperature, gate_temperature, estimator, refresh_every, stage
        )
        if windows is not None and not isinstance(windows, Windows):
            raise RecipeError(
                f"windows is {windows!r}, but must be a strategy such as PerWeight() or EqualMass(256)."
            )
        values = _initial_values(model, init)
        self.stage: Stage
        self.draws: int
        self._model = (model,)  # in a tuple: a reference, not a submodule whose parameters would be the guide's
        self.estimator = estimator
        self.temperature = temperature
        self.evaluation_temperature = evaluation_temperature
        self.gate_temperature = gate_temperature
        self.refresh_every = refresh_every
        self.sites = PyroModule[nn.ModuleDict]()
        for name, value in values.items():
            site = SiteGuide(name, value, num_components, groups, windows or PerWeight(), initial_gate)
            site.learn_shape(estimator != "straight_through")
            self.sites[name.replace(".", "/")] = site
        self.resume(stage, draws=0)

    @property
    def model(self) -> Callable[..., Any]:
        """The model this guide was made for."""
        return self._model[0]

    def site_guides(self) -> dict[str, SiteGuide]:
        """The parts of the guide by site name, in the model's order."""
        return {site.site_name: site for site in self.sites.values()}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every site's weights; the arguments are the model's and are not used."""
        if self.training and self.stage == "coded" and self.estimator == "straight_through":
            if self.draws % self.refresh_every == 0:
                for site in self.site_guides().values():
                    site.refresh_codes()
            self.draws += 1
        return {
            name: pyro.sample(name, self.distribution(site).to_event(len(site.shape)))
            for name, site in self.site_guides().items()
        }

    def distribution(self, site: SiteGuide) -> CodebookGMM | LatentSpikeAndSlab:
        """The variational distribution of one site at the guide's present stage, mode and temperatures."""
        if self.stage == "dense":
            return site.dense_distribution(self.gate_temperature)
        if not self.training:
            temperature = self.evaluation_temperature or self.temperature
            return site.coded_distribution(temperature, self.gate_temperature, "discrete")
        # Frozen codes are the shipped network's: whatever came before, it is trained as it will be.
        estimator = "straight_through" if self.stage == "frozen" else self.estimator
        codes = site.codes if estimator == "straight_through" else None
        return site.coded_distribution(self.temperature, self.gate_temperature, estimator, codes)

    def start_coding(self) -> None:
        """End the warm-up: fit codebooks to the weights that survived pruning."""
        for site in self.site_guides().values():
            site.fit_codebook()
        self.stage = "coded"

    def freeze_codes(self) -> None:
        """From here on codes and gates stay as they are; only codebooks (and other parameters) learn."""
        for site in self.site_guides().values():
            site.refresh_codes()
        self.resume("frozen", self.draws)

    def resume(self, stage: Stage, draws: int) -> None:
        """Continue in ``stage`` after ``draws`` draws, with the state that was loaded."""
        self.stage, self.draws = stage, draws
        if stage == "frozen":
            for site in self.site_guides().values():
                site.latent_unconstrained.requires_grad_(False)
                site.gate_logit_unconstrained.requires_grad_(False)

    @torch.no_grad()
    def saliencies(self, kind: str = "magnitude") -> dict[str, Tensor]:
        """Importance of every weight: ``"gate"`` is λ (the paper's), ``"magnitude"`` is ``λ |w|``."""
        if kind not in ("gate", "magnitude"):
            raise RecipeError(f"Saliency {kind!r} is unknown: use 'gate' or 'magnitude'.")
        return {
            name: torch.sigmoid(site.gate_logit / self.gate_temperature)
            * (site.latent.abs() if kind == "magnitude" else 1.0)
            for name, site in self.site_guides().items()
        }

    @torch.no_grad()
    def prune(self, masks: Mapping[str, Tensor]) -> None:
        """Set the gates of weights whose mask is False to exactly 0."""
        guides = self.site_guides()
        for name, mask in masks.items():
            guides[name].mask.copy_(mask)

    @torch.no_grad()
    def hold_gates_open(self) -> None:
        """Raise closed gates to just above ½; those of pruned weights stay exactly 0."""
        for site in self.site_guides().values():
            site.gate_logit_unconstrained.clamp_(min=_LEAST_OPEN_LOGIT * self.gate_temperature)

    def nonzero_rate(self) -> float:
        """Share of weights whose gate is open (above ½)."""
        sites = list(self.site_guides().values())
        kept = sum(int((site.gates(self.gate_temperature) > 0.5).sum()) for site in sites)
        return kept / sum(site.mask.numel() for site in sites)

    def harden(self, codebook_dtype: torch.dtype = torch.float16) -> dict[str, CodedTensor]:
        """The most probable network, weight by weight: what is shipped.

        Args:
            codebook_dtype: codewords are rounded to this type, so that the file holds them exactly.
        """
        if self.stage == "dense":
            raise NetworkError("The guide is still in its dense stage: call start_coding() before harden().")
        keep_codes = self.stage == "frozen"
        return {name: site.harden(codebook_dtype, keep_codes) for name, site in self.site_guides().items()}


def _num_groups(name: str, shape: torch.Size, groups: Groups) -> int:
    if groups == "layer":
        return 1
    if groups == "channel":
        return shape[0]
    if not isinstance(groups, int) or groups < 1 or shape.numel() % groups:
        raise RecipeError(
            f"groups={groups!r} does not fit layer '{name}' of {shape.numel()} weights: use 'layer', 'channel', "
            "or a tile size that divides the number of weights."
        )
    return shape.numel() // groups


def _initial_values(model: Callable[..., Any], init: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    if init is not None:
        return dict(init)
    if hasattr(model, "site_values"):
        return model.site_values()
    raise NetworkError(
        f"{type(model).__name__} does not tell its pretrained weights: give init={{site name: tensor}}, "
        "or wrap the network in BayesianNetwork."
    )


def _check_arguments(
    num_components: int,
    temperature: float,
    evaluation_temperature: float | None,
    gate_temperature: float,
    estimator: str,
    refresh_every: int,
    stage: str,
) -> None:
    if not 1 <= num_components <= 256:
        raise RecipeError(f"num_components is {num_components}, but must be 1 to 256.")
    for name, value in (
        ("temperature", temperature),
        ("evaluation_temperature", 1.0 if evaluation_temperature is None else evaluation_temperature),
        ("gate_temperature", gate_temperature),
    ):
        if not value > 0:
            raise RecipeError(f"{name} is {value}, but must be positive.")
    if estimator not in ("straight_through", "soft", "concrete"):
        raise RecipeError(f"estimator {estimator!r} is unknown: use 'straight_through', 'soft' or 'concrete'.")
    if stage not in ("dense", "coded", "frozen"):
        raise RecipeError(f"stage {stage!r} is unknown: use 'dense', 'coded' or 'frozen'.")
    if refresh_every < 1:
        raise RecipeError(f"refresh_every is {refresh_every}, but must be at least 1 step.")
