"""The variational parameters of one compressed tensor."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor
from torch.nn.functional import pad

from sqs_pyro.arguments import is_whole
from sqs_pyro.distributions import Codebook, CodebookGMM, LatentSpikeAndSlab
from sqs_pyro.distributions.assignment import HardValue
from sqs_pyro.distributions.kmeans import Clustering, kmeans_1d
from sqs_pyro.distributions.temperatures import Temperatures
from sqs_pyro.distributions.uniform_grid import UniformGrid, best_step, grid_numbers, uniform_codebook
from sqs_pyro.distributions.zero_codeword import (
    ZeroFirst,
    kmeans_with_zero,
    lsq_codebook,
    lsq_value,
    ternary_codebook,
    ternary_codes,
    ttq_value,
)
from sqs_pyro.errors import ArgumentError, NetworkError
from sqs_pyro.inference.guides.windows import Windows
from sqs_pyro.models.ownership import OwningModule
from sqs_pyro.networks.weight_scale import LEAST_SCALE, weight_scale
from sqs_pyro.packing import CodedTensor
from sqs_pyro.packing.coded import count_codes, look_up
from sqs_pyro.packing.leftovers import round_to

#: Weights that share a codebook: a layer's, an out-channel's, or so many consecutive ones.
Groups = Literal["layer", "channel"] | int
#: Codewords of any values, or whole numbers times a step of each codebook.
Grid = Literal["free", "uniform"]
#: What is zero: weights whose gate is closed; those whose codeword it is; or those up to a share of the largest,
#: the others having the codeword of their sign.
Zero = Literal["gate", "codeword"] | float

_OPEN = 100.0  # logit of gates that say nothing: λ is 1 in float32
_HARD_VALUES = {"ttq": ttq_value, "lsq": lsq_value}  # by estimator


class SiteGuide(OwningModule):
    """The variational parameters of one site and the distribution they make.

    Attributes:
        latent: latent weights w, the site's shape.
        latent_scale: their widths s, the site's shape; only after :meth:`learn_widths`.
        gate_logit: g, the site's shape; ``λ = sigmoid(g / gate_temperature)`` where ``mask``, else 0.
        loc, scale, mixing_logits: the codebook of each group, ``[G, K]``; ``π = softmax(mixing_logits)``.
        mask: weights that pruning has left, bool, the site's shape.
        spike_scale: s of a Gaussian spike, a scalar; ``None`` is a point mass at zero.
        codes: hard codes, uint8 ``[G, n]``; :meth:`refresh_codes` puts others in their place and leaves a tensor
            that a gradient still needs as it was.
        anchor: what responsibilities are computed from: ``latent`` or its window's mean.
    """

    stored_buffers: ClassVar[tuple[str, ...]] = ("mask", "codes", "edges", "spike_scale")

    mask: Tensor
    codes: Tensor
    edges: Tensor
    spike_scale: Tensor | None

    def __init__(
        self,
        name: str,
        weight: Tensor,
        num_components: int,
        groups: Groups,
        windows: Windows,
        initial_gate: float,
        coded: CodedTensor | None = None,
        grid: Grid = "free",
        zero: Zero = "gate",
    ) -> None:
        super().__init__()
        self.site_name = name
        self.shape = weight.shape
        beside_zero = num_components if coded is None else coded.num_components
        # Where zero is a codeword it is the first of K + 1.
        self.num_components = num_components = beside_zero if zero == "gate" else beside_zero + 1
        self.num_groups = _num_groups(name, weight.shape, groups) if coded is None else coded.num_groups
        self.windows = windows
        per_group = weight.numel() // self.num_groups
        _check_components(name, per_group, num_components)
        initial = weight.detach().clone().float()  # guides work in float32, whatever the network does
        self.latent = PyroParam(initial, constraints.real)
        gate = initial_gate if zero == "gate" else _OPEN
        self.gate_logit = PyroParam(torch.full_like(initial, gate), constraints.real)
        self.register_buffer("mask", torch.ones_like(initial, dtype=torch.bool))
        self.register_buffer(
            "codes", torch.zeros(self.num_groups, per_group, dtype=torch.uint8, device=weight.device)
        )
        self.register_buffer("edges", initial.new_empty(0))  # as many as the windows' strategy finds
        codebook = initial.new_zeros(self.num_groups, num_components)  # [G, K], filled below
        self.grid, self.zero = grid, zero
        form = UniformGrid(beside_zero) if grid == "uniform" else constraints.independent(constraints.real, 1)
        if grid == "uniform":  # what learns is the logarithm of the step
            codebook[:, -beside_zero:] = grid_numbers(beside_zero).to(codebook)
        self.loc = PyroParam(codebook, form if zero == "gate" else ZeroFirst(form))
        codebook = torch.zeros_like(codebook)
        self.scale = PyroParam(codebook + 1.0, constraints.positive)
        self.mixing_logits = PyroParam(codebook.clone(), constraints.real)  # memory of its own
        self.register_buffer("spike_scale", None)
        if coded is None:
            self.fit_codebook()
        else:
            self._adopt(coded)

    def spread_spike(self, scale: Tensor | float | None) -> None:
        """Make the spike Gaussian, of the codebook's own width unless a ``scale`` is given."""
        own = self.scale.detach().mean()
        # As wide as the components: a figure of the layer's own, which no caller has to know.
        self.spike_scale = own if scale is None else torch.as_tensor(scale).to(own, copy=True)

    def learn_widths(self, initial: float) -> None:
        """Give every weight a width s of its own to learn, at first ``initial`` root mean squares of all."""
        start = torch.full_like(self.latent.detach(), initial * float(weight_scale(self.latent.detach())))
        self.latent_scale = PyroParam(start, constraints.positive)

    @property
    def learns_widths(self) -> bool:
        """Whether every weight has a width of its own."""
        return "latent_scale" in self._pyro_params

    def precision(self, kept: Tensor) -> Tensor:
        """Return ``1/s²`` of the weights that are kept, in units of its mean, else 0; all 1 without widths.

        To move a weight by d costs the ELBO's likelihood about ``d²/2s²``.

        Args:
            kept: bool, the site's shape.
        """
        if not self.learns_widths:
            return kept.to(self.latent.dtype)
        precision = kept * self.latent_scale.detach() ** -2
        number, total = self.gathered(torch.stack([torch.count_nonzero(kept), precision.sum()])).sum(0)
        return precision * (number / torch.where(number > 0, total, 1.0))

    def gates(self, gate_temperature: float = 1.0) -> Tensor:
        """λ, the site's shape: posterior inclusion probabilities, exactly 0 for pruned weights."""
        logit = self.gate_logit if gate_temperature == 1 else self.gate_logit / gate_temperature
        # Masked before the sigmoid, whose result is all that autograd keeps; no gradient to pruned gates.
        return torch.sigmoid(torch.where(self.mask, logit, -torch.inf))

    def kept(self, gate_temperature: float = 1.0) -> Tensor:
        """Return which weights are not zero, bool, the site's shape: by gates, or where zero is coded by codes."""
        kept = self.gates(gate_temperature) > 0.5
        return kept if self.zero == "gate" else kept & (self.codes.view(self.shape) > 0)

    def fitted(self, values: Tensor, weights: Tensor) -> Clustering:
        """Return codebooks fitted to values ``[G, n]`` that count as ``weights`` say, in this site's form."""
        if self.zero == "gate":
            fit = uniform_codebook if self.grid == "uniform" else kmeans_1d
            return fit(values, self.num_components, weights)
        if isinstance(self.zero, float):
            return ternary_codebook(values, self.zero, weights)
        fit = lsq_codebook if self.grid == "uniform" else kmeans_with_zero
        return fit(values, self.num_components - 1, weights)

    @property
    def size(self) -> Tensor:
        """Root mean square of the latents, see :func:`~sqs_pyro.networks.weight_scale.weight_scale`."""
        return weight_scale(self.latent)

    @property
    def num_codebooks(self) -> int:
        """How many groups there are, those of other ranks' rows included."""
        return self.num_groups

    @property
    def shares_codebook(self) -> bool:
        """Whether other ranks have weights of the groups that are here."""
        return False

    def gathered(self, value: Tensor) -> Tensor:
        """Return a tensor of every rank that has weights of this site, ``[1, ...]``."""
        return value[None]

    def placed(self, values: Tensor) -> Tensor:
        """Return values of the weights as masks and saliencies are given."""
        return values

    def beside(self, value: Tensor) -> Tensor:
        """Return what broadcasts against the weights as what broadcasts against ``latent``."""
        return value.to(self.latent)

    def grouped(self, value: Tensor) -> Tensor:
        """Return a tensor of the site's shape as ``[G, n]``."""
        return value.reshape(self.num_groups, -1)

    def anchor(self) -> Tensor:
        """Return the latents as their windows represent them, the site's shape."""
        return self.windows.represent(self.latent, self.edges)

    def codebook(self) -> Codebook:
        """Return the codebook of each group as it is now."""
        return Codebook(self.loc, self.scale, self.mixing_logits.log_softmax(-1))

    def fit_codebook(self) -> None:
        """Fit codebooks anew by K-means of the surviving latents, with window edges and codes."""
        fit_shared_codebook([self])

    @property
    def codebook_unit(self) -> float:
        """Return what a learning rate of the codebook is given in units of."""
        # The logarithm of a step has none: a change of it is relative to the codewords.
        return 1.0 if self.grid == "uniform" else float(self.size)

    def on_grid(self, values: Tensor, mass: Tensor) -> Tensor:
        """Return the codebooks that are nearest to values ``[G, K]`` of which each counts ``mass``."""
        if self.grid == "free":
            return values
        return best_step(values, mass.to(values)) * grid_numbers(self.num_components).to(values)

    def share_codebook(self, other: "SiteGuide") -> None:
        """Have another site's codebook for its own: the same parameters, whoever trains them."""
        for name in ("loc_unconstrained", "scale_unconstrained", "mixing_logits_unconstrained"):
            self._parameters[name] = other._parameters[name]

    def spread_codebook(self, value: float) -> None:
        """Place components for equal weights: one at their value, the rest where they may go from there."""
        size = self.size
        # K / 2 places either side reach one root mean square, so that gradients can tell them apart and none is
        # lost.
        step = size * min(0.5, 2 / self.num_components)
        places = torch.arange(self.num_components, device=size.device) - self.num_components // 2
        self.loc = (value + step * places).expand(self.loc.shape).clone()
        self.scale = (step / 2).expand(self.loc.shape).clone()
        self.mixing_logits = torch.zeros_like(self.loc)

    @torch.no_grad()
    def _adopt(self, coded: CodedTensor) -> None:
        """Take codes, mask and codebook as they are; σ and π are those of the weights that use each codeword."""
        if coded.shape != tuple(self.shape):
            raise NetworkError(
                f"The coded weight of '{self.site_name}' has shape {list(coded.shape)}, the layer "
                f"{list(self.shape)}: give each site its own."
            )
        if coded.scales is not None:
            raise NetworkError(
                f"The coded weight of '{self.site_name}' has scales, of out-channels or of parts of them, which "
                "a guide does not know: make the layer one in units of them, or give its unscaled(), which has a "
                "codebook for each."
            )
        # G of the coded tensor, which the constructor has taken for the site's.
        codes, mask = (self.grouped(value.to(self.latent.device)) for value in (coded.codes, coded.mask))  # [G, n]
        codebook = coded.codebook.to(self.latent)
        if self.zero == "codeword":  # the first, and no gate is closed
            codes, codebook = (codes + 1) * mask, pad(codebook, (1, 0))
            mask = torch.ones_like(mask)
        self.codes.copy_(codes)
        self.mask.copy_(mask.view(self.shape))
        self.loc = codebook
        counts = count_codes(codes, mask, self.num_components)  # [G, K]
        # Half a count more: a component that no weight uses stays possible.
        self.mixing_logits = ((counts + 0.5) / (counts + 0.5).sum(1, keepdim=True)).log().to(self.latent)
        # σ is the spread of the latents around the codewords that they are given: pooled, as K-means pools it.
        residual = (self.latent - coded.dense().to(self.latent)) * self.mask
        width = (self.grouped(residual).square().sum(1) / counts.sum(1).clamp(min=1)).sqrt()
        # Weights that lie exactly on their codewords leave a width of 0, whose KL is infinite.
        floor = 1e-3 * self.latent.square().mean().sqrt().clamp(min=1e-12)
        self.scale = width.maximum(floor)[:, None].expand(self.loc.shape).clone()

    def learn_shape(self, learn: bool) -> None:
        """Let σ and π learn by gradient, or stay as K-means found them.

        The straight-through value does not depend on σ and π. Only the KL would move them: σ towards the
        prior's width and π towards the component with the smallest KL, with nothing to hold against it, and
        the hard codes would follow.
        """
        self.scale_unconstrained.requires_grad_(learn)
        self.mixing_logits_unconstrained.requires_grad_(learn)

    @torch.no_grad()
    def refresh_codes(self) -> None:
        """Give each weight its most probable component."""
        self.codes = self.most_probable_codes()  # another tensor: a graph may still need the old one

    def most_probable_codes(self) -> Tensor:
        """Return ``argmax_k φ_k`` of each weight, uint8 ``[G, n]``."""
        if isinstance(self.zero, float):
            return ternary_codes(self.grouped(self.latent), self.zero)
        # The argmax does not depend on temperatures.
        return self.coded_distribution(Temperatures(1.0, 1.0), "straight_through").map_codes()

    def dense_distribution(self, gate_temperature: float, estimator: str) -> LatentSpikeAndSlab:
        """Return a spike, and a Gaussian slab around each latent: of its own width, or as wide as a component."""
        if self.learns_widths:
            scale = self.latent_scale
        else:  # [G, K] -> [G, 1] -> [G, n] -> the site's shape
            scale = self.scale.mean(1, keepdim=True).detach().expand(self.codes.shape).reshape(self.shape)
        return LatentSpikeAndSlab(
            self.gates(gate_temperature),
            self.latent,
            scale,
            estimator="straight_through" if estimator in _HARD_VALUES else estimator,  # no codewords yet
            spike_scale=self.spike_scale,
            validate_args=False,
        )

    def one_hot_distribution(self, temperature: float, estimator: str, coded: bool) -> LatentSpikeAndSlab:
        """Return q with its most probable symbols alone: the hard weight, and its component's width around it.

        Args:
            temperature: what the precision ``1/σ²`` is divided by.
            estimator: of draws.
            coded: whether codes are there already; else the hard weight is the latent.
        """
        gates = self.gates()
        kept = (gates > 0.5).to(self.latent.dtype)
        if coded:
            codes = self.codes
            value = HardValue.apply(self.grouped(self.latent), self.grouped(gates), self.loc, codes)
            scale = look_up(self.scale.detach(), codes)
        else:
            value, scale = self.latent, self.scale.detach().mean(1, keepdim=True).expand(self.codes.shape)
        return LatentSpikeAndSlab(
            kept,
            value.view(self.shape),
            math.sqrt(temperature) * scale.reshape(self.shape),
            estimator=estimator,
            spike_scale=self.spike_scale,
            validate_args=False,
        )

    def coded_distribution(
        self, temperatures: Temperatures, estimator: str, codes: Tensor | None = None
    ) -> CodebookGMM:
        """Return the spike-and-GMM over the site's weights."""
        return CodebookGMM(
            self.gates(temperatures.gates),
            self.latent,
            *self.codebook(),
            anchor=self.anchor(),
            codes=codes,
            temperature=temperatures.codes,
            estimator="straight_through" if estimator in _HARD_VALUES else estimator,
            hard_value=_HARD_VALUES.get(estimator),
            spike_scale=self.spike_scale,
            validate_args=False,  # a check waits for the device, at every draw of every site
        )

    def _take_over_buffer(self, name: str, loaded: Tensor) -> None:
        """Make room for the edges that were loaded: their number differs from fit to fit."""
        if name == "edges":
            self._buffers[name] = torch.empty_like(loaded, device=self._parameters["latent_unconstrained"].device)
        super()._take_over_buffer(name, loaded)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Make room for as many window edges as were saved: their number differs from fit to fit."""
        saved = state_dict.get(prefix + "edges")
        if saved is not None:
            self.edges = self.edges.new_empty(saved.shape)
        codes = state_dict.get(prefix + "codes")
        if codes is not None and codes.numel() == self.codes.numel():  # ranks keep them in the weight's shape
            state_dict = {**state_dict, prefix + "codes": codes.view(self.codes.shape)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def harden(self, codebook_dtype: torch.dtype, keep_codes: bool) -> CodedTensor:
        """Return the most probable network's weights: gate above ½ or zero, most probable component's mean.

        Args:
            codebook_dtype: codewords are rounded to this type if they survive it.
            keep_codes: use ``codes`` as they are; else the latents' most probable components.
        """
        # Whether a gate is above ½ does not depend on its temperature.
        codes = self.codes if keep_codes else self.most_probable_codes()
        return self._coded(self.gates() > 0.5, codes.view(self.shape), self.loc, codebook_dtype)

    @torch.no_grad()
    def draw(self, codebook_dtype: torch.dtype, temperatures: Temperatures) -> CodedTensor:
        """Draw a discrete network's weights: gates and codes, of which :meth:`harden` takes the most probable."""
        mask, codes = self.coded_distribution(temperatures, "discrete").sample_symbols()
        return self._coded(mask, codes.to(torch.uint8), self.loc, codebook_dtype)

    def _coded(self, mask: Tensor, codes: Tensor, loc: Tensor, codebook_dtype: torch.dtype) -> CodedTensor:
        if not bool(loc.isfinite().all()):
            raise NetworkError(
                f"The codebook of '{self.site_name}' holds NaN or infinite values: training has diverged, so "
                "lower learning_rate or kl_weight."
            )
        loc = loc.detach().float()
        if self.zero != "gate":  # what ships has zeros, and no codeword for them
            mask, loc = mask & (codes > 0), loc[:, 1:]
            codes = codes.clamp(min=1) - 1
        if self.grid == "uniform":
            # Of 8 bits, as bfloat16 has them: the products of K ≤ 15 numbers are exact in float16, all in float32.
            numbers = grid_numbers(loc.shape[1]).to(loc)
            steps = (loc[:, -1:] / numbers[-1]).bfloat16().float()  # [G, 1]
            codebook, scales = steps * numbers, _as_scales(steps, self.shape[0])
            if scales is not None:  # 2 bytes for each step, and one codebook for all
                codebook, scales = numbers[None], scales.cpu()
            return CodedTensor(codes.masked_fill(~mask, 0).cpu(), mask.cpu(), codebook.cpu(), scales)
        # A clone: values that do not survive rounding come back as they are, in the parameter's own memory.
        codebook = round_to(loc, str(codebook_dtype).removeprefix("torch.")).clone()
        # Codes of zeros are 0, so that equal networks have equal files.
        return CodedTensor(codes.masked_fill(~mask, 0).cpu(), mask.cpu(), codebook.cpu())


