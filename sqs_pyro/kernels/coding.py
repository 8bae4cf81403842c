r"""Symbols of a panel of inputs, one input after the other: what an E-step of blockwise compression repeats.

Both ops choose for each input j of a panel, and each row i, the symbol of the least
``(c_z - m_ij)² / 2 + price_ij rate_z``, and let the inputs of the panel behind j know of it. Codewords may be in
units u_ij, of weights that have scales for parts of rows: then ``m_ij / u_ij`` is compared. They differ in the
mean m_ij: of a Gaussian given the weights that are coded already, or given all others
(:mod:`sqs_pyro.compression.blockwise.sequential_coding`).

On CPUs they are compiled (cpu/coding.cpp), with the same operations on every number, in the same order as here,
each rounded for itself: symbols are the same, bit for bit, with a compiler and without one.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from sqs_pyro.kernels.native import native_kernels


def load_coding(device: torch.device) -> bool:
    """Have the ops compiled for a device that is a CPU, at the first call; return whether they are."""
    return device.type == "cpu" and native_kernels("coding")


@custom_op("sqs::chain_coding", mutates_args=("means", "symbols", "errors"))
def chain_coding(
    means: Tensor,
    upper: Tensor,
    values: Tensor,
    rates: Tensor,
    price: Tensor,
    units: Tensor | None,
    symbols: Tensor,
    errors: Tensor,
) -> None:
    """Choose symbols by the chain rule of Gaussians: means follow from the inputs before.

    Args:
        means: m of the P inputs of a panel and n rows, ``[P, n]``; those behind an input move by
            ``-e_j U_jk`` in place.
        upper: U of the panel, ``[P, P]``.
        values: c of all symbols, ``[1 + K]``.
        rates: of the symbols, nats, ``[1 + K]``.
        price: of a nat, ``[P, n]``.
        units: u, of codewords, ``[P, n]``; None: all are 1.
        symbols: becomes the choice, uint8 ``[P, n]``.
        errors: becomes ``e_j = (m_j - u_j c) / U_jj``, ``[P, n]``.
    """
    for j, mean in enumerate(means):
        symbols[j], best = _cheapest(mean, values, rates, price[j], None if units is None else units[j])
        errors[j] = (mean - best) / upper[j, j]
        means[j + 1 :].sub_(upper[j, j + 1 :, None] * errors[j])


@custom_op("sqs::conditional_coding", mutates_args=("slopes", "symbols", "means", "changes"))
def conditional_coding(
    slopes: Tensor,
    weight: Tensor,
    curvature: Tensor,
    values: Tensor,
    rates: Tensor,
    price: Tensor,
    units: Tensor | None,
    symbols: Tensor,
    means: Tensor,
    changes: Tensor,
) -> None:
    """Choose symbols again, each given all others.

    Args:
        slopes: of the quadratic at the present weight, ``[P, n]``; those behind an input move by
            ``+d_j H_jk`` in place.
        weight: at present, ``[P, n]``.
        curvature: H of the panel, ``[P, P]``.
        values: c of all symbols, ``[1 + K]``.
        rates: of the symbols, nats, ``[1 + K]``.
        price: of a nat, ``[P, n]``.
        units: u, of codewords, ``[P, n]``; None: all are 1.
        symbols: becomes the choice, uint8 ``[P, n]``.
        means: becomes the means that symbols were chosen for, ``[P, n]``.
        changes: becomes ``d_j``, by what the weight has changed, ``[P, n]``.
    """
    for j, now in enumerate(weight):
        means[j] = now - slopes[j] / curvature[j, j]
        symbols[j], best = _cheapest(means[j], values, rates, price[j], None if units is None else units[j])
        changes[j] = best - now
        slopes[j + 1 :].add_(curvature[j, j + 1 :, None] * changes[j])


def _cheapest(
    mean: Tensor, values: Tensor, rates: Tensor, price: Tensor, units: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return ``z = argmin_z (c_z - m / u)² / 2 + price rate_z``, int64 ``[n]``, and ``u c_z``, ``[n]``."""
    near = mean if units is None else mean / units
    # [1 + K, n], in place: this runs once for every input of every layer; `min` is four times as fast as `argmin`.
    # No `addcmul` or `addr`: those may round once in the middle of a vector and twice at its end, and where a row
    # stands depends on how many others its rank has.
    best = (near - values[:, None]).square_().mul_(0.5).add_(rates[:, None] * price).min(0).indices
    return best, values[best] if units is None else values[best] * units


@chain_coding.register_fake
@conditional_coding.register_fake
def _(*args: Tensor | None) -> None:
    return None
