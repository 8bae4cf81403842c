"""A precision that is slow on this machine is told before hours of work, and only there."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sqs_pyro import compress
from sqs_pyro.compression import precision
from sqs_pyro.compression.baseline import BaselineRecipe, train_baseline
from sqs_pyro.compression.precision import SlowPrecisionWarning


class Ended(Exception):
    pass


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def loader():
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(16, 6), torch.randint(3, (16,))), batch_size=8)


def baseline(wanted):
    def stop(record):
        raise Ended

    train_baseline(small_net(), loader(), None, BaselineRecipe(epochs=1, precision=wanted), progress=stop)


def compression(wanted):
    def stop(record):
        raise Ended

    compress(small_net(), loader(), {"epochs": 1, "precision": wanted, "num_components": 4}, progress=stop)


@pytest.mark.parametrize("train", [baseline, compression])
@pytest.mark.parametrize(
    ("wanted", "native", "told"),
    [("bfloat16", False, True), ("bfloat16", True, False), ("float32", False, False)],
)
def test_what_is_slow_is_told(monkeypatch, train, wanted, native, told):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: native)
    with warnings.catch_warnings(record=True) as warned, pytest.raises(Ended):
        warnings.simplefilter("always", SlowPrecisionWarning)
        train(wanted)
    said = [str(each.message) for each in warned if each.category is SlowPrecisionWarning]
    assert ["set `precision` to float32" in sentence for sentence in said] == [True] * told
