"""A lower bound on the KL between Gaussian mixtures: what is left of it when the line is cut into cells.

By the data-processing inequality ``KL(Q‖P) <= KL(q‖p)`` for the masses Q, P that two distributions give to the
cells of any partition: what only knows the cell can tell them apart no better. With a codebook's components in
cells of their own little is lost, and every finer partition loses less.
"""

import torch
from torch import Tensor

from sqs_pyro.distributions.codebook import Codebook

_OFFSETS = (-2.0, -1.2, -0.4, 0.4, 1.2, 2.0)  # edges inside a component, in its standard deviations
_MOST_NUMBERS = 1 << 22  # of weights times cells that are held at once


def cell_divergence(weights_q: Tensor, loc_q: Tensor, scale_q: Tensor, p: Codebook) -> Tensor:
    """Return ``Σ_c Q_c log(Q_c / P_c) <= KL(Σ_k w_k N_k‖Σ_j v_j N'_j)``, ``[G, n]``, never negative.

    Args:
        weights_q: w of each weight's mixture, ``[G, n, K]``, summing to 1 over K.
        loc_q, scale_q: its components, ``[G, K]``.
        p: the other mixture, v of J components.
    """
    num_groups, num_numbers = len(loc_q), len(_OFFSETS) * (loc_q.shape[1] + p.num_components) ** 2
    if num_groups > 1 and num_groups * num_numbers > _MOST_NUMBERS:  # as many groups as weights, maybe
        # A few groups at a time: each has its own cells.
        parts = [x.split(max(1, _MOST_NUMBERS // num_numbers)) for x in (weights_q, loc_q, scale_q, *p)]
        several = zip(*parts, strict=True)
        return torch.cat([cell_divergence(w, loc, scale, Codebook(*other)) for w, loc, scale, *other in several])
    # Without gradients: every partition gives a bound, and where its edges are is a choice.
    edges = _edges(loc_q.detach(), scale_q.detach(), p.loc.detach(), p.scale.detach())
    mass_q = _log_masses(loc_q, scale_q, edges).exp()  # [G, K, C]
    log_p = _log_mixture_masses(p, edges)  # [G, C]
    at_once = max(1, _MOST_NUMBERS // log_p.numel())
    # [G, part, K] @ [G, K, C] -> [G, part, C]: masses of each weight's own mixture.
    return torch.cat([_divergence(part @ mass_q, log_p) for part in weights_q.split(at_once, dim=1)], dim=1)


def gaussian_cell_divergence(loc: Tensor, scale: Tensor, p: Codebook) -> Tensor:
    """Return what :func:`cell_divergence` does, for one Gaussian a weight, ``[G, n]``; the cells are those of p.

    Args:
        loc, scale: of each weight's Gaussian, ``[G, n]``.
        p: the mixture.
    """
    edges = _edges(p.loc, p.scale, p.loc, p.scale)
    log_p = _log_mixture_masses(p, edges)
    at_once = max(1, _MOST_NUMBERS // log_p.numel())
    parts = zip(loc.split(at_once, dim=1), scale.split(at_once, dim=1), strict=True)
    return torch.cat([_divergence(_log_masses(*part, edges).exp(), log_p) for part in parts], dim=1)


def _divergence(mass_q: Tensor, log_p: Tensor) -> Tensor:
    """Return ``Σ_c Q_c log(Q_c / P_c)``: ``[G, n, C], [G, C] -> [G, n]``."""
    # log P is -inf only in cells of no width, where Q has no mass but by rounding; `where` on both sides of the
    # logarithm keeps NaN out of gradients.
    has_mass = (mass_q > 0) & (log_p > -torch.inf).unsqueeze(1)
    log_ratio = mass_q.where(has_mass, 1.0).log() - log_p.where(log_p > -torch.inf, 0.0).unsqueeze(1)
    return (mass_q * log_ratio).where(has_mass, 0.0).sum(-1).clamp(min=0)  # ≥ 0 but for rounding


def _edges(loc_q: Tensor, scale_q: Tensor, loc_p: Tensor, scale_p: Tensor) -> Tensor:
    """Return the cells' inner edges, ascending, ``[G, C - 1]``: around components and midway between codewords."""
    ordered = loc_p.sort(-1).values
    edges = [(ordered[:, 1:] + ordered[:, :-1]) / 2, _around(loc_q, scale_q)]
    # A shared codebook's components would give every edge twice.
    if not torch.equal(loc_q, loc_p):
        edges.append(_around(loc_p, scale_p))
    return torch.cat(edges, dim=-1).sort(-1).values


def _around(loc: Tensor, scale: Tensor) -> Tensor:
    return (loc.unsqueeze(-1) + scale.unsqueeze(-1) * loc.new_tensor(_OFFSETS)).flatten(1)


def _log_mixture_masses(p: Codebook, edges: Tensor) -> Tensor:
    """Return ``log P(Σ_j v_j N'_j in cell c)``, ``[G, C]``."""
    return (p.log_mixing.unsqueeze(-1) + _log_masses(p.loc, p.scale, edges)).logsumexp(1)


def _log_masses(loc: Tensor, scale: Tensor, edges: Tensor) -> Tensor:
    """Return ``log P(N(μ_k, σ_k²) in cell c)``, ``[G, K, C]``; finite in the tails, -inf only in empty cells."""
    z = (edges.unsqueeze(1) - loc.unsqueeze(-1)) / scale.unsqueeze(-1)  # [G, K, C - 1]
    low = torch.nn.functional.pad(z, (1, 0), value=-torch.inf)
    high = torch.nn.functional.pad(z, (0, 1), value=torch.inf)
    low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)  # Φ is precise in its left tail
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    is_wide = log_low < log_high
    # log(e^high - e^low) = high + log(1 - e^(low - high)): a difference of masses that may both underflow.
    fraction = torch.where(is_wide, log_low - log_high, -1.0).exp()
    return torch.where(is_wide, log_high + torch.log1p(-fraction), -torch.inf)
