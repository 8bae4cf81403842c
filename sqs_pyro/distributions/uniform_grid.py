r"""Codewords that are whole numbers times one step: ``μ_k = s n_k``, ``n_k`` from ``-⌈K/2⌉`` to ``⌊K/2⌋``.

Zero is not among them, for it is the spike's. :class:`UniformGrid` is the constraint of a codebook ``[..., K]`` of
this form; what is learned without a constraint is ``log s``, ``[..., 1]``. Any codebook is brought to the nearest
of the form by least squares.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraint_registry import biject_to, transform_to
from torch.distributions.transforms import Transform

from sqs_pyro.distributions.kmeans import Clustering

_LEAST = 1e-30  # of a step, whose logarithm is kept
_TRIED = 24  # steps between one that cuts weights off and one that reaches the largest
_SAMPLE = 1 << 16  # weights of a group on which they are
_ROUNDS = 10  # in which step and numbers follow from each other


def grid_numbers(num_components: int) -> Tensor:
    """Return n of the K codewords, ascending, int64 ``[K]``."""
    numbers = torch.arange(-((num_components + 1) // 2), num_components // 2 + 1)
    return numbers[numbers != 0]


class UniformGrid(constraints.Constraint):
    """Codebooks ``[..., K]`` that are :func:`grid_numbers` times a positive step.

    Args:
        num_components: K.
    """

    event_dim = 1

    def __init__(self, num_components: int) -> None:
        self.num_components = num_components
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Return whether codebooks are of the form, ``[...]``."""
        numbers = grid_numbers(self.num_components).to(value)
        step = best_step(value, torch.ones_like(value))
        return ((value - step * numbers).abs() <= 1e-5 * step * numbers.abs()).all(-1)


class _StepTransform(Transform):
    """From ``log s``, ``[..., 1]``, to ``s n``, ``[..., K]``; backwards by least squares."""

    domain = constraints.independent(constraints.real, 1)
    bijective = True

    def __init__(self, num_components: int) -> None:
        super().__init__()
        self.num_components = num_components

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        """Return the form."""
        return UniformGrid(self.num_components)

    def _call(self, x: Tensor) -> Tensor:
        return x.exp() * grid_numbers(self.num_components).to(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return best_step(y, torch.ones_like(y)).log()

    def forward_shape(self, shape: Any) -> Any:
        """Return the shape of codebooks."""
        return (*shape[:-1], self.num_components)

    def inverse_shape(self, shape: Any) -> Any:
        """Return the shape of logarithms of steps."""
        return (*shape[:-1], 1)


@transform_to.register(UniformGrid)
@biject_to.register(UniformGrid)
def _of_step(constraint: UniformGrid) -> _StepTransform:
    return _StepTransform(constraint.num_components)


def best_step(values: Tensor, mass: Tensor) -> Tensor:
    """Return s above 0 that makes ``Σ_k mass_k (values_k - s n_k)²`` least, ``[..., 1]``.

    Args:
        values: what the codewords should be, ``[..., K]``.
        mass: how much each counts, ``[..., K]``, not negative.
    """
    numbers = grid_numbers(values.shape[-1]).to(values)
    along, square = (mass * numbers * values).sum(-1, keepdim=True), (mass * numbers**2).sum(-1, keepdim=True)
    return (along / square.clamp(min=_LEAST)).clamp(min=_LEAST)


def uniform_codebook(values: Tensor, num_components: int, weights: Tensor | None = None) -> Clustering:
    """Fit a step to each row of ``values``, of which none is to be zero; the rest as of K-means.

    Args:
        values: ``[G, n]``.
        num_components: K.
        weights: of the values, ``[G, n]``, not negative; all 1 if left out.
    """
    w = values.detach().double()
    mass = torch.ones_like(w) if weights is None else weights.double()
    # Where none of a row's values counts, all do: its step has to be of their size when one of them comes back.
    mass = torch.where(mass.sum(1, keepdim=True) > 0, mass, torch.ones_like(mass))
    numbers = grid_numbers(num_components).to(w)
    step = _tried_step(w, mass, numbers)  # [G, 1]
    empty = (w * mass == 0).all(1, keepdim=True)
    if bool((~empty).any()):
        step = torch.where(empty, step[~empty].mean(), step)  # rows of zeros have the step of others
    for _ in range(_ROUNDS):
        n = _nearest(w / step, numbers)
        along, square = (mass * n * w).sum(1, keepdim=True), (mass * n**2).sum(1, keepdim=True)
        step = torch.where((square > 0) & (along > 0), along / square.clamp(min=_LEAST), step)
    n = _nearest(w / step, numbers)
    residual = mass * (w - step * n).square()
    total = mass.sum(1, keepdim=True).clamp(min=_LEAST)
    # Weights on the grid itself leave a width of 0, whose KL is infinite.
    scale = (residual.sum(1, keepdim=True) / total).sqrt().maximum(1e-3 * step)
    counts = torch.stack([(mass * (n == number)).sum(1) for number in numbers], 1) + 0.5 / num_components
    columns = (
        step * numbers,
        scale.expand(-1, num_components),
        counts / counts.sum(1, keepdim=True),
        residual.sum(1),
    )
    return Clustering(*(column.to(values.dtype).contiguous() for column in columns))


def _tried_step(w: Tensor, mass: Tensor, numbers: Tensor) -> Tensor:
    stride = max(1, w.shape[1] // _SAMPLE)
    some, counted = w[:, ::stride], mass[:, ::stride]
    kept = counted > 0
    reach = (some.abs() * kept).amax(1, keepdim=True).clamp(min=_LEAST)
    size = ((some.square() * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=_LEAST)).sqrt()
    # The side of fewer numbers decides how wide is wide enough.
    widest = reach / max(float(numbers.max()), 1.0)
    least = (size.clamp(min=_LEAST) / float(numbers.abs().max())).minimum(widest)
    best, error = widest, torch.full_like(widest, torch.inf)
    for i in range(_TRIED):  # where weights are cut off, the error is no smooth function of the step
        step = least * (widest / least) ** (i / (_TRIED - 1))
        lost = (counted * (some - step * _nearest(some / step, numbers)).square()).sum(1, keepdim=True)
        best, error = torch.where(lost < error, step, best), torch.minimum(lost, error)
    return best


def _nearest(places: Tensor, numbers: Tensor) -> Tensor:
    """Return the nearest of the numbers, which are whole and lack 0."""
    n = places.round()
    n = torch.where(n == 0, torch.where(places < 0, -1.0, 1.0), n)
    return n.clamp(float(numbers.min()), float(numbers.max())).masked_fill_(n.isnan(), float(numbers.max()))
