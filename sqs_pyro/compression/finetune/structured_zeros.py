r"""E- and M-steps under a prior of zeros that knows rows, columns and kernels.

The prior of a layer's zeros is the law of urns (:mod:`sqs_pyro.packing.urns`), under which files are coded. Given
all other weights, the odds of weight i not to be zero are what its urns say of them; the E-step of
:mod:`~sqs_pyro.compression.finetune.rate_distortion` then has a price for each weight of its own,

    q(z_i ≠ 0) / q(z_i = 0) = odds_i · max_k π_k exp(-h (w_i - c_k)² / 2β) / exp(-h w_i² / 2β),

one sweep of coordinate ascent over all weights at once. A weight among zeros is dear, and a channel or kernel that
is nearly empty dies out: zeros get the structure that makes them short to write. Weights of a full kernel would
hold each other there for ever, so a second sweep is over kernels: one that is worth less than its symbols becomes
zero.
"""

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from sqs_pyro.compression.finetune.rate_distortion import (
    Fit,
    RateDistortion,
    code_nats,
    fit_symbol_prior,
    posterior,
    solve_beta,
)
from sqs_pyro.inference.guides.site import SiteGuide
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.packing.urns import (
    MIXING_BYTES,
    FullConditionals,
    as_kernels,
    code_length,
    constant_conditionals,
    full_conditionals,
    inclusion_before,
)

_CORRECTIONS = 5  # of what zeros take
_CLOSE = 1e-3  # to the target


