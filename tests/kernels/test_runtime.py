"""What is said of weights at run time, against what is in memory after a call."""

import torch
from torch import nn

from sqs_pyro.kernels import packed_ensemble, packed_network
from sqs_pyro.kernels.decode import decoded_weights
from sqs_pyro.kernels.runtime import runtime_weights
from sqs_pyro.testing.layouts import random_coded


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(40, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.wide = nn.Linear(16, 24)
        self.head = nn.Linear(24, 16)

    def forward(self, tokens):
        x = self.words(tokens)
        return self.head(self.wide(self.attention(x, x, x, need_weights=False)[0]))


def test_bytes_are_those_in_memory():
    net = Net()
    coded = {n: random_coded(tuple(p.shape), 9) for n, p in net.named_parameters() if p.dim() == 2}
    coded["wide.weight"] = random_coded((24, 16), 9, groups=24)
    packed = packed_network(net, coded)
    packed(torch.randint(0, 40, (2, 5)))
    found = {weight.name: weight for weight in runtime_weights(packed)}
    assert found.keys() == coded.keys()
    modules = dict(packed.named_modules())
    for name, weight in found.items():
        owner, _, attribute = name.rpartition(".")
        module = modules[f"{owner}.packed_{attribute}"]
        assert (weight.form, weight.shape) == (module.form, module.shape)
        assert weight.packed_bytes == sum(buffer.nbytes for buffer in module.buffers())
        assert weight.decoded_bytes == decoded_weights.num_bytes(module.codes)
    assert found["attention.in_proj_weight"].decoded_bytes == 48 * 16 * 4
    assert found["attention.in_proj_weight"].reason == "its module reads the decoded weight"


def test_draws_are_decoded_and_shared_weights_stand_once():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = net[0].weight
    coded = random_coded((8, 8), 4)
    assert [weight.name for weight in runtime_weights(packed_network(net, {"0.weight": coded}))] == ["0.weight"]
    (weight,) = runtime_weights(packed_ensemble(net, [{"0.weight": coded}] * 3))
    assert weight.shape == (8, 8, 3) and weight.form == "dense"
    assert weight.decoded_bytes == 8 * 8 * 3 * 4
