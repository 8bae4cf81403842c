"""How much networks drawn from a guide differ from its most probable one, and the temperature that makes them."""

import math

import torch

from sqs_pyro.errors import ArgumentError
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide

_COLDEST, _HOTTEST = 1e-4, 1e3
_PRECISION = 1e-4  # of the temperature, relative


@torch.no_grad()
def expected_disagreement(
    guide: SpikeGMMGuide, temperature: float | None = None, gate_temperature: float | None = None
) -> float:
    """Return the share of weights at which a drawn network differs from the most probable one, in expectation.

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
        # P(open) P(most probable code): another gate or another code is another weight.
        open_and_same = q.gates * q.responsibilities.amax(-1)
        # The most probable network has an open gate, with a code, or a zero, whatever code it would have.
        same = torch.where(site.gates(guide.gate_temperature) > 0.5, open_and_same, 1 - q.gates)
        differing += (1 - same)[site.mask].double().sum().item()  # in float64: many small numbers
        free += int(site.mask.sum())
    return differing / max(free, 1)


def temperature_for_disagreement(
    guide: SpikeGMMGuide, disagreement: float, gate_temperature: float | None = None
) -> float | None:
    """Return the evaluation temperature at which :func:`expected_disagreement` has a given value.

    Args:
        guide: it has codebooks.
        disagreement: above 0 and below 1.
        gate_temperature: of the gates alone; by default they follow the temperature.

    Returns:
        None where no temperature from 0.0001 to 1000 gives it.

    Raises:
        ArgumentError: the value is not between 0 and 1.
    """
    from scipy.optimize import brentq  # heavy, and only needed here

    if not 0 < disagreement < 1:
        raise ArgumentError(f"disagreement is {disagreement}, but must be above 0 and below 1.")

    def excess(log_temperature: float) -> float:
        return expected_disagreement(guide, math.exp(log_temperature), gate_temperature) - disagreement

    coldest, hottest = math.log(_COLDEST), math.log(_HOTTEST)
    # Disagreement rises with the temperature: there is one root, or none in this range.
    if not excess(coldest) <= 0 <= excess(hottest):
        return None
    return math.exp(brentq(excess, coldest, hottest, xtol=_PRECISION))  # in the logarithm, over seven decades