class StructuredRateDistortion(RateDistortion):
    """Rate-distortion under the law of urns; arguments and attributes as :class:`RateDistortion`.

    Attributes:
        masks: which weights are not zero, bool, one of each site's shape.
        strength: how far prices follow the law; 0 is that of the layer. All weights begin as non-zeros, and full
            kernels would hold their own: zeros find a better structure if it rises to 1 as they become more.
    """

    def __init__(self, guide: SpikeGMMGuide, inclusion: float = 0.5, codeword_bits: int = 16) -> None:
        guide.site_guides()  # the law is of whole kernels, all of them: rows of sites are refused
        super().__init__(guide, inclusion=inclusion, codeword_bits=codeword_bits)
        self.strength = 1.0
        self.masks = [site.mask for site in self.sites.values()]
        self._conditionals = [constant_conditionals(mask, inclusion) for mask in self.masks]
        # In trials zeros are counted given other kernels, which is soon done, and exchanged into bits of the file.
        self._exchange = 1.0

    @torch.no_grad()
    def fit(
        self,
        precision: Mapping[str, float],
        *,
        bits: float | None = None,
        beta: float = 1.0,
        rounds: int = 3,
        move_codewords: bool = True,
    ) -> Fit:
        """Alternate M- and E-steps as :meth:`RateDistortion.fit`."""
        loc, h = self._codewords(), self._curvature(precision)

        def estimate(beta: float) -> float:
            symbols = self._symbols(loc, beta / h)
            return self._of_codes(symbols) + self._exchange * self._given_others(symbols)

        def beta_now() -> float:
            return beta if bits is None else solve_beta(estimate, bits, self.beta)

        self.beta = self.beta or beta_now()
        symbols = self._symbols(loc, self.beta / h)
        for _ in range(rounds):
            self._m_step(symbols)
            if move_codewords:
                loc = torch.where(symbols.counts > 0, symbols.means.to(loc.dtype), loc)
            self.beta = beta_now()
            symbols = self._symbols(loc, self.beta / h)
        for correction in range(_CORRECTIONS):
            zeros = sum(map(code_length, symbols.masks))
            taken = zeros + self._of_codes(symbols)
            self._exchange = zeros / max(self._given_others(symbols), 1.0)
            if bits is None or abs(taken - bits) < _CLOSE * bits or correction == _CORRECTIONS - 1:
                break
            self.beta = beta_now()
            symbols = self._symbols(loc, self.beta / h)
        self.masks = symbols.masks
        self._write(loc, self.beta / h)
        return Fit(self.beta, taken, self._kl(symbols, zeros))

    def inclusions(self) -> dict[str, Tensor]:
        """Return the probability of each weight not to be zero given those before it, of the sites' shapes."""
        return {name: _inclusion(mask) for name, mask in zip(self.sites, self.masks, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        conditionals = [astuple(each) for each in self._conditionals]
        own = {
            "strength": self.strength,
            "masks": self.masks,
            "conditionals": conditionals,
            "exchange": self._exchange,
        }
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state)
        device = self.symbol_prior.inclusion.device
        self.strength = state["strength"]
        self.masks, self._exchange = [mask.to(device) for mask in state["masks"]], state["exchange"]
        self._conditionals = [FullConditionals(*(x.to(device) for x in each)) for each in state["conditionals"]]

    def _posterior(self, index: int, site: SiteGuide, loc: Tensor, step: float) -> tuple[Tensor, Tensor]:
        log_mixing = self.symbol_prior.log_mixing[index, : loc.shape[1]].to(loc)
        rates = torch.cat([loc.new_zeros(1), -log_mixing])  # given that z ≠ 0
        codes, gain = posterior(site.grouped(site.latent.detach()), loc, rates, step)
        given, gain = self._conditionals[index], as_kernels(gain.view(site.shape))
        log_odds = gain + given.elsewhere.to(gain)
        mask = log_odds > 0
        # Of a kernel against its zero: all its weights come or go together.
        whole = given.of_kernels(mask) + (mask * gain).sum(2) - given.of_kernels(torch.zeros_like(mask))
        log_odds = torch.where(mask, torch.minimum(log_odds, whole[:, :, None].to(gain)), log_odds)
        return codes, site.grouped(log_odds.view(site.shape))

    def _symbols(self, loc: Tensor, step: Tensor) -> "_Symbols":
        """Take the E-step's most probable symbols."""
        masks, counts, means = [], [], []
        for i, (site, rows) in enumerate(zip(self.sites.values(), loc.split(self._groups.tolist()), strict=True)):
            codes, log_odds = self._posterior(i, site, rows, float(step[i]))
            mask = log_odds > 0
            # Codes of row r are counted in bins r K .. r K + K - 1.
            place = (codes + rows.shape[1] * torch.arange(len(rows), device=loc.device)[:, None])[mask]
            count = torch.bincount(place, minlength=rows.numel()).view(rows.shape)
            total = torch.bincount(place, site.grouped(site.latent.detach())[mask].double(), rows.numel())
            masks.append(mask.view(site.shape))
            counts.append(count)
            means.append(total.view(rows.shape) / count.clamp(min=1))
        return _Symbols(masks, torch.cat(counts), torch.cat(means))

    def _m_step(self, symbols: "_Symbols") -> None:
        possible = self.symbol_prior.possible
        self.symbol_prior = fit_symbol_prior(self._totals(symbols, zeros=True), possible=possible)
        self._conditionals = [full_conditionals(mask).tempered(mask, self.strength) for mask in symbols.masks]

    def _totals(self, symbols: "_Symbols", zeros: bool) -> Tensor:
        """Return how often each symbol of a site occurs, ``[S, 1 + K]``; zeros are left out unless asked for."""
        counts = torch.stack([rows.sum(0) for rows in symbols.counts.split(self._groups.tolist())])
        left = counts.new_tensor([mask.numel() for mask in symbols.masks]) - counts.sum(1)
        return torch.cat([left[:, None] * zeros, counts], 1)

    def _of_codes(self, symbols: "_Symbols") -> float:
        return self._bits(self._totals(symbols, zeros=False))

    def _given_others(self, symbols: "_Symbols") -> float:
        """Return bits of all zeros, each kernel's given all others."""
        lengths = [
            -given.of_kernels(as_kernels(mask)).sum()
            for given, mask in zip(self._conditionals, symbols.masks, strict=True)
        ]
        return float(torch.stack(lengths).sum()) / math.log(2)

    def _kl(self, symbols: "_Symbols", zeros: float) -> float:
        mixing = 8 * MIXING_BYTES * len(symbols.masks)
        codes = code_nats(self._totals(symbols, zeros=False)[:, 1:], -self.symbol_prior.log_mixing)
        return (zeros - mixing) * math.log(2) + codes


@dataclass(frozen=True)
class _Symbols:
    """The symbols of all weights.

    Attributes:
        masks: which are not zero, bool; one of each site's shape.
        counts: how many have each code, in each row of all codebooks, ``[R, K]``.
        means: of their latents, ``[R, K]``.
    """

    masks: list[Tensor]
    counts: Tensor
    means: Tensor


def _inclusion(mask: Tensor) -> Tensor:
    return mask.double() if mask.all() or not mask.any() else inclusion_before(mask)[0]
