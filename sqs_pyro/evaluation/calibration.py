"""Temperature scaling (Guo et al. 2017): what any average has to beat, at the price of one number."""

from torch import Tensor, nn

from sqs_pyro.networks.calling import output_tensor

_LOWEST, _HIGHEST = 0.01, 100.0


class TemperatureScaled(nn.Module):
    """A network whose logits are divided by one temperature.

    Args:
        net: any module from inputs to logits.
        temperature: out of :func:`fit_temperature`.
    """

    def __init__(self, net: nn.Module, temperature: float) -> None:
        super().__init__()
        self.net, self.temperature = net, temperature
        self.train(net.training)

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Return what the network says; the arguments are its own."""
        return output_tensor(self.net(*args, **kwargs)) / self.temperature


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T of the smallest NLL of ``softmax(logits / T)``, within 0.01..100.

    The NLL is convex in ``1/T``; its derivative ``mean(E_p[z] - z_y)`` crosses zero at most once.

    Args:
        logits: ``[n, C]``, or log-probabilities, of validation examples.
        labels: ``[n]``.
    """
    from scipy.optimize import brentq  # heavy, and only needed here

    z = logits.double()
    chosen = z.gather(1, labels[:, None]).mean()  # mean of z_y, which T does not change

    def slope(inverse: float) -> float:
        return float(((z * inverse).softmax(-1) * z).sum(-1).mean() - chosen)

    # Where the ends do not enclose the root the NLL falls to one of them: logits always right, or of no use.
    low, high = 1 / _HIGHEST, 1 / _LOWEST
    if slope(low) >= 0:
        return _HIGHEST
    if slope(high) <= 0:
        return _LOWEST
    return 1 / float(brentq(slope, low, high))
