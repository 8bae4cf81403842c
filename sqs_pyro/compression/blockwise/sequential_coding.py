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
(:func:`best_codewords`), and the best ``p(z)`` are the symbols' shares: the M-step.
"""

import math
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import torch
from torch import Tensor

from sqs_pyro.arguments import is_positive, is_whole
from sqs_pyro.compression.bisection import beta_for
from sqs_pyro.compression.blockwise.laplace import LayerLikelihood
from sqs_pyro.compression.finetune.rate_distortion import coded_bits, fit_symbol_prior
from sqs_pyro.errors import ArgumentError
from sqs_pyro.packing import CodedTensor
from sqs_pyro.packing.coded import MAX_COMPONENTS

_PANEL = 64  # inputs whose effect on all later ones is applied by one matrix product
_FINEST = 2000  # points of the first grid on either side of zero
_PRECISION = 1e-8  # of the codewords' normal equations, as a share of the squared residual at the start
_TOLERANCE = 0.01  # bits a weight by which a size that was asked for may be missed


@dataclass(frozen=True, eq=False)
class Coding:
    """What a weight matrix is coded as.

    Attributes:
        symbols: z, uint8 ``[N, M]``; 0 is zero.
        codewords: c of the symbols 1 to K, float32 ``[K]``, ascending.
        means: m, ``[N, M]``: what each weight would best have been when its symbol was chosen.
        beta: β.
    """

    symbols: Tensor
    codewords: Tensor
    means: Tensor
    beta: float

    @property
    def counts(self) -> Tensor:
        """How often each symbol occurs, int64 ``[1 + K]``, zero first."""
        return torch.bincount(self.symbols.reshape(-1).long(), minlength=1 + len(self.codewords))

    @property
    def bits_per_weight(self) -> float:
        """Bits that symbols, their table and the codewords take in a file, for each weight."""
        return float(coded_bits(self.counts[None])) / self.symbols.numel()

    def dense(self) -> Tensor:
        """Return the weights, ``[N, M]``."""
        return _with_zero(self.codewords)[self.symbols.long()]

    def coded(self, scales: Tensor | None = None) -> CodedTensor:
        """Return it as what is packed, codewords in float16.

        Args:
            scales: what rows were divided by before they were coded, ``[N]``.
        """
        mask = self.symbols > 0
        codes = (self.symbols.int() - 1).clamp(min=0).to(torch.uint8)  # zeros have code 0, which the mask hides
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
        symbols, uint8 ``[N, M]``, and the means that they were chosen for, ``[N, M]``.
    """
    order, upper = likelihood.conditioning
    left = likelihood.mean.T[order].contiguous()  # [M, N]: means of the weights that are not coded yet
    values, rates = _with_zero(codewords).to(left), rates.to(left)
    price = beta * upper.diagonal().square()[:, None] / likelihood.importance.to(left)  # [M, N]: β v_j / g_i
    symbols = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    for start in range(0, len(left), _PANEL):
        panel, inside = left[start : start + _PANEL], upper[start : start + _PANEL, start : start + _PANEL]
        errors = torch.empty_like(panel)  # [P, N], each divided by its U_jj
        for j, mean in enumerate(panel):
            best = _cheapest(mean, values, rates, price[start + j])
            symbols[start + j] = best
            errors[j] = (mean - values[best]) / inside[j, j]
            # Means behind move by -e U_jk / U_jj: a rank-one update, for now within the panel only.
            panel[j + 1 :].addr_(inside[j, j + 1 :], errors[j], alpha=-1)
        # `panel` is a view of `left`, which thus keeps each mean as it was when its symbol was chosen.
        behind = start + len(panel)
        left[behind:].addmm_(upper[start:behind, behind:].T, errors, alpha=-1)
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
        symbols: uint8 ``[N, M]``, the choice so far.
        codewords: c, ``[K]``.
        rates: nats, ``[1 + K]``, zero first.
        beta: β.

    Returns:
        symbols, and the means that they were chosen for, as :func:`code_sequentially`.
    """
    order, _ = likelihood.conditioning
    curvature = likelihood.curvature[order][:, order]
    diagonal = curvature.diagonal()
    values, rates = _with_zero(codewords).to(curvature), rates.to(curvature)
    price = beta / (diagonal[:, None] * likelihood.importance.to(curvature))  # [M, N]
    symbols = symbols.T[order].contiguous()
    weight = values[symbols.long()]  # [M, N]
    slope = curvature @ (weight - likelihood.mean.T[order])  # [M, N]: H (q - w̄), kept up to date
    means = torch.empty_like(weight)
    for start in range(0, len(weight), _PANEL):
        inside = curvature[start : start + _PANEL, start : start + _PANEL]
        panel, slopes = weight[start : start + _PANEL], slope[start : start + _PANEL]
        changes = torch.empty_like(panel)  # [P, N]; `weight` itself stays: nothing reads a coded input again
        for j in range(len(panel)):
            mean = panel[j] - slopes[j] / inside[j, j]
            best = _cheapest(mean, values, rates, price[start + j])
            symbols[start + j], means[start + j] = best, mean
            changes[j] = values[best] - panel[j]
            slopes[j + 1 :].addr_(inside[j, j + 1 :], changes[j])
        slope[start + len(panel) :].addmm_(curvature[start + len(panel) :, start : start + len(panel)], changes)
    back = order.argsort()
    return symbols[back].T.contiguous(), means[back].T.contiguous()


def best_codewords(likelihood: LayerLikelihood, symbols: Tensor, codewords: Tensor) -> Tensor:
    """Return the codewords ``[K]`` that maximise the likelihood given the symbols, the M-step; unused ones stay.

    They solve the normal equations ``A c = b`` with ``A_kl = Σ_i g_i 1[z_i = k]ᵀ H 1[z_i = l]`` and
    ``b_k = Σ_i g_i 1[z_i = k]ᵀ H w̄_i``: here by conjugate gradients from the present codewords, each step of which
    takes one product of the size of the weight with H instead of the K that A itself would take.

    Args:
        likelihood: of the layer.
        symbols: uint8 ``[N, M]``.
        codewords: c at present, ``[K]``.
    """
    size = 1 + len(codewords)
    flat, g = symbols.reshape(-1).long(), likelihood.importance[:, None]  # [N M], [N, 1]

    def by_symbol(value: Tensor) -> Tensor:
        # Sums over all weights of a symbol: in float64, where millions of them do not cancel.
        return torch.bincount(flat, weights=(g * value).reshape(-1).double(), minlength=size)[1:]

    def normal(c: Tensor) -> Tensor:
        """A c."""
        return by_symbol(_with_zero(c).to(likelihood.mean)[symbols.long()] @ likelihood.curvature)

    # A's part on the diagonal of H: all of it where inputs are uncorrelated, 0 for codewords that are not used.
    scale = by_symbol(likelihood.curvature.diagonal().expand(symbols.shape))
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    found = codewords.double()
    residual = (by_symbol(likelihood.mean @ likelihood.curvature) - normal(found)) * (inverse > 0)
    direction = inverse * residual
    power = first_power = float(residual @ direction)
    for _ in range(size):  # K steps would be enough, were numbers exact
        if power <= _PRECISION * first_power:
            break
        image = normal(direction)
        length = power / float(direction @ image)
        found = found + length * direction
        residual = residual - length * image
        before, power = power, float(residual @ (inverse * residual))
        direction = inverse * residual + power / before * direction
    return found.to(codewords)


def grid(likelihood: LayerLikelihood, beta: float, max_components: int = MAX_COMPONENTS) -> tuple[Tensor, Tensor]:
    """Return codewords and rates to start from: the even grid that high-resolution theory gives for β.

    An even grid of step Δ loses ``h Δ²/24`` a weight of precision h and takes ``-log Δ`` plus a constant, so that
    the best is ``Δ = √(12 β / h)``, h the mean of ``g_i / v_j``.

    Args:
        likelihood: of the layer.
        beta: β.
        max_components: the outermost points of a grid with more are merged until so many are left.

    Returns:
        codewords ``[K]``, ascending, and their rates in nats, ``[1 + K]``, zero first.
    """
    weight = likelihood.mean
    reach = float(weight.abs().max())
    # No finer than the counts below can have places for.
    step = max(math.sqrt(12 * beta / likelihood.mean_precision), reach / _FINEST)
    step = min(step, reach) or 1.0  # at least the largest weight is no zero, unless all are
    half = max(math.ceil(reach / step), 1)
    places = (weight / step).round_().long().reshape(-1) + half  # 0 .. 2 half, zero in the middle
    counts = torch.bincount(places, minlength=2 * half + 1).double()
    used = counts > 0
    used[half] = False  # zero is no codeword
    if not used.any():
        used[-1] = True  # of a layer of zeros: a codeword that is never chosen
    values = step * torch.arange(-half, half + 1, dtype=torch.float64, device=weight.device)
    values, others = _merged(values[used], counts[used], max_components)
    return values.to(weight), fit_symbol_prior(torch.cat([counts[half, None], others])[None]).rates[0]


def fit(
    likelihood: LayerLikelihood,
    *,
    bits: float | None = None,
    beta: float | None = None,
    max_components: int = MAX_COMPONENTS - 1,
    rounds: int = 2,
) -> Coding:
    """Code a weight matrix at β, or at the β whose symbols, table and codewords take ``bits`` a weight.

    Args:
        likelihood: of the layer, positive definite.
        bits: bits for each weight; or
        beta: β on the rates.
        max_components: K at most, 255 or less.
        rounds: pairs of E- and M-steps.

    Raises:
        ArgumentError: not exactly one of ``bits`` and ``beta`` is given, or one is out of range.
    """
    _check(bits, beta, max_components, rounds)
    if beta is not None:
        return _fit_at(likelihood, beta, max_components, rounds)
    assert bits is not None
    beta = _first_beta(likelihood, bits, max_components)
    for _ in range(4):
        found = _fit_at(likelihood, beta, max_components, rounds)
        missed = found.bits_per_weight - bits
        if abs(missed) < _TOLERANCE:
            break
        beta *= 4**missed  # Δ² is proportional to β, and a bit more or less is a factor of 2 in Δ
    return found


def _fit_at(likelihood: LayerLikelihood, beta: float, max_components: int, rounds: int) -> Coding:
    codewords, rates = grid(likelihood, beta, max_components)
    symbols, means = code_sequentially(likelihood, codewords, rates, beta)
    for _ in range(rounds):
        codewords = best_codewords(likelihood, symbols, codewords)
        counts = torch.bincount(symbols.reshape(-1).long(), minlength=1 + len(codewords))
        rates = fit_symbol_prior(counts[None]).rates[0]
        symbols, means = improve(likelihood, symbols, codewords, rates, beta)
    # Once more, as the last E-step has changed symbols: shares need no fit, for the file counts anew.
    codewords = best_codewords(likelihood, symbols, codewords)
    return _ascending(Coding(symbols, codewords, means, beta))


def _first_beta(likelihood: LayerLikelihood, bits: float, max_components: int) -> float:
    """Return β at which an independent look at the weights, on the grid of that β, takes ``bits``."""

    def entropy(beta: float) -> float:
        _, rates = grid(likelihood, beta, max_components)
        return float((rates.neg().exp() * rates).sum()) / math.log(2)

    return beta_for(entropy, bits, -80.0, 80.0, tolerance=0.01)


def _cheapest(mean: Tensor, values: Tensor, rates: Tensor, price: Tensor) -> Tensor:
    """Return ``argmin_z (c_z - m)² / 2 + price rate_z``, int64 ``[N]``."""
    # [1 + K, N], in place: this runs once for every input of every layer.
    return (mean - values[:, None]).square_().mul_(0.5).addcmul_(rates[:, None], price).argmin(0)


def _merged(values: Tensor, counts: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Merge neighbours, the pair that adds least squared error first, until ``size`` values are left."""
    n = len(values)
    if n <= size:
        return values, counts
    value, count = values.tolist(), counts.tolist()
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))  # neighbours among those that are left

    def added(i: int) -> float:
        j = after[i]
        if j == n:
            return math.inf  # the last has no next to be merged with
        apart = value[j] - value[i]
        return count[i] * count[j] / (count[i] + count[j]) * (apart * apart)

    errors = [added(i) for i in range(n)]
    queue = [(error, i) for i, error in enumerate(errors)]
    heapify(queue)
    merged: set[int] = set()
    while n - len(merged) > size:
        error, i = heappop(queue)
        if i in merged or error != errors[i]:
            continue  # of a pair that there is no longer
        j = after[i]
        total = count[i] + count[j]
        value[i] = (count[i] * value[i] + count[j] * value[j]) / total
        count[i], after[i] = total, after[j]
        merged.add(j)
        if after[i] < n:
            before[after[i]] = i
        for k in (before[i], i):  # the pairs that the merged value is in
            if k >= 0:
                errors[k] = added(k)
                heappush(queue, (errors[k], k))
    left = [i for i in range(n) if i not in merged]
    return values.new_tensor([value[i] for i in left]), counts.new_tensor([count[i] for i in left])


def _ascending(coding: Coding) -> Coding:
    """Put codewords in order again, which least squares may have changed."""
    codewords, order = coding.codewords.sort(stable=True)
    place = torch.cat([order.new_zeros(1), 1 + order.argsort()]).to(torch.uint8)  # old symbol -> new; 0 stays 0
    return Coding(place[coding.symbols.long()], codewords, coding.means, coding.beta)


def _with_zero(codewords: Tensor) -> Tensor:
    return torch.cat([codewords.new_zeros(1), codewords])


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
