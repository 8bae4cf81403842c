"""Deep ensembles (Lakshminarayanan et al. 2017): networks trained from different first weights, averaged."""

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor, nn

from sqs_pyro.arguments import is_whole
from sqs_pyro.documents import shown
from sqs_pyro.errors import ArgumentError, NetworkError
from sqs_pyro.evaluation.averaging import AveragedNetwork


def deep_ensemble(train: Callable[[int], nn.Module], num_samples: int = 5) -> AveragedNetwork:
    """Train networks and average them.

    Args:
        train: from a member's number, which should seed first weights and order of data, to a trained network; all
            are of one architecture.
        num_samples: S, members.

    Raises:
        ArgumentError: there would be no member.
        NetworkError: members differ in the shape of a tensor, or two are the same network.
    """
    if not is_whole(num_samples, 1):
        raise ArgumentError(f"num_samples is {shown(num_samples)}, but must be at least 1 member.")
    states: list[dict[str, Tensor]] = []
    for number in range(num_samples):
        net = train(number)
        # Copied at once: the next member may be the same module, trained again.
        states.append({name: t.clone() for name, t in net.state_dict().items() if t.is_floating_point()})
    ensemble = AveragedNetwork(net, states)
    for (i, one), (j, other) in combinations(enumerate(states), 2):
        if one and all(torch.equal(one[name], other[name]) for name in one):
            raise NetworkError(
                f"Members {i} and {j} of the ensemble are the same network: let their number seed what makes them "
                "differ, first weights or the order of the data."
            )
    return ensemble
