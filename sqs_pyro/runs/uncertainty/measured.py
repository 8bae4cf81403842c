"""The table of a packed classifier's uncertainty: as it is, one draw of it, and scaled by one temperature."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.data import Data, Loader
from sqs_pyro.errors import DataError
from sqs_pyro.evaluation.averaging import average_of_packed
from sqs_pyro.evaluation.calibration import fit_temperature
from sqs_pyro.evaluation.classification import summarise
from sqs_pyro.evaluation.predictive.classes import Uncertainty, summarise_uncertainty
from sqs_pyro.evaluation.predictive.detection import mixture_log_probabilities
from sqs_pyro.evaluation.predictive.draws import predict_each
from sqs_pyro.kernels import PackedEnsemble
from sqs_pyro.reporting.uncertainty import Curves
from sqs_pyro.shipping.widths import widths_of

_POINTS = 200  # of a curve that is kept
_DRAWS = 10  # where a file says how to draw and nobody how often
_GREEDY = "packed file"
_SHIFTED = ("accuracy", "nll", "ece", "brier")

#: What the draws of a network say: log-probabilities ``[S, n, C]``.
_Draws = Tensor


def averaging(net: nn.Module, draws: int | None, file: Path) -> nn.Module:
    """Return what averages a file's draws: an ensemble's own, its first ones, or draws around a network's weights.

    Args:
        net: of the file.
        draws: how many; None: all of an ensemble, ten where widths say how to draw.
        file: for messages.

    Raises:
        DataError: the file has not so many draws.
    """
    if not isinstance(net, PackedEnsemble) and widths_of(net) is not None:
        return average_of_packed(net, draws or _DRAWS)
    held = net.num_draws if isinstance(net, PackedEnsemble) else 1
    if draws is not None and not 1 <= draws <= held:
        raise DataError(f"--draws {draws} is impossible, because '{file}' holds {held}: give 1 to {held}.")
    if isinstance(net, PackedEnsemble):
        net.draws_used = draws
    return net


def measure_uncertainty(
    net: nn.Module,
    data: Data,
    shifted: Mapping[str, Loader],
    foreign: Mapping[str, Loader],
    greedy: nn.Module | None = None,
) -> tuple[dict[str, Any], dict[str, Curves]]:
    """Evaluate a classifier and, where it averages draws, one of them; each scaled, too.

    Args:
        net: any classifier; of one with draws each is heard.
        data: the temperature is fitted on its validation part, everything else is of the test part.
        shifted: test data that is shifted, with labels that still hold.
        foreign: inputs of no class.
        greedy: the most probable network that the draws are around, if there is one; beside them in place of one.

    Returns:
        ``draws``, ``temperature`` and ``predictors``: by name figures, ``risk_coverage_area``, ``entropy_auroc``
        and ``information_auroc`` by input set, ``shifted`` figures by shift; and what is drawn of each predictor.
    """
    others = {**shifted, **foreign}
    log_p, labels = predict_each(net, data.test)
    heard = {name: predict_each(net, loader) for name, loader in others.items()}
    other = {name: each for name, (each, _) in heard.items()}
    known = {name: heard[name][1] for name in shifted}
    held_out, held_out_labels = predict_each(net, data.validation)
    temperature = fit_temperature(mixture_log_probabilities(held_out), held_out_labels)

    def figures(log_p: _Draws, other: Mapping[str, _Draws]) -> tuple[dict[str, Any], Curves]:
        found = summarise_uncertainty(log_p, labels, other)
        return _document(found, {name: (other[name], known[name]) for name in shifted}), _curves(found)

    whole = _GREEDY if len(log_p) == 1 else f"average of {len(log_p)}"
    found = {whole: figures(log_p, other)}
    if greedy is not None:
        alone = {name: predict_each(greedy, loader)[0] for name, loader in others.items()}
        found = {_GREEDY: figures(predict_each(greedy, data.test)[0], alone), **found}
    elif len(log_p) > 1:
        draws = [
            figures(log_p[s : s + 1], {name: each[s : s + 1] for name, each in other.items()})
            for s in range(len(log_p))
        ]
        found = {"one draw": (_mean([document for document, _ in draws]), draws[0][1]), **found}
    by_temperature = {name: _scaled(each, temperature) for name, each in other.items()}
    found["scaled"] = figures(_scaled(log_p, temperature), by_temperature)
    predictors = {name: document for name, (document, _) in found.items()}
    document = {"draws": len(log_p), "temperature": temperature, "predictors": predictors}
    return document, {name: curves for name, (_, curves) in found.items()}


def _scaled(log_p: _Draws, temperature: float) -> _Draws:
    """Return the average's log-probabilities at a temperature, ``[1, n, C]``."""
    return (mixture_log_probabilities(log_p) / temperature).log_softmax(-1)[None]


def _document(found: Uncertainty, shifted: Mapping[str, tuple[_Draws, Tensor]]) -> dict[str, Any]:
    evaluations = {
        name: asdict(summarise(mixture_log_probabilities(each), labels))
        for name, (each, labels) in shifted.items()
    }
    return {
        **found.to_dict(),
        "shifted": {name: {key: own[key] for key in _SHIFTED} for name, own in evaluations.items()},
    }


def _curves(found: Uncertainty) -> Curves:
    curve = found.risk_coverage
    kept = torch.linspace(0, len(curve.risk) - 1, min(_POINTS, len(curve.risk))).round().long()
    return Curves(
        confidence=found.reliability.confidence.tolist(),
        accuracy=found.reliability.accuracy.tolist(),
        counts=found.reliability.counts.tolist(),
        coverage=curve.coverage[kept].tolist(),
        risk=curve.risk[kept].tolist(),
    )


def _mean(documents: Sequence[Any]) -> Any:
    """Return documents of numbers as one, every number their mean."""
    if isinstance(documents[0], dict):
        return {key: _mean([document[key] for document in documents]) for key in documents[0]}
    return documents[0] if isinstance(documents[0], int) else fmean(documents)
