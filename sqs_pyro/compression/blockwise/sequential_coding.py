r"""Symbols of a whole weight matrix by coordinate ascent under a Gaussian likelihood with correlated weights.

The learned prior gives symbol z the probability ``p(z)``, a weight given z is ``c_z`` (``c_0 = 0``). Under the
likelihood of :class:`~sqs_pyro.compression.blockwise.laplace.LayerLikelihood` weights of a row are correlated, and
the ELBO of a one-hot posterior,

    Σ_i g_i/2 (c_{z_i} - w̄_i)ᵀ H (c_{z_i} - w̄_i) + β Σ_ij rate_{z_ij},    rate = -log p(z),

has no closed-form optimum. By the chain rule of Gaussians it is a sum over the inputs j, in any order, of

    g_i / (2 v_j) (c_{z_ij} - m_ij)² + β rate_{z_ij},

with m_ij the mean and ``v_j / g_i`` the variance of weight (i, j) given the weights that are coded already. The
E-step here chooses the best z_ij one input after the other (:func:`code_sequentially`: with equal rates it is
GPTQ, Frantar et al. 2023; with a diagonal H it is that of
:mod:`sqs_pyro.compression.finetune.rate_distortion`), then again given all others (:func:`improve`). Given the
symbols, the best codewords are a least-squares problem
(:mod:`~sqs_pyro.compression.blockwise.codebooks`), and the best ``p(z)`` are the symbols' shares: the M-step.

An E-step codes the rows that are a rank's own, all at once where each number is computed for itself; products of
matrices go by units of rows, see :mod:`~sqs_pyro.compression.blockwise.shares`.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sqs_pyro.arguments import is_positive, is_whole
from sqs_pyro.compression.bisection import beta_for
from sqs_pyro.compression.blockwise.codebooks import (
    Codebook,
    FreeCodebook,
    UniformCodebook,
    best_parts,
)
from sqs_pyro.compression.blockwise.first_codewords import with_zero
from sqs_pyro.compression.blockwise.laplace import LayerLikelihood
from sqs_pyro.compression.finetune.rate_distortion import coded_bits, fit_symbol_prior
from sqs_pyro.errors import ArgumentError
from sqs_pyro.kernels.coding import chain_coding, conditional_coding, load_coding
from sqs_pyro.packing import CodedTensor
from sqs_pyro.packing.coded import MAX_COMPONENTS, scaled

_PANEL = 64  # inputs whose effect on all later ones is applied by one matrix product
_TOLERANCE = 0.01  # bits a weight by which a size that was asked for may be missed


@dataclass(frozen=True, eq=False)
class Coding:
    """What a weight matrix is coded as.

    Attributes:
        symbols: z, uint8 ``[N, M]``, of all rows; 0 is zero.
        codewords: c of the symbols 1 to K, float32 ``[K]``, ascending.
        beta: β.
        parts: scales of equal parts of all rows, float16 in float32 ``[N, B]``; None: there are none.
    """

    symbols: Tensor
    codewords: Tensor
    beta: float
    parts: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """How often each symbol occurs, int64 ``[1 + K]``, zero first."""
        return _counts(self.symbols, len(self.codewords), slice(None))

    @property
    def bits_per_weight(self) -> float:
        """Bits that symbols, their table and the codewords take in a file, for each weight; scales not."""
        return float(coded_bits(self.counts[None])) / self.symbols.numel()

    def dense(self) -> Tensor:
        """Return the weights, ``[N, M]``."""
        return scaled(with_zero(self.codewords)[self.symbols.long()], self.parts)

    def coded(self, scales: Tensor | None = None) -> CodedTensor:
        """Return it as what is packed, codewords in float16.

        Args:
            scales: what rows were divided by before they were coded, ``[N]``; of what has scales of parts, none.
        """
        mask = self.symbols > 0
        codes = (self.symbols.int() - 1).clamp(min=0).to(torch.uint8)  # zeros have code 0, which the mask hides
        scales = scales if self.parts is None else self.parts.float().cpu()
        return CodedTensor(codes.cpu(), mask.cpu(), self.codewords.half().float()[None].cpu(), scales)


def code_sequentially(
    likelihood: LayerLikelihood, codewords: Tensor, rates: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Choose the best symbols, one input after the other: the E-step.

    Args:
        likelihood: of the layer.
        codewords: c, ``[K]``.
        rates: nats, ``[1 + K]``, zero first.
        beta: β.

    Returns:
        symbols of the likelihood's own rows, uint8 ``[n, M]``, and the means they were chosen for, ``[n, M]``.
    """
    order, upper = likelihood.conditioning
    left = likelihood.mean.T[order].contiguous()  # [M, n]: means of the weights that are not coded yet
    values, rates = with_zero(codewords).to(left), rates.to(left)
    price = beta * upper.diagonal().square()[:, None] / likelihood.importance.to(left)  # [M, n]: β v_j / g_i
    units = None if likelihood.units is None else likelihood.units.T[order].to(left).contiguous()
    price = price if units is None else price / units.square()
    symbols = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    load_coding(left.device)
    for start in range(0, len(left), _PANEL):
        panel, own = left[start : start + _PANEL], slice(start, start + _PANEL)
        errors = torch.empty_like(panel)  # [P, n], each divided by its U_jj
        # Means behind move by -e U_jk / U_jj: a rank-one update, for now within the panel only.
        unit = None if units is None else units[own]
        chain_coding(panel, upper[own, own], values, rates, price[own], unit, symbols[own], errors)
        # `panel` is a view of `left`, which thus keeps each mean as it was when its symbol was chosen.
        behind = start + len(panel)
        for part in likelihood.shares.parts:
            left[behind:, part] -= upper[start:behind, behind:].T @ errors[:, part].contiguous()
    back = order.argsort()
    return symbols[back].T.contiguous(), left[back].T.contiguous()


