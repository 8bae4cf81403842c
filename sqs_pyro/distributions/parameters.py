"""Parameters of the distributions of a weight: what they may be, and the sentence when they are not."""

import torch
from torch import Tensor


def as_scalar(value: Tensor | float | None, like: Tensor) -> Tensor | None:
    """Return a number as a tensor like another; ``None`` stays."""
    return None if value is None else torch.as_tensor(value, dtype=like.dtype, device=like.device)


def check_probability(owner: str, name: str, value: Tensor) -> None:
    """Raise a ValueError that names the range found unless every element lies in [0, 1] (NaN does not)."""
    # "Not all inside" instead of "any outside": comparisons with NaN are False.
    if not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError(
            f"{owner}: {name} must lie in [0, 1], but got values from {value.min().item():g} to "
            f"{value.max().item():g}; give probabilities, for example torch.sigmoid of a logit."
        )


def check_components(
    loc: Tensor, scale: Tensor, num_components: int, temperature: float | Tensor, spike_scale: Tensor | None
) -> None:
    """Raise a ValueError unless a spike-and-GMM's components, temperature and spike are in their domains."""
    if spike_scale is not None and not float(spike_scale) > 0:
        raise ValueError(
            f"SpikeGMM: spike_scale must be positive, but got {float(spike_scale):g}; None is a point mass."
        )
    if not float(temperature) > 0:
        raise ValueError(
            f"SpikeGMM: temperature must be positive, but got {float(temperature):g}; "
            "for hard codes use a small value such as 1e-3, not 0."
        )
    if not bool((scale > 0).all()):
        raise ValueError(
            f"SpikeGMM: scale must be positive, but its smallest value is {scale.min().item():g}; "
            "parameterise it as exp or softplus of a free parameter, with a floor."
        )
    if not bool(loc.isfinite().all()):
        raise ValueError("SpikeGMM: loc must be finite, but got NaN or infinity; check the codebook.")
    for name, value in (("loc", loc), ("scale", scale)):
        if value.dim() == 0 or value.shape[-1] not in (1, num_components):
            raise ValueError(
                f"SpikeGMM: the last dimension of {name} must be the number of components, "
                f"{num_components} (or 1), but got shape {tuple(value.shape)}."
            )


def check_responsibilities(responsibilities: Tensor) -> None:
    """Raise a ValueError unless responsibilities are probabilities that sum to 1 over the last dimension."""
    check_probability("SpikeGMM", "responsibilities", responsibilities)
    sums = responsibilities.detach().sum(-1)
    worst = (sums - 1).abs().max().item()
    if worst > 1e-4:  # what a softmax over many components may lack in float32
        raise ValueError(
            f"SpikeGMM: responsibilities must sum to 1 over the last dimension, but a sum is off by "
            f"{worst:g}; normalise them or pass logits instead."
        )
