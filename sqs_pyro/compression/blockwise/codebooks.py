r"""The codewords of a layer: free ones, or whole numbers times one step.

**Free.** Each of the K codewords goes where the likelihood of the weights that have it is highest, the M-step of
:mod:`~sqs_pyro.compression.blockwise.sequential_coding`, from where
:mod:`~sqs_pyro.compression.blockwise.first_codewords` begins.

**Uniform.** Codewords are ``s n`` with n the whole numbers from ``-⌈K/2⌉`` to ``⌊K/2⌋``, as the integer kernels of
other runtimes multiply. Given the n of all weights the likelihood is a quadratic in s, whose best is

    s = Σ_i g_i n_iᵀ H w̄_i / Σ_i g_i n_iᵀ H n_i,

over all rows i while symbols are chosen, and of each row for itself once they are: the scales of outputs, 16 bits
each, that such runtimes keep anyway.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sqs_pyro.compression.blockwise.first_codewords import (
    clusters,
    even_grid,
    few,
    is_few,
    merged_grid,
    with_zero,
)
from sqs_pyro.compression.blockwise.laplace import LayerLikelihood
from sqs_pyro.compression.finetune.rate_distortion import fit_symbol_prior
from sqs_pyro.distributions.uniform_grid import grid_numbers
from sqs_pyro.packing.coded import rounded_scales

_PRECISION = 1e-8  # of the codewords' normal equations, as a share of the squared residual at the start
_STEPS = 24  # tried between that of β and one that reaches the largest weight
_SWEEPS = 2  # over the scales of a row's parts in one M-step


class Codebook(Protocol):
    """How codewords are chosen: first, and given the symbols."""

    def start(self, likelihood: LayerLikelihood, beta: float) -> tuple[Tensor, Tensor]:
        """Return codewords ``[K]``, ascending, and rates in nats ``[1 + K]``, zero first, to begin with."""

    def best(self, likelihood: LayerLikelihood, symbols: Tensor, codewords: Tensor) -> Tensor:
        """Return the codewords ``[K]`` under which symbols ``[n, M]`` are most likely; unused ones may stay."""


class FreeCodebook:
    """At most so many codewords of any values."""

    def __init__(self, max_components: int) -> None:
        self.max_components = max_components
        self._clusters: Tensor | None = None

    def start(self, likelihood: LayerLikelihood, beta: float) -> tuple[Tensor, Tensor]:
        """Return the even grid of β, merged to K values, or where they are too few for it those of :func:`few`."""
        even = even_grid(likelihood, beta)
        if not is_few(even, self.max_components):
            return merged_grid(even, self.max_components, likelihood)
        if self._clusters is None:  # which is the same for every β
            self._clusters = clusters(likelihood, self.max_components)
        return few(likelihood, beta, self._clusters)

    def best(self, likelihood: LayerLikelihood, symbols: Tensor, codewords: Tensor) -> Tensor:
        """Return the best value of each, see :func:`best_codewords`."""
        return best_codewords(likelihood, symbols, codewords)


class UniformCodebook:
    """K codewords that are whole numbers times one step."""

    def __init__(self, num_components: int) -> None:
        self.places = grid_numbers(num_components)  # n of the symbols 1 to K

    def start(self, likelihood: LayerLikelihood, beta: float) -> tuple[Tensor, Tensor]:
        """Return whole numbers times the step that β asks for, or a wider one where they must reach farther."""
        found, low, high = likelihood.histogram, int(self.places[0]), max(int(self.places[-1]), 0)
        step = self._first_step(likelihood, beta)
        places = (found.values / step).round().clamp(low, high).long() - low
        counts, _ = found.gathered(places, high - low + 1)
        kept = torch.cat([counts[:-low], counts[1 - low :]])
        rates = fit_symbol_prior(torch.cat([counts[-low, None], kept])[None]).rates[0]
        return step * self.places.to(likelihood.mean), rates

    def _first_step(self, likelihood: LayerLikelihood, beta: float) -> float:
        """Return the step that β asks for, or the best wider one where K values do not reach far enough."""
        found, reach = likelihood.histogram, likelihood.reach
        low, high = int(self.places[0]), max(int(self.places[-1]), 0)
        asked = min(math.sqrt(12 * beta / likelihood.mean_precision), reach) or 1.0
        widest = reach / max(high, 1)  # the side of fewer values decides how wide is wide enough
        if widest <= asked:
            return asked

        def error(step: float) -> float:
            rounded = (found.values / step).round().clamp(low, high) * step
            return float(found.mass @ (found.values - rounded).square())

        # Values that do not even reach one root mean square are never best.
        squares = float(found.counts @ found.values.square() / found.counts.sum())
        least = max(asked, math.sqrt(squares) / -low)
        # Where weights are cut off the error is no smooth function of the step: a few of them are looked at.
        tried = [least * (widest / least) ** (i / (_STEPS - 1)) for i in range(_STEPS)]
        return min(tried, key=error)

    def best(self, likelihood: LayerLikelihood, symbols: Tensor, codewords: Tensor) -> Tensor:
        """Return the whole numbers times the best step."""

        def totals(part: slice) -> Tensor:
            g = likelihood.importance[part].clone()
            return torch.stack([value @ g for value in self._quadratic(likelihood, symbols, part)])

        along, size = likelihood.shares.sum(totals).tolist()
        # Of zeros alone any step is as good.
        step = along / size if size > 0 else float(codewords[-1] / self.places[-1])
        return (step * self.places.double()).to(codewords)

    def row_scales(self, likelihood: LayerLikelihood, symbols: Tensor, otherwise: Tensor) -> Tensor:
        """Return the best step of each own row, float16 in float32 ``[n]``.

        Args:
            likelihood: of the layer.
            symbols: uint8 ``[n, M]``.
            otherwise: ``[n]``, of rows of which the symbols say nothing, or nothing positive.
        """
        units = [torch.stack(self._quadratic(likelihood, symbols, part)) for part in likelihood.shares.parts]
        along, square = torch.cat(units, 1) if units else otherwise.new_zeros(2, 0)
        found = along / square
        usable = (square > 0) & (found > 0)
        return rounded_scales(torch.where(usable, found, otherwise.to(found)).float())

    def _quadratic(self, likelihood: LayerLikelihood, symbols: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Return ``n_iᵀ H w̄_i`` and ``n_iᵀ H n_i`` of each row of a unit."""
        n = with_zero(self.places).to(likelihood.mean)[symbols[part].long()]
        n = n if likelihood.units is None else n * likelihood.units[part]
        image = n @ likelihood.curvature
        return (image * likelihood.mean[part]).sum(1), (image * n).sum(1)


