r"""Which weights are zero, and which codeword the others take, by coordinate ascent on the learned prior's ELBO.

Under the learned prior ``p(z = 0) = 1 - ρ``, ``p(z = k) = ρ π_k``, whose components are the guide's own, the KL of
a one-hot posterior is the code length ``-Σ log p(z_i)``. With the likelihood's quadratic expansion about the
latents, ``-log p(D | θ) = const + Σ h_l (θ_i - w_i)² / 2`` (Laplace; h_l is the Fisher information of a weight of
layer l), the ELBO's optimum over the posterior of one weight has the closed form

    q(z_i) ∝ p(z_i) exp(-h_l (w_i - c_z)² / 2β),    c_0 = 0,

the E-step; the ``ρ`` and ``π`` that maximise it are the shares of the symbols, the M-step, and a codeword's best
value is the mean of the latents that use it. The most probable symbols minimise ``h_l (w - c_z)² / 2 + β rate_z``
with ``rate = -log p(z)``: entropy-constrained scalar quantization (Chou, Lookabaugh & Gray 1989). Every symbol
rules over an interval of w, so that after one sort a β costs a few binary searches to try.

Of sites that ranks divide each sorts its own weights. What an E-step leaves of them is counts and sums by symbol,
which are added up in the order of ranks, a few numbers for each β that is tried: all ranks come to the same β.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sqs_pyro.compression.bisection import beta_for
from sqs_pyro.inference.guides.site import SiteGuide
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide

_PSEUDO_COUNT = 0.5  # Jeffreys: a symbol that no weight has at present stays possible
_CODER_BITS = 40  # what the coder's last words cost a site
_FIRST_BETA = 1e-3  # where the first bisection starts looking
_LAST_LOG_BETA = 60.0  # where it stops, on either side


@dataclass(frozen=True)
class SymbolPrior:
    """The learned prior of the symbols (zero, code 1, .. code K) of S sites.

    Attributes:
        inclusion: ρ, ``[S]``.
        log_mixing: log π, ``[S, K]``; minus infinity for codes that a site of fewer does not have.
    """

    inclusion: Tensor
    log_mixing: Tensor

    @property
    def rates(self) -> Tensor:
        """``-log p(z)``, nats, ``[S, 1 + K]``."""
        of_zero, of_inclusion = -torch.log1p(-self.inclusion), -self.inclusion.log()
        return torch.cat([of_zero[:, None], of_inclusion[:, None] - self.log_mixing], 1)

    @property
    def possible(self) -> Tensor:
        """Which codes a site has, bool, ``[S, K]``."""
        return self.log_mixing > -torch.inf


def fit_symbol_prior(counts: Tensor, pool_inclusion: bool = False, possible: Tensor | None = None) -> SymbolPrior:
    """Take, in the M-step, for ρ and π the shares of symbols that occur ``counts [S, 1 + K]`` times.

    Args:
        counts: of the symbols, zero first.
        pool_inclusion: one ρ for all sites.
        possible: which codes a site has, bool, ``[S, K]``; None: all.
    """
    unseen = torch.ones_like(counts) if possible is None else pad(possible, (1, 0), value=True)
    counts = counts.double() + _PSEUDO_COUNT * unseen
    kept, total = counts[:, 1:].sum(1), counts.sum(1)
    inclusion = (kept.sum() / total.sum()).expand(len(counts)) if pool_inclusion else kept / total
    return SymbolPrior(inclusion, (counts[:, 1:] / kept[:, None]).log())


def intervals(loc: Tensor, rates: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Return from where to where ``(w - c_z)² / 2 + step rate_z`` is least for z: ``[R, 1 + K]``, zero first.

    The costs of symbols j and k with ``c_j < c_k`` are equal at
    ``(c_j + c_k)/2 + step (rate_k - rate_j)/(c_k - c_j)``: a symbol rules between the last such point to its left
    and the first to its right, or nowhere.

    Args:
        loc: codewords, ``[R, K]``.
        rates: nats, ``[R, 1 + K]``.
        step: ``β / h``, squared units of a weight, ``[R]``.
    """
    values, order = pad(loc.double(), (1, 0)).sort(stable=True, dim=1)  # [R, 1 + K], zero among them
    rates = rates.double().gather(1, order)
    gap = values[:, None, :] - values[:, :, None]  # [R, j, k]: c_k - c_j, not negative for j < k
    dearer = rates[:, None, :] - rates[:, :, None]
    meeting = 0.5 * (values[:, None, :] + values[:, :, None]) + step[:, None, None] * dearer / gap
    meeting = meeting.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)  # equal codewords
    ordered = torch.ones_like(meeting, dtype=torch.bool).triu(1)  # only j < k mean anything
    start = meeting.masked_fill(~ordered, -torch.inf).amax(1)  # over j, those to the left: [R, k]
    end = meeting.masked_fill(~ordered, torch.inf).amin(2)  # over k, those to the right: [R, j]
    back = order.argsort(1)
    # A symbol that rules nowhere ends before it starts: its interval is made empty, not negative.
    return start.gather(1, back), torch.maximum(start, end).gather(1, back)


