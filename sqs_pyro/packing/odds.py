"""Logarithms and probabilities in whole numbers: every machine finds the same.

Logarithms are to base 2, in 256ths; log odds stay within twelve octaves; probabilities are multiples of 2^-16.
All numbers here are part of the format.
"""

import torch
from torch import Tensor

UNIT = 256  # of a logarithm
MOST = 12 * UNIT  # log odds: a zero among zeros costs 0.00035 bit
MANTISSA = 11  # bits of a number that its logarithm looks at

# Rounded to whole numbers far from any tie: the same on every machine.
LOGARITHMS = torch.arange(1 << MANTISSA, 2 << MANTISSA).double().log2_().sub_(MANTISSA).mul_(UNIT).round_().long()
_ODDS = torch.arange(-MOST, MOST + 1).double().div_(UNIT).exp2_()
#: Of a 1, in 2^-16, by log odds from -MOST to MOST.
PROBABILITIES = (_ODDS / (1 + _ODDS)).mul_(1 << 16).round_().long()


def log2(numbers: Tensor) -> Tensor:
    """Return logarithms of positive whole numbers, below 2^53, in 256ths."""
    mantissa, exponent = torch.frexp(numbers.double())  # exact; mantissa in [½, 1)
    index = mantissa.mul_(2 << MANTISSA).long() - (1 << MANTISSA)
    return LOGARITHMS.to(numbers.device)[index] + UNIT * (exponent.long() - 1)


def probabilities(log_odds: Tensor) -> Tensor:
    """Return probabilities of a 1, float64: multiples of 2^-16, above 0 and below 1."""
    return PROBABILITIES.to(log_odds.device)[log_odds + MOST].double().div_(1 << 16)
