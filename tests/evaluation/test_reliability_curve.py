"""The reliability curve, example by example; test_evaluate compares the error with torchmetrics."""

import pytest
import torch

from sqs_pyro.evaluation.reliability import expected_calibration_error, reliability_curve


def test_bins_hold_the_examples_that_belong_there():
    p = torch.randn(400, 3).softmax(-1)
    y = torch.randint(3, (400,))
    curve = reliability_curve(p, y, bins=10)
    error = 0.0
    for b in range(10):
        inside = [
            (row, label) for row, label in zip(p, y, strict=True) if b / 10 < float(row.max()) <= (b + 1) / 10
        ]
        assert int(curve.counts[b]) == len(inside)
        if inside:
            accuracy = sum(float(row.argmax() == label) for row, label in inside) / len(inside)
            confidence = sum(float(row.max()) for row, _ in inside) / len(inside)
            assert float(curve.accuracy[b]) == pytest.approx(accuracy)
            assert float(curve.confidence[b]) == pytest.approx(confidence)
            error += len(inside) / 400 * abs(accuracy - confidence)
    assert curve.error == pytest.approx(error) == expected_calibration_error(p, y, bins=10)


def test_an_empty_bin_is_zero():
    curve = reliability_curve(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), bins=4)
    assert curve.counts.tolist() == [0, 0, 0, 1] and curve.accuracy.tolist() == [0, 0, 0, 1] and curve.error == 0
