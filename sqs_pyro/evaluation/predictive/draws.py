"""What the draws of a predictor say on a whole data set, each by itself."""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sqs_pyro.errors import DataError, NetworkError
from sqs_pyro.evaluation.classification import predict
from sqs_pyro.evaluation.input_checks import NO_EXAMPLE, named, run
from sqs_pyro.evaluation.predictive.detection import mixture_log_probabilities
from sqs_pyro.isolation import isolating
from sqs_pyro.models.likelihoods import resolve
from sqs_pyro.models.observation import Likelihood, innermost, observe
from sqs_pyro.networks.calling import device_of, move_to, output_tensor
from sqs_pyro.networks.minibatches import minibatches
from sqs_pyro.networks.modes import evaluating


@runtime_checkable
class GivesDraws(Protocol):
    """A predictor that averages draws, and can tell what each of them says."""

    def each(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the draws' outputs, ``[S, B, ...]``."""


def predict_each(net: nn.Module, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Return log-probabilities ``[S, n, C]`` of a classifier's draws, and labels ``[n]``.

    All of them are held at once: 8 MB for 20 draws, 10,000 examples and 10 classes.

    Args:
        net: a predictor with draws (:class:`GivesDraws`), or any module from a minibatch to logits: then S is 1.
        loader: minibatches of inputs and labels.

    Raises:
        DataError: the loader is empty, labels or inputs do not fit the network, or some labels are left out.
        NetworkError: the network cannot run, gives NaN, or gives no logits ``[B, C]``.
    """
    heard = _Heard(net)
    _, labels = predict(heard, loader)
    log_p = torch.cat(heard.log_p, 1)
    if labels.dim() != 1 or len(labels) != log_p.shape[1]:
        raise DataError(
            f"Labels {list(labels.shape)} were given for {log_p.shape[1]} examples, but each needs one class: "
            "leave out examples without a label."
        )
    return log_p, labels


class _Heard(nn.Module):
    """A predictor that answers with its draws' average, and keeps what each of them said."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.called_like = net
        self.log_p: list[Tensor] = []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        logits = _each(self.called_like, *args, **kwargs)
        if logits.dim() != 3:
            raise NetworkError(
                f"{type(self.called_like).__name__} gives outputs of the shape {list(logits.shape[1:])}, but must "
                "give logits of classes for every example, [B, C]."
            )
        self.log_p.append(logits.float().log_softmax(-1))
        return mixture_log_probabilities(self.log_p[-1])


@isolating("net", sees_parameters=True, sees_autocast=True)
@torch.no_grad()
def predict_numbers(
    net: nn.Module, loader: Iterable[Any], likelihood: str | Likelihood = "gaussian"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a regression's means ``[S, n, ...]`` by draw, the noise's scales likewise, and observations.

    Args:
        net: a predictor with draws (:class:`GivesDraws`), or any module from a minibatch to numbers: then S is 1.
        loader: minibatches of inputs and observations.
        likelihood: ``"gaussian"``, ``Gaussian(scale)``, or a callable from a network's output to a normal
            distribution of the observations.

    Raises:
        DataError: the loader is empty, or observations or inputs do not fit the network.
        NetworkError: the network cannot run, or its likelihood is not normal.
    """
    how, device = resolve(likelihood), device_of(net)
    means, scales, observed = [], [], []
    outputs = _Outputs(net)
    with evaluating(net):
        for number, (x, y) in enumerate(minibatches(loader, net, "evaluation"), 1):
            name = f"Evaluation minibatch {number}"
            each = run(outputs, move_to(x, device), name)
            with named(name):
                found = [observe(how, output, y.to(device)) for output in each]
            normals = [_normal(distribution) for distribution, _ in found]
            means.append(torch.stack([normal.loc for normal in normals]))
            scales.append(torch.stack([normal.scale for normal in normals]))
            observed.append(found[0][1])
    if not observed:
        raise DataError(NO_EXAMPLE)
    return torch.cat(means, 1), torch.cat(scales, 1), torch.cat(observed)


class _Outputs(nn.Module):
    """A module whose output is what each draw says."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.called_like = net

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return _each(self.called_like, *args, **kwargs)


def _each(net: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Return outputs ``[S, B, ...]``; of a network without draws S is 1."""
    return net.each(*args, **kwargs) if isinstance(net, GivesDraws) else output_tensor(net(*args, **kwargs))[None]


def _normal(distribution: Any) -> torch.distributions.Normal:
    base = innermost(distribution)
    if not isinstance(base, torch.distributions.Normal):
        raise NetworkError(
            f"The likelihood's {type(base).__name__} is not normal: judge samples of it, "
            "evaluate_samples(Predictive(model, guide=guide, num_samples=200)(x)['obs'], y)."
        )
    return base
