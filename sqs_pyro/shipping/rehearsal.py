"""The whole way from weights to a packed network, gone once before anything is trained.

What cannot be packed, stored or copied, or computes something else once it is packed, says so here and not after
hours: the rehearsal is the very code that ships a network, run on the codebooks that training starts from.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.inference.guide import SpikeGMMGuide
from sqs_pyro.kernels import packed_network
from sqs_pyro.packing import size_report
from sqs_pyro.shipping.agreement import check_agreement
from sqs_pyro.shipping.pack import hard_network
from sqs_pyro.shipping.shipped import shipped_network


def rehearse(
    net: nn.Module,
    guide: SpikeGMMGuide,
    recipe: CompressionRecipe,
    inputs: Any | None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Check that a network can be shipped as a recipe says.

    Args:
        net: the network.
        guide: of its weights, in any stage.
        recipe: how it will be packed.
        inputs: of a minibatch, on which packed and dense weights must agree; None leaves that out.
        metadata: that will be written into the file.

    Raises:
        NetworkError: it cannot; the sentence names what stands in the way.
    """
    dtype = getattr(torch, recipe.codebook_dtype)
    coded = {name: site.harden(dtype, keep_codes=False) for name, site in guide.site_guides().items()}
    dense = shipped_network(hard_network(net, coded), coded, recipe.leftover_dtype)
    layout = "dense" if recipe.layout == "dense" else "bitmap"  # the others hold whatever this one does, slower
    packed = packed_network(dense, coded, layout=layout, leftover_dtype=None, metadata=metadata)
    size_report(packed)
    if inputs is not None:
        check_agreement(dense, packed, inputs)