def improve(
    likelihood: LayerLikelihood, symbols: Tensor, codewords: Tensor, rates: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Choose again, in a further E-step, each weight's best symbol given all others, input after input.

    The Gaussian's full conditional of weight (i, j) has the mean ``q_ij - ((q_i - w̄_i)ᵀ H)_j / H_jj`` and the
    variance ``1 / (g_i H_jj)``. No choice can raise the objective (iterated conditional modes, Besag 1986).

    Args:
        likelihood: of the layer.
        symbols: uint8 ``[n, M]``, the choice so far of the likelihood's own rows.
        codewords: c, ``[K]``.
        rates: nats, ``[1 + K]``, zero first.
        beta: β.

    Returns:
        symbols, and the means that they were chosen for, as :func:`code_sequentially`.
    """
    order, curvature = likelihood.factors.order, likelihood.factors.ordered
    diagonal = curvature.diagonal()
    values, rates = with_zero(codewords).to(curvature), rates.to(curvature)
    price = beta / (diagonal[:, None] * likelihood.importance.to(curvature))  # [M, n]
    units = None if likelihood.units is None else likelihood.units.T[order].to(curvature).contiguous()
    price = price if units is None else price / units.square()
    symbols = symbols.T[order].contiguous()
    weight = values[symbols.long()]  # [M, n]
    weight = weight if units is None else weight * units
    slope = (weight - likelihood.mean.T[order]).contiguous()  # becomes [M, n]: H (q - w̄), kept up to date
    for part in likelihood.shares.parts:
        slope[:, part] = curvature @ slope[:, part].contiguous()
    means = torch.empty_like(weight)
    load_coding(weight.device)
    for start in range(0, len(weight), _PANEL):
        own = slice(start, start + _PANEL)
        panel = weight[own]
        changes = torch.empty_like(panel)  # [P, n]; `weight` itself stays: nothing reads a coded input again
        unit = None if units is None else units[own]
        operands = slope[own], panel, curvature[own, own], values, rates, price[own], unit
        conditional_coding(*operands, symbols[own], means[own], changes)
        behind = start + len(panel)
        for part in likelihood.shares.parts:
            slope[behind:, part] += curvature[behind:, start:behind] @ changes[:, part].contiguous()
    back = order.argsort()
    return symbols[back].T.contiguous(), means[back].T.contiguous()


def fit(
    likelihood: LayerLikelihood,
    *,
    bits: float | None = None,
    beta: float | None = None,
    max_components: int = MAX_COMPONENTS - 1,
    rounds: int = 2,
    uniform: bool = False,
) -> Coding:
    """Code a weight matrix at β, or at the β whose symbols, table and codewords take ``bits`` a weight.

    Args:
        likelihood: of the layer, positive definite.
        bits: bits for each weight; or
        beta: β on the rates.
        max_components: K at most, 255 or less; of a uniform codebook K itself.
        rounds: pairs of E- and M-steps.
        uniform: whether codewords are whole numbers times one step.

    Raises:
        ArgumentError: not exactly one of ``bits`` and ``beta`` is given, or one is out of range.
    """
    _check(bits, beta, max_components, rounds)
    codebook = UniformCodebook(max_components) if uniform else FreeCodebook(max_components)
    if beta is not None:
        return _fit_at(likelihood, beta, codebook, rounds)
    assert bits is not None
    beta = _first_beta(likelihood, bits, codebook)
    for _ in range(4):
        found = _fit_at(likelihood, beta, codebook, rounds)
        missed = found.bits_per_weight - bits
        if abs(missed) < _TOLERANCE:
            break
        beta *= 4**missed  # Δ² is proportional to β, and a bit more or less is a factor of 2 in Δ
    return found


def _fit_at(likelihood: LayerLikelihood, beta: float, codebook: Codebook, rounds: int) -> Coding:
    codewords, rates = codebook.start(likelihood, beta)
    shares = likelihood.shares
    symbols, _ = code_sequentially(likelihood, codewords, rates, beta)
    for _ in range(rounds):
        codewords = codebook.best(likelihood, symbols, codewords)
        likelihood = _with_best_parts(likelihood, symbols, codewords)
        counts = shares.sum(partial(_counts, symbols, len(codewords)))
        rates = fit_symbol_prior(counts[None]).rates[0]
        symbols, _ = improve(likelihood, symbols, codewords, rates, beta)
    # Once more, as the last E-step has changed symbols: shares need no fit, for the file counts anew.
    codewords = codebook.best(likelihood, symbols, codewords)
    parts = None if likelihood.parts is None else shares.joined(likelihood.parts)
    return _ascending(Coding(shares.joined(symbols), codewords, beta, parts))


def _with_best_parts(likelihood: LayerLikelihood, symbols: Tensor, codewords: Tensor) -> LayerLikelihood:
    if likelihood.parts is None:
        return likelihood
    return replace(likelihood, parts=best_parts(likelihood, symbols, codewords))


def _first_beta(likelihood: LayerLikelihood, bits: float, codebook: Codebook) -> float:
    """Return β at which an independent look at the weights, on the grid of that β, takes ``bits``."""

    def entropy(beta: float) -> float:
        _, rates = codebook.start(likelihood, beta)
        return float((rates.neg().exp() * rates).sum()) / math.log(2)

    return beta_for(entropy, bits, -80.0, 80.0, tolerance=0.01)


def _counts(symbols: Tensor, num_components: int, part: slice) -> Tensor:
    """Return how often each symbol occurs in a unit of rows, int64 ``[1 + K]``, zero first."""
    return torch.bincount(symbols[part].reshape(-1).long(), minlength=1 + num_components)


def _ascending(coding: Coding) -> Coding:
    """Put codewords in order again, which least squares may have changed."""
    codewords, order = coding.codewords.sort(stable=True)
    place = torch.cat([order.new_zeros(1), 1 + order.argsort()]).to(torch.uint8)  # old symbol -> new; 0 stays 0
    return replace(coding, symbols=place[coding.symbols.long()], codewords=codewords)


def _check(bits: float | None, beta: float | None, max_components: int, rounds: int) -> None:
    if (bits is None) == (beta is None):
        raise ArgumentError(f"Give either bits or beta to code a layer, not bits={bits!r} and beta={beta!r}.")
    for name, value in (("bits", bits), ("beta", beta)):
        if value is not None and not is_positive(value):
            raise ArgumentError(f"{name} is {value!r}, but must be positive and finite.")
    if not is_whole(max_components, 1, MAX_COMPONENTS - 1):
        raise ArgumentError(f"max_components is {max_components!r}, but must be 1 to {MAX_COMPONENTS - 1}.")
    if not is_whole(rounds, 1):
        raise ArgumentError(f"rounds is {rounds!r}, but must be at least 1.")
