"""How much networks drawn from a guide differ from its most probable one, and the temperature that makes them."""

import torch

from sqs_pyro.errors import ArgumentError
from sqs_pyro.inference.guide import SpikeGMMGuide

_COLDEST, _HOTTEST, _HALVINGS = 1e-4, 1e3, 16


@torch.no_grad()
def expected_disagreement(
    guide: SpikeGMMGuide, temperature: float | None = None, gate_temperature: float | None = None
) -> float:
    """Share of weights at which a drawn network differs from the most probable one, in expectation.

    Weights that pruning has removed are zero in both and do not count. Computed from gates and
    responsibilities, without a draw.

    Args:
        guide: it has codebooks.
        temperature, gate_temperature: see :meth:`SpikeGMMGuide.evaluation_temperatures`.
    """
    temperatures = guide.evaluation_temperatures(temperature, gate_temperature)
    differing, free = 0.0, 0
    for site in guide.site_guides().values():
        q = site.coded_distribution(temperatures, "discrete")
        open_and_same = q.gates * q.responsibilities.amax(-1)
        same = torch.where(site.gates(guide.gate_temperature) > 0.5, open_and_same, 1 - q.gates)
        differing += (1 - same)[site.mask].double().sum().item()
        free += int(site.mask.sum())
    return differing / max(free, 1)


def temperature_for_disagreement(
    guide: SpikeGMMGuide, disagreement: float, gate_temperature: float | None = None
) -> float | None:
    """The evaluation temperature at which :func:`expected_disagreement` has a given value.

    Args:
        guide: it has codebooks.
        disagreement: above 0 and below 1.
        gate_temperature: of the gates alone; by default they follow the temperature.

    Returns:
        None where no temperature from 0.0001 to 1000 gives it.

    Raises:
        ArgumentError: the value is not between 0 and 1.
    """
    if not 0 < disagreement < 1:
        raise ArgumentError(f"disagreement is {disagreement}, but must be above 0 and below 1.")

    def at(temperature: float) -> float:
        return expected_disagreement(guide, temperature, gate_temperature)

    low, high = _COLDEST, _HOTTEST
    if not at(low) <= disagreement <= at(high):
        return None
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        if at(middle) < disagreement:
            low = middle
        else:
            high = middle
    return high