def posterior(latent: Tensor, loc: Tensor, rates: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Return the best codeword of each weight, int64 ``[G, n]``, and its log-odds against zero, ``[G, n]``.

    Args:
        latent: w, ``[G, n]``.
        loc: codewords, ``[G, K]``.
        rates: nats, ``[1 + K]``.
        step: ``β / h``.
    """
    rates = rates.to(latent.dtype)
    cost = (latent - loc.T[:, :, None]).square_().mul_(0.5).add_(step * rates[1:, None, None])  # [K, G, n]
    best, codes = cost.min(0)  # [G, n] each
    # Costs are in units of β/h: divided by it they are negative log-probabilities, in nats.
    return codes, (0.5 * latent.square() + step * rates[0] - best) / step


def coded_bits(counts: Tensor, codebooks: Tensor | float = 1, codeword_bits: int = 16) -> Tensor:
    """Return what symbols that occur ``counts [S, 1 + K]`` times take in a file, ``[S]``.

    Their stream under the site's own frequencies, a byte a symbol for these, and the codewords that are used.

    Args:
        counts: of the symbols of each site, zero first.
        codebooks: groups of each site, ``[S]``.
        codeword_bits: what a codeword takes.
    """
    counts = counts.double()
    stream = torch.special.entr(counts).sum(1) - torch.special.entr(counts.sum(1))  # n ln n - Σ n_z ln n_z = n H
    used = (counts[:, 1:] > 0).sum(1)
    return stream / math.log(2) + _CODER_BITS + 8 * (used + 1) + codeword_bits * used * codebooks


def code_nats(counts: Tensor, rates: Tensor) -> float:
    """Return what symbols that occur ``counts`` times take at these rates; some can never occur."""
    return float(torch.where(counts > 0, counts * rates, 0.0).sum())


@dataclass(frozen=True)
class Fit:
    """What a fit came to.

    Attributes:
        beta: β on the ELBO's KL.
        bits: what symbols, tables and codebooks are going to take in the file.
        kl: ``-Σ log p(z_i)``, nats.
    """

    beta: float
    bits: float
    kl: float


class RateDistortion:
    """E- and M-steps of the learned prior over all sites of a guide.

    :meth:`fit` writes the guide's variational parameters: gate logits become the posterior log-odds of not being
    zero, σ becomes ``√(β/h)`` and π the prior's, so that the guide's own responsibilities
    ``softmax(log π_k + log N(w; μ_k, σ²))`` are the E-step's.

    Args:
        guide: whose sites are fitted; where ranks divide them, all call everything here together.
        pool_inclusion: one ρ for all sites: a symbol that is rare in a sparse layer then costs no more than
            elsewhere, which keeps layers from starving.
        inclusion: ρ at the start. It keeps a codeword near zero from taking zero's place.
        codeword_bits: what a codeword takes in the file.

    Attributes:
        symbol_prior: p(z), fitted last.
        beta: of the last fit.
        strength: of what a law of zeros knows beyond ρ; of no effect here.
    """

    strength = 1.0

    def __init__(
        self,
        guide: SpikeGMMGuide,
        pool_inclusion: bool = False,
        inclusion: float = 0.5,
        codeword_bits: int = 16,
    ) -> None:
        self.sites = guide.own_sites()
        self.pool_inclusion, self.codeword_bits = pool_inclusion, codeword_bits
        # Side by side, as many codes as the site of most has: those that another lacks are never chosen.
        self._most = max(site.num_components for site in self.sites.values())
        # One π for all groups of a site: their symbols are coded with one table.
        mixing = [self._padded(_mean_mixing(site)) for site in self.sites.values()]
        self.symbol_prior = SymbolPrior(mixing[0].new_full((len(mixing),), inclusion), torch.stack(mixing).log())
        self.beta = 0.0
        self._rows = [site.num_groups for site in self.sites.values()]  # codebooks here
        groups = [site.num_codebooks for site in self.sites.values()]
        self._groups = torch.tensor(groups, device=self.symbol_prior.inclusion.device)

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
        """Alternate M- and E-steps, at β or, where ``bits`` is given, at the β whose symbols take so many.

        Args:
            precision: h of each site.
            bits: what symbols, tables and codebooks of all sites may take.
            beta: β.
            rounds: pairs of M- and E-steps.
            move_codewords: whether codewords become the means of their latents, too.
        """
        latents, loc, h = self._inputs(precision)

        def beta_now() -> float:
            return (
                beta if bits is None else solve_beta(partial(self._bits_taken, latents, loc, h), bits, self.beta)
            )

        # The first E-step goes on from the last fit's β: its prior was fitted there.
        self.beta = self.beta or beta_now()
        totals, counts, means = latents.symbols(loc, self.symbol_prior, self.beta / h)
        for _ in range(rounds):
            self.symbol_prior = fit_symbol_prior(totals, self.pool_inclusion, self.symbol_prior.possible)
            if move_codewords:
                # A codeword without weights has no mean; it stays, and may be chosen at another β.
                loc = torch.where(counts[:, 1:] > 0, means[:, 1:].to(loc.dtype), loc)
                loc = self._on_grids(loc, counts[:, 1:])
            self.beta = beta_now()
            totals, counts, means = latents.symbols(loc, self.symbol_prior, self.beta / h)
        self._write(loc, self.beta / h)
        return Fit(self.beta, self._bits(totals), code_nats(totals, self.symbol_prior.rates))

    @torch.no_grad()
    def bits_at(self, beta: float, precision: Mapping[str, float]) -> float:
        """Return the bits after one E-step at β; nothing is changed."""
        latents, loc, h = self._inputs(precision)
        return self._bits_taken(latents, loc, h, beta)

    def _inputs(self, precision: Mapping[str, float]) -> tuple["_SortedLatents", Tensor, Tensor]:
        """Return latents; codewords of all groups of all sites ``[R, K]``; h of the sites ``[S]``."""
        latents = _SortedLatents([*self.sites.values()])
        return latents, self._codewords(), self._curvature(precision)

    def _codewords(self) -> Tensor:
        return torch.cat([self._padded(site.loc.detach()) for site in self.sites.values()])

    def _on_grids(self, loc: Tensor, counts: Tensor) -> Tensor:
        """Return codewords in the form that each site's have, given how many weights have each."""
        parts = zip(self.sites.values(), loc.split(self._rows), counts.split(self._rows), strict=True)
        return torch.cat(
            [
                self._padded(site.on_grid(own[:, : site.num_components], mass[:, : site.num_components]))
                for site, own, mass in parts
            ]
        )

    def _padded(self, values: Tensor) -> Tensor:
        return pad(values, (0, self._most - values.shape[-1]))

    def _curvature(self, precision: Mapping[str, float]) -> Tensor:
        return self.symbol_prior.inclusion.new_tensor([precision[name] for name in self.sites])

    def _bits_taken(self, latents: "_SortedLatents", loc: Tensor, h: Tensor, beta: float) -> float:
        return self._bits(latents.symbols(loc, self.symbol_prior, beta / h)[0])

    def _bits(self, totals: Tensor) -> float:
        return float(coded_bits(totals, self._groups, self.codeword_bits).sum())

    def _write(self, loc: Tensor, step: Tensor) -> None:
        """Make the posterior the guide's."""
        rows = loc.split(self._rows)
        for i, site in enumerate(self.sites.values()):
            own = rows[i][:, : site.num_components]
            codes, log_odds = self._posterior(i, site, own, float(step[i]))
            # Values become the data of parameters that are there, which optimizers know: nothing may share it.
            site.loc = own.clone()
            site.scale = torch.full_like(site.loc, math.sqrt(step[i]))
            log_mixing = self.symbol_prior.log_mixing[i, : site.num_components]
            site.mixing_logits = log_mixing.to(site.loc).expand(site.loc.shape).clone()
            site.gate_logit = log_odds.view(site.shape)
            site.codes.copy_(codes)

    def _posterior(self, index: int, site: SiteGuide, loc: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """Return codes and log-odds of a site's weights, as :func:`posterior`."""
        rates = self.symbol_prior.rates[index, : 1 + loc.shape[1]]
        return posterior(site.grouped(site.latent), loc, rates, step)

    def inclusions(self) -> dict[str, Tensor]:
        """Return ρ of each site."""
        return dict(zip(self.sites, self.symbol_prior.inclusion, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        prior = self.symbol_prior
        return {"inclusion": prior.inclusion, "log_mixing": prior.log_mixing, "beta": self.beta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        device = self.symbol_prior.inclusion.device
        self.symbol_prior = SymbolPrior(state["inclusion"].to(device), state["log_mixing"].to(device))
        self.beta = state["beta"]


def _mean_mixing(site: SiteGuide) -> Tensor:
    """Return π, the mean over a site's groups, those of all ranks, float64 ``[K]``."""
    own = site.mixing_logits.detach().double().softmax(-1).sum(0)
    # Of a codebook that ranks share each has the whole: they come to as many as there are ranks.
    every = site.gathered(torch.cat([own, own.new_tensor([site.num_groups])])).sum(0)
    return every[:-1] / every[-1]


class _SortedLatents:
    """Latents of all sites, sorted once: counts and sums of any interval by binary search.

    Args:
        sites: with latents ``[G, n]`` each, which may be rows of a site that ranks divide: all call this together.
    """

    def __init__(self, sites: list[SiteGuide]) -> None:
        self.sites = sites
        latents = [site.grouped(site.latent) for site in sites]
        self.values = [latent.detach().double().sort(1).values for latent in latents]
        self.sums = [pad(values.cumsum(1), (1, 0)) for values in self.values]  # [G, n + 1], in float64
        groups = torch.tensor([len(values) for values in self.values], device=latents[0].device)
        self.site_of_row = torch.arange(len(latents), device=groups.device).repeat_interleave(groups)
        #: Rows of which other ranks have weights, too: of each such site one.
        self.shared = torch.tensor([site.shares_codebook for site in sites], device=groups.device)[
            self.site_of_row
        ]

    def symbols(self, loc: Tensor, prior: SymbolPrior, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count the best symbols: in each site ``[S, 1 + K]``; in each row ``[R, 1 + K]``, with latents' means.

        Args:
            loc: codewords, ``[R, K]``.
            prior: of the sites.
            step: ``β / h`` of each site, ``[S]``.
        """
        edges = intervals(loc, prior.rates[self.site_of_row], step[self.site_of_row])
        parts = [edge.split([len(values) for values in self.values]) for edge in edges]
        counts, totals = [], []
        for values, total, start, end in zip(self.values, self.sums, *parts, strict=True):
            first, behind = (torch.searchsorted(values, edge.contiguous()) for edge in (start, end))
            counts.append(behind - first)  # [G, 1 + K]
            totals.append(total.gather(1, behind) - total.gather(1, first))
        of_rows, sums = torch.cat(counts), torch.cat(totals)  # [R, 1 + K], R = Σ G
        # Of the sites of all ranks, in one message: counts are exact in float64, and sums have one order.
        own = sums.new_zeros(len(self.values), 2, of_rows.shape[1])
        own.index_add_(0, self.site_of_row, torch.stack([of_rows.double(), sums], 1))
        every = self.sites[0].gathered(own).sum(0)
        of_sites = every[:, 0].to(of_rows)
        if self.shared.any():
            whole = self.site_of_row[self.shared]
            of_rows[self.shared], sums[self.shared] = of_sites[whole], every[whole, 1]
        return of_sites, of_rows, sums / of_rows.clamp(min=1)


def solve_beta(falling: Callable[[float], float], target: float, guess: float) -> float:
    """Return β at which a function that falls with β has come down to a target, looked for around a guess.

    Beyond ``e^±60`` nothing changes any more: every weight is on one symbol, or on its nearest codeword. Where the
    target is out of reach the end of that range is returned, at which ``1/β`` is still a number of float32.
    """
    low = high = math.log(guess or _FIRST_BETA)  # sizes fall evenly with log β, not with β
    stride = 0.02  # β moves little from fit to fit: an interval around the last one costs few steps
    while high < _LAST_LOG_BETA and falling(math.exp(high)) > target:
        low, high, stride = high, min(high + stride, _LAST_LOG_BETA), 2 * stride
    stride = 0.02
    while low > -_LAST_LOG_BETA and falling(math.exp(low)) < target:
        high, low, stride = low, max(low - stride, -_LAST_LOG_BETA), 2 * stride
    return beta_for(falling, target, low, high, tolerance=1e-3)
