"""Variational inference of spike-and-mixture weights: guide, objective and its bounds, and what a fit looks like.

Work as with Pyro's own: ``SVI(model, guide, optim, loss=SQSELBO())``.
"""

from sqs_pyro.inference.diagnostics import diagnose
from sqs_pyro.inference.elbo import SQSELBO
from sqs_pyro.inference.elbo_report import elbo_report
from sqs_pyro.inference.guide import SpikeGMMGuide
from sqs_pyro.inference.inclusion_guide import InclusionGuide
from sqs_pyro.inference.pruning import PruningSchedule
from sqs_pyro.inference.windows import EqualMass, OutlierAware, PerWeight

__all__ = [
    "SQSELBO",
    "EqualMass",
    "InclusionGuide",
    "OutlierAware",
    "PerWeight",
    "PruningSchedule",
    "SpikeGMMGuide",
    "diagnose",
    "elbo_report",
]