def _as_scales(steps: Tensor, channels: int) -> Tensor | None:
    """Return steps ``[G, 1]`` as scales of out-channels, ``[N]``, or of equal parts, ``[N, B]``.

    None where there is one step for all, or one for several channels, or a step that is no number of float16.
    """
    groups = len(steps)
    if groups == 1 or groups % channels:
        return None
    halves = steps.half()
    exact = torch.equal(halves.float(), steps) and bool((halves > 0).all())
    return steps.reshape(channels, -1).squeeze(1) if exact else None


@torch.no_grad()
def fit_shared_codebook(sites: Sequence[SiteGuide]) -> None:
    """Fit one codebook a group by K-means of the surviving latents of several guides' sites, with edges and codes.

    Args:
        sites: of one tensor, with as many groups and components each; every one has the codebook afterwards.
    """
    kept = [site.gates() > 0.5 for site in sites]  # as `harden` has it: zeros would draw codewords to themselves
    survivors = torch.cat([site.latent[own] for site, own in zip(sites, kept, strict=True)])
    for site in sites:
        # A site that is pruned to nothing still needs edges that fit its latents.
        site.edges = site.windows.edges(survivors if survivors.numel() else site.latent)
    # Pruned weights stay in place with weight 0: each group keeps its n columns.
    codebook = sites[0].fitted(
        torch.cat([site.grouped(site.anchor()) for site in sites], 1),  # [G, M n]
        torch.cat([site.grouped(site.precision(own)) for site, own in zip(sites, kept, strict=True)], 1),
    )
    first = sites[0]
    first.loc, first.scale, first.mixing_logits = codebook.loc, codebook.scale, codebook.mixing.log()
    # K-means of one value gives K equal components, which no gradient could tell apart. The range of none is -inf.
    least, negative = first.gathered(_bounds(survivors)).amin(0).tolist()
    equal = 0 <= -negative - least < LEAST_SCALE
    if equal and not isinstance(first.zero, float):  # whose codewords are of a sign each
        first.spread_codebook(least)
    for site in sites:
        if site is not first:
            site.share_codebook(first)
        # Last: the codes are those of the new components and edges.
        site.refresh_codes()


