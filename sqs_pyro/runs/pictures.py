"""From a compression result to the plain arrays that the pictures are drawn from."""

from typing import Any

import torch
from numpy.typing import NDArray

from sqs_pyro.compression.finetune.call import CompressionResult
from sqs_pyro.packing.size import SizeReport
from sqs_pyro.reporting.layers import LayerPicture


@torch.no_grad()
def layer_pictures(result: CompressionResult, report: SizeReport) -> list[LayerPicture]:
    """A picture of every compressed layer, in the network's order.

    Args:
        result: the compressed network and its posterior.
        report: its size, for the bits that each layer takes.
    """
    shipped = dict(result.hard.named_parameters())
    bits = {row.name: 8 * row.bytes / row.numel for row in report.tensors}
    pictures = []
    for name, site in result.guide.site_guides().items():
        bulk = site.windows.bulk(site.latent[site.mask] if site.mask.any() else site.latent)
        pictures.append(
            LayerPicture(
                name=name,
                weights=_array(site.latent),
                values=_array(shipped[name]),
                nonzero=_array(site.gates() > 0.5),
                loc=_array(site.loc[0]),
                scale=_array(site.scale[0]),
                mixing=_array(site.mixing_logits[0].softmax(-1)),
                window_edges=_array(site.edges),
                bits=bits[name],
                bulk=None if bulk is None else _array(torch.stack(bulk)),
            )
        )
    return pictures


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    return tensor.detach().flatten().cpu().numpy()