def best_codewords(likelihood: LayerLikelihood, symbols: Tensor, codewords: Tensor) -> Tensor:
    """Return the codewords ``[K]`` that maximise the likelihood given the symbols, the M-step; unused ones stay.

    They solve the normal equations ``A c = b`` with ``A_kl = Σ_i g_i 1[z_i = k]ᵀ H 1[z_i = l]`` and
    ``b_k = Σ_i g_i 1[z_i = k]ᵀ H w̄_i``: here by conjugate gradients from the present codewords, each step of which
    takes one product of the size of the weight with H instead of the K that A itself would take.

    Args:
        likelihood: of the layer.
        symbols: uint8 ``[n, M]``, of the likelihood's own rows.
        codewords: c at present, ``[K]``.
    """
    size, shares = 1 + len(codewords), likelihood.shares
    g, units = likelihood.importance[:, None], likelihood.units  # [n, 1], [n, M]
    price = g if units is None else g * units
    flat = [symbols[part].reshape(-1).long() for part in shares.parts]  # of each unit

    def by_symbol(values: Callable[[slice, Tensor], Sequence[Tensor]]) -> Tensor:
        """Sum each of the ``values`` of all units' weights by symbol, times their g and u: ``[values, K]``."""
        unit = iter(flat)

        def totals(part: slice) -> Tensor:
            places = next(unit)
            # Sums over all weights of a symbol: in float64, where millions of them do not cancel.
            weighted = ((price[part] * value).reshape(-1).double() for value in values(part, places))
            return torch.stack([torch.bincount(places, weights=each, minlength=size)[1:] for each in weighted])

        return shares.sum(totals)

    def image(c: Tensor, part: slice, places: Tensor) -> Tensor:
        """Return the weights of a unit with codewords c, times H."""
        weight = with_zero(c).to(likelihood.mean).index_select(0, places).view(symbols[part].shape)
        return (weight if units is None else weight * units[part]) @ likelihood.curvature

    def normal(c: Tensor) -> Tensor:
        """Return A c."""
        return by_symbol(lambda part, places: [image(c, part, places)])[0]

    found = codewords.double()
    # What is needed of the symbols once, in one message: A's part on the diagonal of H, which is all of it where
    # inputs are uncorrelated and 0 for codewords that are not used; b; and A c.
    scale, wanted, reached = by_symbol(
        lambda part, places: [
            likelihood.curvature.diagonal().expand(symbols[part].shape) * (1 if units is None else units[part]),
            likelihood.image(likelihood.mean, part),
            image(found, part, places),
        ]
    )
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    residual = (wanted - reached) * (inverse > 0)
    direction = inverse * residual
    power = first_power = float(residual @ direction)
    for _ in range(size):  # K steps would be enough, were numbers exact
        if power <= _PRECISION * first_power:
            break
        along = normal(direction)
        length = power / float(direction @ along)
        found = found + length * direction
        residual = residual - length * along
        before, power = power, float(residual @ (inverse * residual))
        direction = inverse * residual + power / before * direction
    return found.to(codewords)


def best_parts(likelihood: LayerLikelihood, symbols: Tensor, codewords: Tensor) -> Tensor:
    """Return the scales of parts of the own rows that are best given symbols and codewords, the M-step.

    With ``w_i = Σ_b s_ib n_ib``, n_ib the codewords of part b of a row, the likelihood is a quadratic in ``s_i``
    of B numbers: one after the other goes where it is highest, from where it is, and is rounded to float16.

    Args:
        likelihood: of the layer, with scales of parts.
        symbols: uint8 ``[n, M]``, of the likelihood's own rows.
        codewords: c, ``[K]``.

    Returns:
        float16 in float32 ``[n, B]``; of a part of zeros alone, or one that should change its sign, as it was.
    """
    assert likelihood.parts is not None and likelihood.units is not None
    found = likelihood.parts.clone()
    size = likelihood.mean.shape[1] // found.shape[1]
    for unit in likelihood.shares.parts:
        n = with_zero(codewords).to(likelihood.mean)[symbols[unit].long()]
        difference = n * likelihood.units[unit] - likelihood.mean[unit]
        slope = difference @ likelihood.curvature  # [r, M], kept up to date
        for _ in range(_SWEEPS):
            for b in range(found.shape[1]):
                own = slice(b * size, (b + 1) * size)
                image = n[:, own].contiguous() @ likelihood.curvature[own]
                along, square = (slope[:, own] * n[:, own]).sum(1), (image[:, own] * n[:, own]).sum(1)
                before = found[unit, b]
                best = before - along / square
                usable = (square > 0) & (best > 0)
                change = torch.where(usable, rounded_scales(best).to(found) - before, torch.zeros_like(before))
                slope += change[:, None] * image
                found[unit, b] = before + change
    return found
