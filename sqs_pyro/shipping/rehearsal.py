"""The whole way from weights to a packed network, gone once before anything is trained.

What cannot be packed, stored or copied, or computes something else once it is packed, says so here and not after
hours: the rehearsal is the very code that ships a network, run on the codebooks that training starts from.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.kernels.network import running_network
from sqs_pyro.packing import pack, size_report
from sqs_pyro.packing.storage import Storage
from sqs_pyro.shipping.agreement import check_agreement
from sqs_pyro.shipping.pack import hard_network
from sqs_pyro.shipping.shipped import shipped_network


def rehearse(
    net: nn.Module,
    guide: SpikeGMMGuide,
    storage: Storage,
    inputs: Any | None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Check that a network can be shipped as it is to be stored.

    Args:
        net: the network.
        guide: of its weights, in any stage.
        storage: how it will be packed.
        inputs: of a minibatch, on which packed and dense weights must agree; None leaves that out.
        metadata: that will be written into the file.

    Raises:
        NetworkError: it cannot; the sentence names what stands in the way.
    """
    sites = guide.site_guides().items()
    # A guide in its dense stage has no codes yet: its codebooks are those of the pretrained weights.
    coded = {name: site.harden(storage.codebook, keep_codes=False) for name, site in sites}
    # Without inputs: which modules folding would change is asked of the trained network, not of this one.
    dense = shipped_network(hard_network(net, coded), coded, storage.leftover_dtype)
    layout = "dense" if storage.layout == "dense" else "bitmap"  # the others hold whatever this one does, slower
    contents = pack(dense, coded, layout=layout, leftover_dtype=None, metadata=metadata)
    size_report(contents)  # names, dtypes and metadata are what a file takes
    packed = running_network(dense, contents)
    if inputs is not None:
        check_agreement(dense, packed, inputs)
