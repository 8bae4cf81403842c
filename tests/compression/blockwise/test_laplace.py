"""The Gaussian likelihood of a linear layer, against autograd and explicit linear algebra."""

import pytest
import torch
from torch import nn

from sqs_pyro.compression.blockwise.laplace import LayerLikelihood, input_moments
from sqs_pyro.errors import NetworkError


def likelihood(rows=5, inputs=7, tokens=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    mean = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    importance = 0.1 + torch.rand(rows, generator=generator, dtype=torch.float64)
    return LayerLikelihood(mean, x.T @ x, importance), x


class TestExcess:
    def test_is_the_gaussian_loss_of_the_outputs(self):
        own, x = likelihood()
        weight = own.mean + 0.3 * torch.randn_like(own.mean)
        residual = x @ (weight - own.mean).T  # [T, N]
        assert own.excess(weight) == pytest.approx(0.5 * float((residual.square() * own.importance).sum()))
        assert own.excess(own.mean) == 0

    def test_relative_to_no_weight_at_all(self):
        own, _ = likelihood()
        assert own.relative_error(torch.zeros_like(own.mean)) == pytest.approx(1)
        assert own.relative_error(0.9 * own.mean) == pytest.approx(0.01)


class TestConditioning:
    def test_gives_the_variance_of_each_weight_given_those_before_it(self):
        own, _ = likelihood()
        order, upper = own.conditioning
        covariance = torch.linalg.inv(own.curvature[order][:, order])
        for j in range(len(order)):
            conditional = 1 / torch.linalg.inv(covariance[: j + 1, : j + 1])[j, j]
            assert float(upper[j, j] ** 2) == pytest.approx(float(conditional), rel=1e-9)
        torch.testing.assert_close(upper.T @ upper, covariance)

    def test_moves_the_means_of_the_weights_behind(self):
        own, _ = likelihood()
        order, upper = own.conditioning
        covariance = torch.linalg.inv(own.curvature[order][:, order])
        error = 0.7  # the first weight is 0.7 below its mean: the others' conditional means given that
        expected = covariance[1:, 0] / covariance[0, 0] * -error
        torch.testing.assert_close(-error * upper[0, 1:] / upper[0, 0], expected)

    def test_starts_with_the_inputs_of_highest_curvature(self):
        own, _ = likelihood()
        diagonal = own.curvature.diagonal()[own.conditioning[0]]
        assert (diagonal.diff() <= 0).all()

    def test_needs_a_positive_definite_curvature(self):
        own, x = likelihood(tokens=3)
        with pytest.raises(NetworkError, match="add damping"):
            _ = own.conditioning
        order, _ = own.damped(0.01).conditioning
        assert len(order) == x.shape[1]

    def test_inputs_that_are_all_zero_can_be_damped(self):
        own = LayerLikelihood(torch.ones(2, 3), torch.zeros(3, 3), torch.ones(2)).damped(0.01)
        torch.testing.assert_close(own.curvature, torch.eye(3))


class TestFactors:
    def test_solve_and_tell_the_mean_precision(self):
        own, _ = likelihood()
        rows = torch.randn(3, 7, dtype=torch.float64)
        torch.testing.assert_close(own.factors.solved(rows) @ own.curvature, rows)
        variances = own.conditioning[1].diagonal().square()
        assert own.mean_precision == pytest.approx(float(own.importance.mean() * variances.reciprocal().mean()))

    def test_are_of_all_layers_with_the_same_inputs_and_of_no_other(self):
        own, _ = likelihood()
        assert own.in_units_of(torch.rand(5) + 0.5).factors is own.factors
        assert own.given_inputs(own.curvature, own.curvature).factors is own.factors
        other = own.damped(0.5)
        torch.testing.assert_close(other.conditioning[1], LayerLikelihood(*parts(other)).conditioning[1])
        assert not torch.equal(other.conditioning[1], own.conditioning[1])


def parts(own):
    return own.mean, own.curvature, own.importance


class TestOtherInputs:
    def test_mean_is_the_least_squares_solution(self):
        own, x = likelihood()
        other = x + 0.2 * torch.randn_like(x)
        adapted = own.given_inputs(x.T @ other, other.T @ other)
        solution = torch.linalg.lstsq(other, x @ own.mean.T).solution.T
        torch.testing.assert_close(adapted.mean, solution)
        torch.testing.assert_close(adapted.curvature, other.T @ other)

    def test_same_inputs_change_nothing(self):
        own, _ = likelihood()
        torch.testing.assert_close(own.given_inputs(own.curvature, own.curvature).mean, own.mean)


class TestInputMoments:
    def test_sums_over_tokens_and_minibatches(self):
        before, after = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
        cross, curvature = input_moments([(before[:2], after[:2]), (before[2:], after[2:])])
        x, seen = before.reshape(-1, 4), after.reshape(-1, 4)
        torch.testing.assert_close(cross, x.T @ seen)
        torch.testing.assert_close(curvature, seen.T @ seen)

    def test_of_one_input(self):
        x = torch.randn(10, 4)
        cross, curvature = input_moments([(x, x), (x, x)])
        torch.testing.assert_close(cross, 2 * x.T @ x)
        assert cross is curvature

    def test_stay_in_float32_under_autocast(self):
        x = torch.randn(100, 64)
        with torch.autocast("cpu", torch.bfloat16):
            _, curvature = input_moments([(x.bfloat16(), x.bfloat16())])
        torch.testing.assert_close(curvature, x.bfloat16().float().T @ x.bfloat16().float())

    def test_of_nothing(self):
        with pytest.raises(NetworkError, match="at least one minibatch"):
            input_moments([])

    def test_fisher_of_a_gaussian_output_is_the_curvature(self):
        """With unit noise on the outputs the Hessian of -log p in one row is Σ x xᵀ, whatever the row."""
        layer, x = nn.Linear(4, 3, bias=False), torch.randn(20, 4)
        y = layer(x).detach()

        def loss(weight):
            return 0.5 * (x @ weight.T - y).square().sum()

        hessian = torch.autograd.functional.hessian(loss, layer.weight.detach())
        for row in range(3):
            torch.testing.assert_close(hessian[row, :, row, :], input_moments([(x, x)])[1])
