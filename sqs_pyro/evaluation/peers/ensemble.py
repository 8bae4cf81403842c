"""Deep ensembles (Lakshminarayanan et al. 2017): networks trained from different first weights, averaged."""

from collections.abc import Callable

from torch import nn

from sqs_pyro.arguments import is_whole
from sqs_pyro.documents import shown
from sqs_pyro.errors import ArgumentError
from sqs_pyro.evaluation.averaging import AveragedNetwork


def deep_ensemble(train: Callable[[int], nn.Module], num_samples: int = 5) -> AveragedNetwork:
    """Train networks and average them.

    Args:
        train: from a member's number, which should seed first weights and order of data, to a trained network; all
            are of one architecture.
        num_samples: S, members.

    Raises:
        ArgumentError: there would be no member.
        NetworkError: members differ in the shape of a tensor.
    """
    if not is_whole(num_samples, 1):
        raise ArgumentError(f"num_samples is {shown(num_samples)}, but must be at least 1 member.")
    members = [train(number) for number in range(num_samples)]
    return AveragedNetwork(
        members[0],
        [{name: t for name, t in net.state_dict().items() if t.is_floating_point()} for net in members],
    )
