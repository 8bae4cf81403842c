"""Packed modules against torch's own with the decoded weight, over everything those can be told."""

import copy
import warnings

import pytest
import torch
from torch import nn

from sqs_pyro.errors import NetworkError
from sqs_pyro.kernels import packed_network
from sqs_pyro.testing.layouts import random_coded


def pack_module(module: nn.Module, name="weight", components=5):
    """Return the packed module, and the plain one with the decoded weight; leftovers stay exact."""
    weight = module.get_parameter(name)
    coded = random_coded(tuple(weight.shape), components)
    plain = copy.deepcopy(module).eval()
    with torch.no_grad():
        plain.get_parameter(name).copy_(coded.dense())
    return packed_network(module, {name: coded}, leftover_dtype="float32"), plain


def assert_equal_outputs(module, *inputs, **options):
    packed, plain = pack_module(module)
    assert type(packed).__name__ == "Packed" + type(module).__name__
    torch.testing.assert_close(packed(*inputs, **options), plain(*inputs, **options), rtol=0, atol=1e-5)


CONVOLUTIONS = [
    nn.Conv1d(4, 6, 3),
    nn.Conv1d(4, 6, 4, padding="same"),
    nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular", bias=False),
    nn.Conv2d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 8, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
    nn.Conv2d(4, 4, 3, groups=4, padding="same", dilation=2),
    nn.Conv2d(4, 6, (2, 3), padding="same"),
    nn.Conv2d(4, 6, (2, 4), padding="same", padding_mode="reflect"),
    nn.Conv2d(4, 6, 3, padding="valid", padding_mode="replicate"),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    nn.Conv3d(4, 6, 3, padding=1),
    nn.Conv3d(4, 6, (2, 3, 4), padding="same"),
    nn.ConvTranspose1d(4, 6, 3, stride=2),
    nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False, dilation=2),
    nn.ConvTranspose3d(4, 6, 3, stride=2),
]


@pytest.mark.parametrize("module", CONVOLUTIONS, ids=str)
def test_convolutions(module):
    space = (9, 8, 10)[: module.weight.dim() - 2]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")  # torch's, at its own
        assert_equal_outputs(module, torch.randn(2, 4, *space))
        assert_equal_outputs(module, torch.randn(4, *space))  # without batch


def test_transposed_convolution_of_a_given_size():
    module = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)
    x = torch.randn(2, 4, 6, 6)
    assert_equal_outputs(module, x, output_size=(12, 12))
    assert_equal_outputs(module, x, output_size=(11, 12))
    with pytest.raises(ValueError, match="requested an output size"):
        pack_module(module)[0](x, output_size=(40, 40))


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
    assert_equal_outputs(nn.Linear(30, 7, bias=bias), torch.randn(2, 5, 30))
    assert_equal_outputs(nn.Linear(30, 7, bias=bias), torch.randn(30))
    assert_equal_outputs(nn.Linear(30, 7, bias=bias), torch.randn(0, 30))


def test_embedding():
    assert_equal_outputs(nn.Embedding(30, 7, padding_idx=3), torch.randint(0, 30, (4, 6)))


def test_half_precision_networks():
    for module, x in [
        (nn.Linear(30, 7), torch.randn(5, 30)),
        (nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 7, 7)),
        (nn.Embedding(30, 7), torch.randint(0, 30, (5,))),
    ]:
        packed, plain = pack_module(module)
        for dtype in (torch.float16, torch.bfloat16):
            given = x.to(dtype) if x.is_floating_point() else x
            actual = packed.to(dtype)(given)
            assert actual.dtype == dtype
            torch.testing.assert_close(actual, plain.to(dtype)(given), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
        packed.float()
        plain.float()


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (torch.float16, None),
        (torch.bfloat16, None),
        (torch.bfloat16, "aot_eager"),
        pytest.param(torch.bfloat16, "inductor", marks=pytest.mark.slow),
    ],
)
def test_autocast(dtype, backend):
    """Products are made in the dtype that was asked for, as torch's are; gradients come back in x's own."""
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(96, 5))
    coded = {name: random_coded(tuple(plain.get_parameter(name).shape), 5) for name in ("0.weight", "2.weight")}
    packed = packed_network(plain, coded)
    run = packed if backend is None else torch.compile(packed, fullgraph=True, backend=backend)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = run(x)
    assert y.dtype == plain(x).float().to(dtype).dtype
    torch.testing.assert_close(y.float(), packed(x), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.abs().sum() > 0
    with torch.autocast("cpu", dtype, enabled=False):
        assert packed(x).dtype == torch.float32


def test_a_network_made_in_half_precision():
    packed, plain = pack_module(nn.Linear(30, 7).bfloat16())
    x = torch.randn(5, 30).bfloat16()
    assert packed.weight.dtype == torch.bfloat16
    assert torch.equal(packed(x), plain(x))


def test_deepcopy_is_independent():
    packed, _ = pack_module(nn.Linear(30, 7))
    x = torch.randn(5, 30)
    before = packed(x)
    clone = copy.deepcopy(packed)
    assert torch.equal(clone(x), before)
    clone.packed_weight.table.zero_()
    clone.bias.data.zero_()
    assert not clone(x).any()
    assert torch.equal(packed(x), before)


def test_load_state_dict_between_packed_modules():
    first, _ = pack_module(nn.Linear(30, 7))
    second, _ = pack_module(nn.Linear(30, 7))
    second.packed_weight.table.view(torch.float32).mul_(3)
    x = torch.randn(5, 30)
    first(x)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))


