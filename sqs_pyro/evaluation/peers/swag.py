"""SWAG (Maddox et al. 2019): a normal distribution of the weights that gradient descent passes."""

import copy
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.arguments import is_positive, is_whole
from sqs_pyro.documents import shown
from sqs_pyro.errors import ArgumentError, DivergenceError
from sqs_pyro.evaluation.averaging import AveragedNetwork, with_own_statistics
from sqs_pyro.isolation import isolating
from sqs_pyro.models.likelihoods import resolve
from sqs_pyro.models.observation import Likelihood, observe, settle
from sqs_pyro.networks.calling import call_arguments, device_of, move_to, output_tensor
from sqs_pyro.networks.loaders import check_repeatable
from sqs_pyro.networks.minibatches import minibatches


class WeightMoments:
    """``N(θ̄, ½ (Σ_diag + D Dᵀ / (K - 1)))`` of the weights that were seen; the columns of D are ``θ_i - θ̄_i``.

    Equation 1 and algorithm 1 of Maddox et al. 2019. θ̄_i is the mean up to i, D has the last K columns.

    Args:
        rank: K, at least 2.

    Attributes:
        count: weights seen.
        mean: θ̄ by name.
        variance: the diagonal of Σ_diag by name.
        deviations: the columns of D, each by name.
    """

    def __init__(self, rank: int) -> None:
        if not is_whole(rank, 2):
            raise ArgumentError(f"rank is {shown(rank)}, but must be at least 2: one deviation has no spread.")
        self.count = 0
        self.mean: dict[str, Tensor] = {}
        self.variance: dict[str, Tensor] = {}
        self.deviations: deque[dict[str, Tensor]] = deque(maxlen=rank)

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take one more set of weights into account, by name."""
        self.count += 1
        deviations = {}
        for name, weight in weights:
            mean = self.mean.get(name, torch.zeros_like(weight))
            before = weight - mean
            self.mean[name] = mean + before / self.count
            deviations[name] = weight - self.mean[name]
            # Welford's recurrence: a mean of squares less a squared mean would round small variances off.
            variance = self.variance.get(name, torch.zeros_like(weight))
            self.variance[name] = variance + (before * deviations[name] - variance) / self.count
        self.deviations.append(deviations)

    def draw(self) -> dict[str, Tensor]:
        """Return weights of the distribution, by name, after torch's random state.

        Raises:
            ArgumentError: fewer than two sets of weights were seen.
        """
        if self.count < 2:
            raise ArgumentError(f"{self.count} sets of weights were seen, but a spread needs at least two.")
        factors = torch.randn(len(self.deviations))
        return {name: mean + self._step(name, factors) for name, mean in self.mean.items()}

    def _step(self, name: str, factors: Tensor) -> Tensor:
        deviation = self.variance[name]
        diagonal = (deviation / 2).sqrt() * torch.randn_like(deviation)
        columns = torch.stack([column[name] for column in self.deviations], -1)  # [*shape, K]
        return diagonal + columns @ factors.to(columns) / (2 * (len(self.deviations) - 1)) ** 0.5


@isolating("net")
def swag(
    net: nn.Module,
    loader: Iterable[Any],
    num_samples: int = 20,
    *,
    likelihood: str | Likelihood = "categorical",
    epochs: int = 10,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    every: int | None = None,
    rank: int = 20,
    batch_norm_batches: int = 20,
    seed: int | None = 0,
) -> AveragedNetwork:
    """Go on training with a constant learning rate, and average networks drawn from the weights on the way.

    Args:
        net: a trained network; it stays as it is.
        loader: minibatches of training data.
        num_samples: S, networks to draw.
        likelihood: whose mean negative logarithm is descended.
        epochs: passes over the training data.
        learning_rate: constant, so large that the weights go on moving: about half of the highest in training.
        momentum, weight_decay: of the descent.
        every: steps between two sets of weights; None: one set after each epoch.
        rank: K of :class:`WeightMoments`.
        batch_norm_batches: minibatches from which each draw's batch-norm statistics are estimated.
        seed: of the draws, and of noise within the network.

    Raises:
        ArgumentError: an impossible argument, or fewer than two sets of weights.
        DivergenceError: the weights are not finite any more.
    """
    for name, value in (("num_samples", num_samples), ("epochs", epochs), ("every", every or 1)):
        if not is_whole(value, 1):
            raise ArgumentError(f"{name} is {shown(value)}, but must be at least 1.")
    if not is_positive(learning_rate):
        raise ArgumentError(f"learning_rate is {shown(learning_rate)}, but must be positive.")
    check_repeatable(loader, "training")
    moments, moving = WeightMoments(rank), copy.deepcopy(net).requires_grad_(True).train()
    optimizer = torch.optim.SGD(
        moving.parameters(), lr=learning_rate, momentum=momentum, weight_decay=weight_decay
    )
    how, steps = resolve(likelihood), 0
    for _ in range(epochs):
        for x, y in minibatches(loader, moving, "training"):
            how = _step(moving, optimizer, how, x, y)
            steps += 1
            if every is not None and steps % every == 0:
                moments.update(moving.named_parameters())
        if every is None:
            moments.update(moving.named_parameters())
    _check_finite(moments.mean.values())
    draws = (moments.draw() for _ in range(num_samples))
    return AveragedNetwork(
        moving, [with_own_statistics(moving, draw, loader, batch_norm_batches) for draw in draws]
    )


def _step(
    net: nn.Module, optimizer: torch.optim.Optimizer, likelihood: Likelihood, x: Any, y: Tensor
) -> Likelihood:
    """Descend the mean negative log-likelihood of a minibatch by one step; return the likelihood, settled."""
    device = device_of(net)
    args, kwargs = call_arguments(move_to(x, device), net)
    output, y = net(*args, **kwargs), y.to(device)
    _check_finite([output_tensor(output)])
    likelihood = settle(likelihood, output, y)
    distribution, value = observe(likelihood, output, y)
    optimizer.zero_grad()
    (-distribution.log_prob(value).mean()).backward()
    optimizer.step()
    return likelihood


def _check_finite(tensors: Iterable[Tensor]) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise DivergenceError("SWAG's descent gives numbers that are not finite: lower learning_rate.")
