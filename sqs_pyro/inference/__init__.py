"""Variational inference of spike-and-mixture weights: guide, objective and its bounds, and what a fit looks like.

Work as with Pyro's own: ``SVI(model, guide, optim, loss=SQSELBO())``.
"""

from sqs_pyro.inference.diagnostics import diagnose
from sqs_pyro.inference.elbo import SQSELBO
from sqs_pyro.inference.elbo_report import elbo_report
from sqs_pyro.inference.guides.inclusion import InclusionGuide
from sqs_pyro.inference.guides.mixture import GuideMixture
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.inference.guides.windows import EqualMass, OutlierAware, PerWeight
from sqs_pyro.inference.natural_gradient import NaturalGradient
from sqs_pyro.inference.pruning import PruningSchedule

__all__ = [
    "SQSELBO",
    "EqualMass",
    "GuideMixture",
    "InclusionGuide",
    "NaturalGradient",
    "OutlierAware",
    "PerWeight",
    "PruningSchedule",
    "SpikeGMMGuide",
    "diagnose",
    "elbo_report",
]
