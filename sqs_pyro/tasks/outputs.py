"""What a network says of every example of a loader."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sqs_pyro.errors import DataError
from sqs_pyro.evaluation.input_checks import NO_EXAMPLE
from sqs_pyro.networks.calling import device_of, move_to, predictions
from sqs_pyro.networks.loaders import Loader
from sqs_pyro.networks.minibatches import minibatches
from sqs_pyro.networks.modes import evaluating


@torch.no_grad()
def outputs(net: nn.Module, loader: Loader, fill: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return predictions and targets in the order of the loader, on the CPU; ``net`` runs in evaluation mode.

    Args:
        net: from a minibatch to ``[B, ..., T]``, or ``[B]``.
        loader: of ``(x, y)``.
        fill: in place of what shorter minibatches lack at the end of the last dimension.

    Returns:
        ``[N, ..., T]`` float32, of the largest T, or ``[N]``, and ``[N, ...]``.

    Raises:
        DataError: the loader is empty.
    """
    device = device_of(net)
    with evaluating(net):
        pairs = [
            (predictions(net, move_to(x, device)).float().cpu(), y)  # GPUs need not hold a data set's outputs
            for x, y in minibatches(loader, net, "evaluation")
        ]
    if not pairs:
        raise DataError(NO_EXAMPLE)
    if pairs[0][0].dim() < 2:  # a number an example
        return torch.cat([found for found, _ in pairs]), torch.cat([y for _, y in pairs])
    # Minibatches of tokens are padded to their own longest text: T differs between them.
    width = max(found.shape[-1] for found, _ in pairs)
    rows = [F.pad(found, (0, width - found.shape[-1]), value=fill) for found, _ in pairs]
    return torch.cat(rows), torch.cat([y for _, y in pairs])
