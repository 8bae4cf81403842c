"""A classifier's uncertainty in figures: calibrated, higher where it errs and on other inputs?"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from sqs_pyro.evaluation.classification import Evaluation, summarise
from sqs_pyro.evaluation.predictive.detection import (
    auroc,
    mixture_log_probabilities,
    mutual_information,
    predictive_entropy,
)
from sqs_pyro.evaluation.predictive.draws import predict_each
from sqs_pyro.evaluation.predictive.selective import RiskCoverage, risk_coverage
from sqs_pyro.evaluation.reliability import Reliability, reliability_curve


@dataclass(frozen=True)
class Uncertainty:
    """How far a classifier's probabilities can be trusted, on its own inputs and on others.

    Attributes:
        figures: accuracy, NLL, Brier score, calibration error, entropy.
        reliability: accuracy over confidence.
        risk_coverage: share of errors among the examples with the highest top probability, over their share.
        entropy_auroc: by name of other inputs, how well the predictive entropy tells them from the own ones.
        information_auroc: the same for the mutual information of label and network; empty for a single draw.
    """

    figures: Evaluation
    reliability: Reliability
    risk_coverage: RiskCoverage
    entropy_auroc: dict[str, float]
    information_auroc: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return every figure as plain data, curves by their areas."""
        return {
            **asdict(self.figures),
            "risk_coverage_area": self.risk_coverage.area,
            "entropy_auroc": self.entropy_auroc,
            "information_auroc": self.information_auroc,
        }


def evaluate_uncertainty(
    net: nn.Module, loader: Iterable[Any], others: Mapping[str, Iterable[Any]] | None = None
) -> Uncertainty:
    """Evaluate a classifier's predictive distribution.

    Args:
        net: any module from a minibatch to logits or log-probabilities; of an average over draws (a packed
            ensemble, any of :mod:`sqs_pyro.evaluation.peers`) each draw is heard.
        loader: minibatches of inputs and labels.
        others: minibatches of shifted or foreign inputs by name; their labels are not looked at.

    Raises:
        DataError, NetworkError: as of :func:`~sqs_pyro.evaluation.predictive.draws.predict_each`.
    """
    log_p, labels = predict_each(net, loader)
    return summarise_uncertainty(
        log_p, labels, {name: predict_each(net, other)[0] for name, other in (others or {}).items()}
    )


def summarise_uncertainty(
    log_p: Tensor, labels: Tensor, others: Mapping[str, Tensor] | None = None
) -> Uncertainty:
    """Sum up predictions.

    Args:
        log_p: the draws' log-probabilities ``[S, n, C]``; ``[1, n, C]`` of a single network.
        labels: ``[n]``.
        others: log-probabilities ``[S, m, C]`` on shifted or foreign inputs, by name.

    Raises:
        DataError: there is no label, or labels do not fit the number of classes.
    """
    mixture, others = mixture_log_probabilities(log_p), others or {}
    figures = summarise(mixture, labels)
    confidence, predicted = mixture.exp().max(-1)
    entropy, information = predictive_entropy(mixture), mutual_information(log_p)
    return Uncertainty(
        figures=figures,
        reliability=reliability_curve(mixture.exp(), labels),
        risk_coverage=risk_coverage(1 - confidence, predicted != labels),
        entropy_auroc={
            name: auroc(entropy, predictive_entropy(mixture_log_probabilities(other)))
            for name, other in others.items()
        },
        information_auroc={
            name: auroc(information, mutual_information(other)) for name, other in others.items() if len(log_p) > 1
        },
    )
