"""Places for packed weights, filled by hand: any loader may do what transformers does."""

import json

import pytest
import torch
from torch import nn

from sqs_pyro.errors import NetworkError, PackedFileError
from sqs_pyro.integrations.pending import PendingWeight, complete, reserve
from sqs_pyro.integrations.records import read_record, record_of, stored_bytes
from sqs_pyro.kernels import PackedLinear
from sqs_pyro.packing import TensorRecord, layout_names, pack_tensor
from sqs_pyro.testing.layouts import random_coded

CODED = random_coded((6, 8), 5, groups=3)


def through_json(packed):
    """A record as another program may hand it over: keys sorted."""
    record = record_of(TensorRecord.of("weight", packed))
    return read_record("weight", json.loads(json.dumps(record, sort_keys=True)))


def pending(tensor, net, shared=None):
    reserve(net, {"0.weight": tensor}, shared or {})
    return net.state_dict()


def meta_net():
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(8, 6), nn.Linear(8, 6))


@pytest.mark.parametrize("layout", sorted({*layout_names()} - {"conditional"}))
def test_bytes_and_record_are_the_tensor(layout):
    packed = pack_tensor(CODED, layout)
    tensor, stored = through_json(packed), stored_bytes(packed)
    assert stored.dtype == torch.uint8 and stored.shape == (packed.num_bytes,) == (tensor.bytes,)
    again = tensor.with_bytes(stored)
    assert list(again.parts) == list(packed.parts)
    assert torch.equal(again.unpack().dense(), CODED.dense())
    for wrong in (stored[:-1], stored ^ 1, stored.char()):
        with pytest.raises(PackedFileError):
            tensor.with_bytes(wrong)


def test_reserve_fill_complete():
    packed = pack_tensor(CODED)
    net = meta_net()
    state = pending(through_json(packed), net, {"1.weight": "0.weight"})
    assert {name: value.dtype for name, value in state.items() if "bias" not in name} == {
        "0.packed_weight.stored": torch.uint8
    }
    assert isinstance(net[0], PackedLinear) and net[0].weight.shape == (6, 8) and net[0].weight.is_meta
    net[0].packed_weight.stored = stored_bytes(packed)
    assert torch.equal(net[1].packed_weight.coded().dense(), CODED.dense())
    complete(net)
    assert net[0].packed_weight is net[1].packed_weight
    assert torch.equal(net[0].weight, CODED.dense())
    assert not any(isinstance(module, PendingWeight) for module in net.modules())


def test_bytes_that_never_came_or_are_wrong():
    packed = pack_tensor(CODED)
    net = meta_net()
    pending(through_json(packed), net)
    with pytest.raises(NetworkError, match=r"'0.weight' was not loaded, or offloaded .*: packed networks cannot"):
        complete(net)
    net[0].packed_weight.stored = torch.zeros(packed.num_bytes, dtype=torch.uint8)
    with pytest.raises(
        PackedFileError, match=r"'0.weight' cannot be read: its bytes are damaged or absent: .*; fetch"
    ):
        complete(net)


def test_names_and_shapes_that_are_not_the_networks():
    tensor = through_json(pack_tensor(CODED))
    for shared, sentence in (
        ({"2.weight": "0.weight"}, "no parameter '2.weight'"),
        ({"1.bias": "0.weight"}, "shape"),
    ):
        with pytest.raises(NetworkError, match=sentence):
            reserve(meta_net(), {"0.weight": tensor}, shared)
