"""How large the weights of a tensor are: what scales of priors and codebooks are matched to."""

from torch import Tensor

#: Below this a float32 square is lost; such weights are zeros to every density.
LEAST_SCALE = 1e-15
#: Above this sums of float32 squares are lost, and with them every density.
LARGEST_WEIGHT = 1e15


def weight_scale(weight: Tensor) -> Tensor:
    """Return the root mean square of a pretrained tensor, a float32 scalar above 0.

    A tensor of zeros (a branch, an adapter or a control that starts as nothing) says nothing of how large its
    weights will be: they get the size that weights of its shape usually start with, ``1 / √fan_in``.
    """
    weight = weight.detach()
    scale = weight.float().square().mean().sqrt()
    if not scale.isfinite():  # squares beyond float32's range
        scale = weight.double().square().mean().sqrt().float()
    # weight[0]: what one output sees, of linear layers and convolutions alike.
    fan_in = weight[0].numel() if weight.dim() > 1 else weight.numel()
    return scale.new_tensor(fan_in**-0.5) if scale < LEAST_SCALE else scale
