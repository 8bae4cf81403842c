"""Whether a dense posterior's draws are too wide for the running statistics of their network's batch norms."""

import warnings
from typing import Any

import torch
from torch import nn

from sqs_pyro.inference.findings import THRESHOLDS, Finding, finding
from sqs_pyro.inference.guides.posterior import PosteriorGuide
from sqs_pyro.networks.batch_statistics import has_statistics


@torch.no_grad()
def shared_batch_norm(model: Any, guide: PosteriorGuide) -> list[Finding]:
    """Return a finding if draws are far from their mean, and batch norms have one network's statistics for all."""
    net = getattr(model, "net", None)
    norms = net.modules() if isinstance(net, nn.Module) else ()
    if not any(map(has_statistics, norms)) or getattr(model, "batch_norm_inputs", None) is not None:
        return []
    posterior: dict[str, Any] = guide.get_posterior()
    # Biases before a norm drop out of it, and others are drawn with whatever width: layers decide.
    layers = [name for name in guide.site_names if len(posterior[name].batch_shape) > 1]
    found = {name: _size_in_widths(posterior[name]) for name in layers}
    worst = min(found, key=found.__getitem__, default=None)
    if worst is None or found[worst] >= THRESHOLDS["shared_batch_norm"]:
        return []
    return [finding("shared_batch_norm", worst, found[worst], width=1 / max(found[worst], 1e-6))]


def warn_of_batch_norm(model: Any, guide: PosteriorGuide) -> None:
    """Warn where :func:`shared_batch_norm` finds something: who predicts is not going to call ``diagnose``."""
    for found in shared_batch_norm(model, guide):
        warnings.warn(found.sentence, stacklevel=3)


def _size_in_widths(q: Any) -> float:
    return float((q.mean.square().sum() / q.variance.sum().clamp(min=1e-30)).sqrt())
