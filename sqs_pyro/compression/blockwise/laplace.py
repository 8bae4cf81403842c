r"""Laplace's approximation to the likelihood of a linear layer's weight, from what flows through the layer.

With outputs ``y = W x`` the Fisher information of W factorises, if inputs and the gradients of outputs are
independent (K-FAC, Martens & Grosse 2015, the latter's covariance taken as diagonal), into

    -log p(D | W) = const + 1/2 Σ_i g_i (w_i - w̄_i)ᵀ H (w_i - w̄_i),    H = Σ_t x_t x_tᵀ,

one quadratic for each row w_i, all with the same H; g_i is the mean squared gradient of the log-likelihood in
output i, 1 where the outputs themselves are observed with unit noise. ``w̄`` is where the likelihood is highest:
the pretrained weight, or what explains the original layer's outputs best from other inputs
(:meth:`LayerLikelihood.given_inputs`).

Rows are independent given H and the codebook, so ranks share them (:class:`~.shares.Shares`), in units.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from sqs_pyro.compression.blockwise.channel_scales import in_units_of
from sqs_pyro.compression.blockwise.shares import Shares
from sqs_pyro.errors import NetworkError

PLACES = 2000  # of a histogram on either side of zero
_COLUMNS = 8  # parts of a triangular matrix's columns that are inverted at a time: more save little


class Factors:
    """What is computed of a curvature H once, for all layers that read the same inputs.

    Args:
        curvature: H, ``[M, M]``, positive definite.
    """

    def __init__(self, curvature: Tensor) -> None:
        self.curvature = curvature

    @cached_property
    def order(self) -> Tensor:
        """Inputs by falling curvature, ``[M]``: those that matter most are coded first, and most others are left
        to make up for them."""
        return self.curvature.diagonal().argsort(descending=True, stable=True)

    @cached_property
    def ordered(self) -> Tensor:
        """H with inputs in order, ``[M, M]``."""
        return self.curvature[self.order][:, self.order]

    @cached_property
    def lower(self) -> Tensor:
        """L, float64 ``[M, M]``: ``L Lᵀ`` is H with its inputs from the last in order to the first.

        Raises:
            NetworkError: H is not positive definite.
        """
        backward = self.order.flip(0)
        # In float64: H of text is badly conditioned.
        return _cholesky(self.curvature[backward][:, backward])

    @cached_property
    def upper(self) -> Tensor:
        """U, ``[M, M]`` upper triangular: ``H⁻¹ = Uᵀ U`` with inputs in order."""
        # The inverse of L the other way round: H⁻¹ itself, which has fewer good digits, is not needed.
        return _triangular_inverse(self.lower).flip(0, 1).to(self.curvature.dtype)

    @cached_property
    def precisions(self) -> Tensor:
        """``1 / U_jj²`` of each input, in their own order, float64 ``[M]``."""
        squares = self.lower.diagonal().square()
        return squares.new_empty(squares.shape).index_copy_(0, self.order.flip(0), squares)

    @cached_property
    def mean_precision(self) -> float:
        """Mean over inputs of ``1 / U_jj²``."""
        return float(self.lower.diagonal().square().mean())

    def solved(self, rows: Tensor) -> Tensor:
        """Return ``rows H⁻¹``, float64 ``[n, M]``."""
        backward = self.order.flip(0)
        return torch.cholesky_solve(rows.T[backward].double(), self.lower)[backward.argsort()].T


@dataclass(frozen=True, eq=False)
class Histogram:
    """Weights at the nearest of many even values, zero in the middle; float64 ``[P]`` each.

    Attributes:
        values: ascending.
        counts: how many weights are at each.
        mass: what these count together, each by its precision ``g_i u_ij² / v_j``.
    """

    values: Tensor
    counts: Tensor
    mass: Tensor

    def gathered(self, places: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return counts and mass, ``[size]``, of values that are put together at ``places``, int64 ``[P]``."""
        counts, mass = (torch.bincount(places, each, minlength=size) for each in (self.counts, self.mass))
        return counts, mass


