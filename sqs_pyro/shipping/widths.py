"""Widths of a posterior beside its most probable network: all that a packed file needs to be drawn from.

With one-hot gates and codes ``q(θ_i)`` is zero, or ``N(c_i, σ²)`` around the codeword that the file holds; one σ
for a tensor, or for all, is a few bytes of metadata.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from sqs_pyro.arguments import is_positive
from sqs_pyro.documents import shown
from sqs_pyro.errors import NetworkError, PackedFileError
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.packing.contents import parts_of_packed, with_metadata

#: Of the metadata; by a name that nobody gives to something else.
WIDTHS = "posterior_widths"


def with_widths(metadata: Mapping[str, Any] | None, guide: SpikeGMMGuide) -> Mapping[str, Any]:
    """Return what a file shall say of itself, with the widths of a guide's components.

    Raises:
        NetworkError: the metadata is no mapping.
    """
    # Four digits: a width is known to a few per cent at best.
    widths = {name: float(f"{site.scale.mean().item():.4g}") for name, site in guide.site_guides().items()}
    same = len(set(widths.values())) == 1
    return with_metadata({WIDTHS: next(iter(widths.values())) if same else widths}, metadata)


def widths_of(packed: nn.Module) -> dict[str, float] | None:
    """Return σ of each compressed tensor of a packed network by name; None where its file knows none.

    Raises:
        NetworkError: the module is not a packed network.
        PackedFileError: what the file says is no width.
    """
    _, weights, metadata, _ = parts_of_packed(packed)
    said = metadata.get(WIDTHS)
    if said is None:
        return None
    widths = dict(said) if isinstance(said, Mapping) else dict.fromkeys(weights, said)
    if set(widths) != set(weights) or not all(is_positive(width) for width in widths.values()):
        raise PackedFileError(
            f"The packed file's {WIDTHS} are {shown(said)}, but must be one positive number, or one for each "
            "compressed tensor."
        )
    return widths


def needed_widths(packed: nn.Module) -> dict[str, float]:
    """Return what :func:`widths_of` does; raises NetworkError where there are none."""
    widths = widths_of(packed)
    if widths is None:
        raise NetworkError(
            "This packed network has no widths to draw by: compress with allocation 'rate_distortion', whose "
            "E-step tells them to the file, or draw from the guide."
        )
    return widths