def _bounds(values: Tensor) -> Tensor:
    """Return the least of values and of their negatives, ``[2]``."""
    if not values.numel():
        return values.new_full((2,), torch.inf)
    least, most = values.aminmax()
    return torch.stack([least, -most])


def check_codebooks(name: str, shape: torch.Size, num_components: int, groups: Groups) -> None:
    """Check that a layer of this shape can have such codebooks.

    Raises:
        RecipeError: tiles do not fit the layer.
        NetworkError: a codebook has more components than weights.
    """
    _check_components(name, shape.numel() // _num_groups(name, shape, groups), num_components)


def _check_components(name: str, per_group: int, num_components: int) -> None:
    if per_group < num_components:
        raise NetworkError(
            f"Layer '{name}' has {per_group} weights a codebook, fewer than num_components={num_components}: "
            "use fewer components, larger groups, or exclude the layer."
        )


def _num_groups(name: str, shape: torch.Size, groups: Groups) -> int:
    if groups == "layer":
        return 1
    if groups == "channel":
        return shape[0]
    if not is_whole(groups, 1) or shape.numel() % groups:
        raise ArgumentError(
            f"groups={groups!r} does not fit layer '{name}' of {shape.numel()} weights: use 'layer', 'channel', "
            "or a tile size that divides the number of weights."
        )
    return shape.numel() // groups