def test_moving_to_a_device_and_back():
    packed, plain = pack_module(nn.Linear(30, 7))
    x = torch.randn(5, 30)
    packed(x)
    packed._apply(lambda tensor: tensor.clone())  # what .to(another device) does to every tensor
    torch.testing.assert_close(packed(x), plain(x))


def test_gradients_flow_through_a_packed_network_but_not_into_it():
    packed, plain = pack_module(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)), "2.weight")
    x, y = torch.randn(2, 3, 9, 9, requires_grad=True), torch.randn(2, 3, 9, 9)
    y.data.copy_(x)
    y.requires_grad_()
    packed(x).square().sum().backward()
    plain(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed[0].weight.grad, plain[0].weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed[2].bias.grad, plain[2].bias.grad, rtol=1e-4, atol=1e-4)
    assert "2.weight" not in dict(packed.named_parameters())


def test_the_weight_can_be_read():
    packed, plain = pack_module(nn.Linear(30, 7))
    assert torch.equal(packed.weight, plain.weight)
    with pytest.raises(AttributeError):
        packed.weight = torch.zeros(7, 30)


def test_attention_and_its_fast_path():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    coded = {n: random_coded(tuple(p.shape), 6) for n, p in layer.named_parameters() if p.dim() == 2}
    assert "self_attn.in_proj_weight" in coded
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        for name, value in coded.items():
            plain.get_parameter(name).copy_(value.dense())
    packed = packed_network(layer, coded, leftover_dtype="float32")
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(packed(x), plain(x), rtol=0, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), plain(x), rtol=0, atol=1e-5)
    assert dict(packed.named_parameters()).keys() == {n for n, p in layer.named_parameters() if p.dim() == 1}


class Scaled(nn.Linear):
    """A user's own layer: it must go on to compute what it computes."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_keeps_its_forward():
    packed, plain = pack_module(nn.Sequential(Scaled(30, 7)), "0.weight")
    x = torch.randn(5, 30)
    assert isinstance(packed[0], Scaled)
    assert torch.equal(packed(x), plain(x))
    assert torch.equal(copy.deepcopy(packed)(x), plain(x))


def test_hooks_are_kept():
    module = nn.Sequential(nn.Linear(30, 7))
    module[0].register_forward_hook(lambda module, args, output: output + 1)
    packed, plain = pack_module(module, "0.weight")
    x = torch.randn(5, 30)
    assert torch.equal(packed(x), plain(x))


@pytest.mark.parametrize(
    ("module", "name"), [(nn.LSTM(4, 4), "weight_hh_l0"), (nn.Embedding(9, 4, max_norm=1.0), "weight")]
)
def test_modules_that_rewrite_their_weights_are_refused(module, name):
    with pytest.raises(NetworkError, match=f"{type(module).__name__} keeps or rewrites.*exclude them"):
        pack_module(module, name)


def test_the_original_stays_as_it_is():
    net = nn.Sequential(nn.Linear(30, 7), nn.BatchNorm1d(7)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    packed = packed_network(net, {"0.weight": random_coded((7, 30), 5)})
    packed[1].weight.data.fill_(5.0)
    assert net.training
    assert not packed.training
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
