"""Prediction and training are told apart by what Pyro does, not by a flag that somebody may forget to set."""

from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.predictive import _predictive_vectorize_plate_name
from pyro.poutine import runtime
from pyro.poutine.condition_messenger import ConditionMessenger


def predicting() -> bool:
    """Whether densities are not asked for, as in :class:`pyro.infer.Predictive`: what is drawn is a prediction."""
    return poutine.get_mask() is False


def guide_predicts() -> bool:
    """Whether a guide is to draw predictions: :func:`predicting`, or for ``WeighedPredictive``.

    That one asks for densities, to weigh draws. It is known by how it tries a guide, by the samples that it
    conditions one on, of which there are none, or by its plate.
    """
    return predicting() or any(map(_is_of_predictions, runtime._PYRO_STACK))


def _is_of_predictions(handler: object) -> bool:
    if isinstance(handler, InitMessenger):
        return True
    if isinstance(handler, ConditionMessenger):
        return not handler.data
    return getattr(handler, "name", None) == _predictive_vectorize_plate_name
