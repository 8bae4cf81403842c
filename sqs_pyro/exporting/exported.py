"""``Exported``: what became of the compressed tensors of a network that was exported."""

from dataclasses import dataclass, field

from torch import nn

from sqs_pyro.errors import NetworkError
from sqs_pyro.packing.stored import METADATA, StoredEnsemble


@dataclass(frozen=True)
class Exported:
    """Which compressed tensors an export holds as codes, and which as numbers.

    Attributes:
        packed: name of each parameter that stays packed, and how.
        decoded: name of each parameter that was decoded, and why.
    """

    packed: dict[str, str] = field(default_factory=dict)
    decoded: dict[str, str] = field(default_factory=dict)


def check_one_network(packed: nn.Module) -> None:
    """Check that a packed network is given, and not an average of several.

    Raises:
        NetworkError: it is not packed, or an ensemble.
    """
    if isinstance(packed, StoredEnsemble):
        raise NetworkError(
            f"An ensemble of {packed.num_draws} draws cannot be exported, because it averages networks: give the "
            "packed file of one."
        )
    if not hasattr(packed, METADATA):
        raise NetworkError(
            f"A packed network is needed (the result of packed_network or load), but a {type(packed).__name__} "
            "without packed weights was given: pack it first."
        )
