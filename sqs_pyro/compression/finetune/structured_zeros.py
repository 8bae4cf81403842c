r"""E- and M-steps under a prior of zeros that knows rows, columns and kernels.

The prior of a layer's zeros is the law of urns (:mod:`sqs_pyro.packing.urns`), under which files are coded. Given
all other weights, the odds of weight i not to be zero are what its urns say of them; the E-step of
:mod:`~sqs_pyro.compression.finetune.rate_distortion` then has a price for each weight of its own,

    q(z_i ≠ 0) / q(z_i = 0) = odds_i · max_k π_k exp(-h (w_i - c_k)² / 2β) / exp(-h w_i² / 2β),

one sweep of coordinate ascent over all weights at once. A weight among zeros is dear, and a channel or kernel that
is nearly empty dies out: zeros get the structure that makes them short to write.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sqs_pyro.compression.finetune.rate_distortion import (
    Fit,
    RateDistortion,
    fit_symbol_prior,
    posterior,
    solve_beta,
)
from sqs_pyro.inference.guides.site import SiteGuide
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.packing.urns import MIXING_BYTES, code_length, inclusion_before, log_odds_elsewhere

_CORRECTIONS = 3  # of what zeros take
_CLOSE = 1e-3  # to the target


class StructuredRateDistortion(RateDistortion):
    """Rate-distortion under the law of urns; arguments and attributes as :class:`RateDistortion`.

    Attributes:
        log_odds: of each weight not to be zero given all others, nats; a tensor for each site, of its shape.
    """

    def __init__(self, guide: SpikeGMMGuide, inclusion: float = 0.5, codeword_bits: int = 16) -> None:
        super().__init__(guide, inclusion=inclusion, codeword_bits=codeword_bits)
        start = math.log(inclusion) - math.log1p(-inclusion)
        self.log_odds = [torch.full_like(site.latent.detach(), start) for site in self.sites.values()]
        self._masks = [site.mask for site in self.sites.values()]
        # In trials zeros are counted given all others, which is soon done, and exchanged into bits of the file.
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
        self._masks = symbols.masks
        self._write(loc, self.beta / h)
        return Fit(self.beta, taken, self._kl(symbols, zeros))

    def inclusions(self) -> dict[str, Tensor]:
        """Return the probability of each weight not to be zero given those before it, of the sites' shapes."""
        return {name: _inclusion(mask) for name, mask in zip(self.sites, self._masks, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        own = {"log_odds": self.log_odds, "masks": self._masks, "exchange": self._exchange}
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state)
        device = self.symbol_prior.inclusion.device
        self.log_odds = [value.to(device) for value in state["log_odds"]]
        self._masks, self._exchange = [mask.to(device) for mask in state["masks"]], state["exchange"]

    def _posterior(self, index: int, site: SiteGuide, loc: Tensor, step: float) -> tuple[Tensor, Tensor]:
        rates = torch.cat([loc.new_zeros(1), -self.symbol_prior.log_mixing[index].to(loc)])  # given that z ≠ 0
        codes, log_odds = posterior(site.grouped(site.latent.detach()), loc, rates, step)
        return codes, log_odds + site.grouped(self.log_odds[index])

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
        self.symbol_prior = fit_symbol_prior(self._totals(symbols, zeros=True))
        self.log_odds = [log_odds_elsewhere(mask).to(self.log_odds[0]) for mask in symbols.masks]

    def _totals(self, symbols: "_Symbols", zeros: bool) -> Tensor:
        """Return how often each symbol of a site occurs, ``[S, 1 + K]``; zeros are left out unless asked for."""
        counts = torch.stack([rows.sum(0) for rows in symbols.counts.split(self._groups.tolist())])
        left = counts.new_tensor([mask.numel() for mask in symbols.masks]) - counts.sum(1)
        return torch.cat([left[:, None] * zeros, counts], 1)

    def _of_codes(self, symbols: "_Symbols") -> float:
        return self._bits(self._totals(symbols, zeros=False))

    def _given_others(self, symbols: "_Symbols") -> float:
        """Return bits of all zeros, each given all others."""
        lengths = [
            (softplus(odds) - mask * odds).sum() for odds, mask in zip(self.log_odds, symbols.masks, strict=True)
        ]
        return float(torch.stack(lengths).sum()) / math.log(2)

    def _kl(self, symbols: "_Symbols", zeros: float) -> float:
        mixing = 8 * MIXING_BYTES * len(symbols.masks)
        codes = -(self._totals(symbols, zeros=False)[:, 1:] * self.symbol_prior.log_mixing).sum()
        return (zeros - mixing) * math.log(2) + float(codes)


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