@dataclass(frozen=True, eq=False)
class LayerLikelihood:
    """A Gaussian in the weight of a linear layer of N outputs and M inputs, of all its rows or of a rank's own.

    Attributes:
        mean: w̄, ``[n, M]``: of the own rows.
        curvature: H, ``[M, M]``, symmetric, not negative.
        importance: g, ``[n]``, positive.
        rows: of the layer, and which of them are own; None: all of them are, in one unit.
        parts: scales of equal parts of the own rows, which codewords are in units of, ``[n, B]``; None: all are 1.
        known: factors of this very H, which layers of the same inputs share; made here if left out.
    """

    mean: Tensor
    curvature: Tensor
    importance: Tensor
    rows: Shares | None = None
    parts: Tensor | None = None
    known: Factors | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.known is None or self.known.curvature is not self.curvature:
            object.__setattr__(self, "known", Factors(self.curvature))

    @property
    def factors(self) -> Factors:
        """Of H, computed when they are asked for."""
        assert self.known is not None
        return self.known

    @property
    def shares(self) -> Shares:
        """The rows of the layer, and which of them are own."""
        return self.rows or Shares(len(self.mean))

    def of_rows(self, rows: Shares) -> "LayerLikelihood":
        """Return that of a rank's own rows, of one that has all."""
        return replace(self, mean=self.mean[rows.own], importance=self.importance[rows.own], rows=rows)

    def image(self, weight: Tensor, part: slice) -> Tensor:
        """Return ``W H`` of a unit of the own rows of ``weight``, ``[n, M]``."""
        # In memory of its own: last bits of a product depend on how many rows it has, and on where they lie.
        return weight[part].clone() @ self.curvature

    def excess(self, weight: Tensor) -> float:
        """``1/2 Σ_i g_i (w_i - w̄_i)ᵀ H (w_i - w̄_i)``, nats: what a weight ``[n, M]`` costs beyond the best."""

        def cost(part: slice) -> Tensor:
            difference = weight[part] - self.mean[part]
            return ((difference @ self.curvature) * difference).sum(1) @ self.importance[part].clone()

        return 0.5 * float(self.shares.sum(cost))

    def relative_error(self, weight: Tensor) -> float:
        """:meth:`excess` relative to that of a weight of zeros: the share of the outputs' energy that is lost."""
        return self.excess(weight) / max(self.excess(torch.zeros_like(self.mean)), 1e-30)

    def damped(self, damping: float) -> "LayerLikelihood":
        """Return that of H with a ridge, see :func:`damped`."""
        return replace(self, curvature=damped(self.curvature, damping))

    def given_inputs(self, cross: Tensor, curvature: Tensor) -> "LayerLikelihood":
        """Return that of a weight that sees other inputs x' but is to give the original outputs ``w̄ x``.

        Its mean is the least-squares solution ``w̄ (Σ x x'ᵀ) (Σ x' x'ᵀ)⁻¹``.

        Args:
            cross: ``Σ x x'ᵀ``, ``[M, M]``.
            curvature: ``Σ x' x'ᵀ``, ``[M, M]``, positive definite.
        """
        found, product = replace(self, curvature=curvature), cross.double()
        units = [
            found.factors.solved(self.mean[part].double() @ product).to(self.mean) for part in self.shares.parts
        ]
        return replace(found, mean=torch.cat(units)) if units else found

    def plus(self, other: "LayerLikelihood") -> "LayerLikelihood":
        """Return that of what both say of one weight, in the Kronecker product that is nearest to their sum.

        Row v of the sum has the curvature ``P_v = g_v H + g'_v H'``, which is no ``a_v B`` unless g and g' are
        proportional. ``B = Σ_v P_v`` is right for all rows together, and ``a_v = tr(B⁻¹ P_v) / M`` is then the
        scale at which a Gaussian of precision ``a_v B`` is nearest to the one of P_v in Kullback-Leibler
        divergence; the traces do not depend on the units of inputs.

        Args:
            other: of the same mean; the sum of both curvatures must be positive definite.
        """
        total = float(self.importance.sum()) * self.curvature + float(other.importance.sum()) * other.curvature
        factor, size = _cholesky(total), len(total)
        # tr(B⁻¹ H), so that no row's matrix is ever made.
        own, others = (
            float(torch.cholesky_solve(each.curvature.double(), factor).trace()) / size for each in (self, other)
        )
        return replace(self, curvature=total, importance=own * self.importance + others * other.importance)

    def in_units_of(self, scales: Tensor | None) -> "LayerLikelihood":
        """Return that of a weight whose codewords are in units of ``scales``, if there are any.

        Args:
            scales: of all rows, ``[N]``: the mean is divided by them; or of equal parts of all rows, ``[N, B]``,
                whose weights are no longer of one curvature: the mean stays as it is.
        """
        if scales is None:
            return self
        scales = scales[self.shares.own]
        if scales.dim() == 2:
            return replace(self, parts=scales.to(self.mean))
        squares = scales.to(self.importance).square()
        # An error e in w / s is one of s e in w: what it costs grows with s².
        return replace(self, mean=in_units_of(scales, self.mean), importance=self.importance * squares)

    @cached_property
    def units(self) -> Tensor | None:
        """u, what codewords are in units of, ``[n, M]``; None: all are 1."""
        if self.parts is None:
            return None
        return self.parts.repeat_interleave(self.mean.shape[1] // self.parts.shape[1], 1)

    @cached_property
    def target(self) -> Tensor:
        """w̄ in units of codewords, ``[n, M]``."""
        return self.mean if self.units is None else self.mean / self.units

    def cost(self, part: slice) -> Tensor:
        """Return ``g_i u_ij²``, what an error in units of codewords costs, ``[n, M]``, or ``[n, 1]`` if u is 1."""
        g = self.importance[part][:, None]
        return g if self.units is None else g * self.units[part].square()

    @cached_property
    def histogram(self) -> "Histogram":
        """Of all means in units of codewords: what codewords are begun with, whatever β."""
        step = (self.reach or 1.0) / PLACES
        precisions = self.factors.precisions.to(self.mean)

        def occurrences(part: slice) -> Tensor:
            places = (self.target[part] / step).round_().long().reshape(-1) + PLACES
            mass = (self.cost(part) * precisions).reshape(-1).double()
            by_place = (torch.bincount(places, w, minlength=2 * PLACES + 1) for w in (torch.ones_like(mass), mass))
            return torch.stack([*by_place])

        counts, mass = self.shares.sum(occurrences)
        values = step * torch.arange(-PLACES, PLACES + 1, dtype=torch.float64, device=counts.device)
        return Histogram(values, counts, mass)

    @cached_property
    def reach(self) -> float:
        """The largest size of a mean, in units of codewords."""
        own = float(self.target.abs().max()) if len(self.mean) else 0.0
        return max(self.shares.ranks.gathered(own))

    @cached_property
    def mean_precision(self) -> float:
        """Mean over weights of ``g_i u_ij² / v_j``: the precision of each given those that are coded before it."""
        if self.units is not None:
            each = self.factors.precisions.to(self.mean)
            found = float(self.shares.sum(lambda part: (self.cost(part) @ each).sum().double()))
            return found / self.shares.count / len(each)
        total = float(self.shares.sum(lambda part: self.importance[part].sum()))
        return total / self.shares.count * self.factors.mean_precision

    @property
    def conditioning(self) -> tuple[Tensor, Tensor]:
        """How the Gaussian is conditioned on one input's weights after the other.

        Returns:
            order: ``[M]``, see :class:`Factors`.
            upper: U, ``[M, M]``, with inputs in that order. Once the weights of the inputs before j are known,
                ``U_jj² / g_i`` is the variance of weight ``(i, j)``, and an error e in it moves the mean of weight
                ``(i, k)`` behind it by ``-e U_jk / U_jj``.

        Raises:
            NetworkError: H is not positive definite: use :meth:`damped`.
        """
        return self.factors.order, self.factors.upper


def damped(curvature: Tensor, damping: float) -> Tensor:
    """Return H plus ``damping`` times its mean diagonal: inputs that were never seen may be seen later."""
    diagonal = curvature.diagonal()
    ridge = damping * float(diagonal.mean()) or 1.0  # all inputs zero: any weight is as good
    return curvature + ridge * torch.eye(len(diagonal)).to(diagonal)


def _triangular_inverse(factor: Tensor) -> Tensor:
    """Return the inverse of a lower triangular matrix, by columns, which have zeros above the diagonal."""
    size = len(factor)
    inverse = torch.zeros_like(factor)
    step = -(-size // _COLUMNS)
    for start in range(0, size, step):
        end = min(start + step, size)
        unit = torch.eye(size - start, end - start).to(factor)
        inverse[start:, start:end] = torch.linalg.solve_triangular(factor[start:, start:], unit, upper=False)
    return inverse


def _cholesky(matrix: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix.double())
    if int(info):
        raise NetworkError(
            "The curvature of a layer is not positive definite: add damping, use more calibration text, or "
            "collect it in float32."
        )
    return factor


def input_moments(pairs: Iterable[tuple[Tensor, Tensor]], shares: Shares | None = None) -> tuple[Tensor, Tensor]:
    """Sum ``x x'ᵀ`` and ``x' x'ᵀ``, float32 ``[M, M]`` each, over a layer's inputs before and after compression.

    Args:
        pairs: x and x', ``[..., M]``, of the same examples, a minibatch each; x' may be x itself, in all of them.
        shares: the minibatches, of which ``pairs`` are this rank's own; if left out, there is no other rank.

    Returns:
        the two, which are one tensor where x' is x itself.

    Raises:
        NetworkError: there is no pair.
    """
    left = iter(pairs)
    if shares is None:
        found = _moments(left)
    else:
        found = shares.sums(lambda part: _moments(itertools.islice(left, part.stop - part.start)))
    return found[-1], found[0]


def _moments(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return ``Σ x' x'ᵀ`` and, unless x' is x itself, ``Σ x x'ᵀ``."""

    def products(before: Tensor, after: Tensor) -> list[Tensor]:
        with torch.autocast(after.device.type, enabled=False):  # sums in bfloat16 are not positive definite
            x, seen = (value.reshape(-1, value.shape[-1]).float() for value in (before, after))
            # [n, M] -> [M, M]
            return [seen.T @ seen] if before is after else [seen.T @ seen, x.T @ seen]

    found = added(products(before, after) for before, after in pairs)
    if not found:
        raise NetworkError("The curvature of a layer needs at least one minibatch of its inputs.")
    return found


def added(values: Iterable[list[Tensor]]) -> list[Tensor]:
    """Return sums, tensor by tensor, in the first ones' memory; none of nothing."""
    found: list[Tensor] = []
    for each in values:
        # In place: a second [M, M] of the widest layer would be the peak of memory.
        found = [total.add_(value) for total, value in zip(found, each, strict=True)] if found else each
    return found
