"""What the logits of codes and gates are divided by."""

from collections.abc import Collection
from typing import NamedTuple

from sqs_pyro.arguments import is_positive
from sqs_pyro.errors import ArgumentError


class Temperatures(NamedTuple):
    """Temperatures of a draw: 1 draws as the logits say, towards 0 draws become the hard network.

    Attributes:
        codes: τ in ``φ = softmax(logits / τ)``.
        gates: s in ``λ = sigmoid(g / s)``.
    """

    codes: float
    gates: float


def check_temperatures(needed: Collection[str] = (), **temperatures: float | None) -> None:
    """Check that each temperature that is given, or ``needed``, is above 0.

    Raises:
        ArgumentError: it names the one that is not.
    """
    for name, value in temperatures.items():
        if (value is not None or name in needed) and not is_positive(value):
            raise ArgumentError(f"{name} is {value!r}, but must be positive.")
