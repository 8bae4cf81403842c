"""What every format of exports inherits: the packed outputs of a CNN, a depthwise CNN, a BERT and a Llama.

The Llama's weights have scales of parts of their inputs.
"""

from functools import cache

import pytest
from kits.network_case import built
from kits.networks_torchvision import TORCHVISION
from kits.packed_exports import INPUTS, on_whole_numbers, packed

from sqs_pyro import integrations
from sqs_pyro.errors import MissingPackageError, NetworkError, OutputError
from sqs_pyro.exporting.trace import outputs
from sqs_pyro.kernels import packed_network
from sqs_pyro.networks.calling import split_examples
from sqs_pyro.packing.stored import stored_weights
from sqs_pyro.runs.export.formats import FORMATS, Source
from sqs_pyro.testing.layouts import random_coded

NETWORKS = ("cnn", "depthwise", "bert", "llama")
#: What is compiled or translated takes seconds: of these the cells that no other fast test has.
FAST = {("onnx", "depthwise"), ("openvino", "llama"), *((name, "llama") for name in ("dense", "torchao", "gguf"))}
CELLS = [
    pytest.param(form, kind, marks=() if (form, kind) in FAST else pytest.mark.slow)
    for form in FORMATS
    for kind in NETWORKS
]


def whole(net, parts=False):
    """The network with whole numbers from -8 to 7 times scales, of outputs or of parts, in every matrix."""
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters() if p.dim() > 1}
    coded = {name: random_coded(shape, 15, seed=i, scales=parts) for i, (name, shape) in enumerate(shapes.items())}
    return packed_network(net, {name: on_whole_numbers(one) for name, one in coded.items()})


@cache
def network(kind):
    """A packed network and a minibatch."""
    if kind == "cnn":
        return packed("residual", "whole numbers of 4 bits"), INPUTS["residual"]
    if kind == "depthwise":
        case = TORCHVISION["mobilenet_v2"]
        return whole(built(case)), case.inputs(4)
    kit = pytest.importorskip("kits.tiny_transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 64}  # multiples of 32, and halves too: no format has to round
    net = whole(kit.tiny(kind, **sizes), parts=2 if kind == "llama" else False)
    return net, kit.inputs(net)


@pytest.mark.parametrize(("form", "kind"), CELLS)
def test_outputs_are_those_of_the_packed_network(form, kind, tmp_path):
    chosen, (net, inputs), path = FORMATS[form], network(kind), tmp_path / "packed"
    try:
        chosen.check(None)
    except MissingPackageError as missing:
        pytest.skip(str(missing))
    if kind in ("bert", "llama"):
        integrations.save_pretrained(net, path)
    elif chosen.of_directories:
        path.write_bytes(b"")
        with pytest.raises(OutputError, match="packed Hugging Face directory"):
            chosen.check_source(path)
        return
    made = tmp_path / "made"
    if chosen.is_directory(path):
        made.mkdir()
    if (form, kind) == ("gguf", "bert"):
        with pytest.raises(NetworkError, match="cannot be written as GGUF"):
            chosen.write(Source(path, net, inputs, "float32"), made)
        return
    exported, run = chosen.write(Source(path, net, inputs, "float32"), made)
    assert exported.packed.keys() | exported.decoded.keys() == stored_weights(net).keys()
    assert bool(exported.packed) == (form != "dense")
    # Of formats that nothing runs here, writing has compared the weights.
    for part in () if run is None else (inputs, next(split_examples(inputs, 1))):
        for found, expected in zip(run(part), outputs(net, part), strict=True):
            assert float((found - expected).abs().max()) <= 1e-3 * float(expected.abs().max())
            assert float(expected.std()) > 0.01 * float(expected.abs().max())  # it does not say one thing of all
    assert run is not None or form == "coreml"
