"""The custom ops against plain torch on the decoded weight, and as torch's own tools see them."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sqs_pyro.kernels.decode import DecodedWeights, decode, decoded_weights
from sqs_pyro.kernels.ops import OPS, call
from sqs_pyro.kernels.weight import PackedWeight
from sqs_pyro.packing import CodedTensor, pack_tensor
from sqs_pyro.testing.layouts import random_coded

GEOMETRY = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)


def bitmap_coded(shape, scales=False) -> CodedTensor:
    """256 codes and zero: the one case that 8 bits cannot hold, so that the run-time form is the bitmap."""
    numel = torch.Size(shape).numel()
    mask = (torch.arange(numel) >= numel // 9).view(shape)
    codes = (torch.arange(numel) * 37 % 256).to(torch.uint8).view(shape) * mask
    each = (1 + torch.arange(shape[0]) / 64).half().float() if scales else None
    return CodedTensor(codes, mask, (torch.arange(256)[None] - 127.5) / 512, each)


def coded_for(form, shape, groups=1, scales=False) -> CodedTensor:
    if form == "bitmap":
        return bitmap_coded(shape, scales)
    groups = shape[0] if form == "rows" else groups  # else one codebook would do
    return random_coded(shape, 11, groups=groups, scales=scales)


def in_form(packed, form) -> PackedWeight:
    """The weight with compiled kernels, or without them."""
    with mock.patch("sqs_pyro.kernels.form.native_kernels", lambda wanted: wanted == form):
        weight = PackedWeight(packed)
        weight.used_for("convolution" if len(packed.shape) == 4 else "linear")
    assert weight.form == form
    return weight


def make(form, shape, groups=1, scales=False):
    coded = coded_for(form, shape, groups, scales)
    return in_form(pack_tensor(coded), form), coded.dense()


def packed_arguments(weight):
    args = weight.args
    mask = [] if args.mask is None else [args.mask]
    return (args.codes, args.table, *mask, args.scales, list(args.shape), args.bits)


FORMS = pytest.mark.parametrize("form", ["dense", "bitmap", "tiled"])
MATRIX_FORMS = pytest.mark.parametrize("form", ["dense", "bitmap", "tiled", "rows"])
SCALES = pytest.mark.parametrize("scales", [False, True], ids=["plain", "scaled"])


@MATRIX_FORMS
@SCALES
@pytest.mark.parametrize("layout", ["auto", "dense", "bitmap", "entropy"])
def test_decoded_weight_is_the_reference_bit_for_bit(form, layout, scales):
    shape, groups = ((40, 6, 5), 8) if form == "dense" else ((65, 31), 1) if form == "tiled" else ((64, 32), 8)
    coded = coded_for(form, shape, groups, scales)
    if layout == "dense" and form == "bitmap":
        return
    packed = pack_tensor(coded, layout)
    weight = in_form(packed, form)
    assert torch.equal(decode(weight.args).view(torch.int32), coded.dense().view(torch.int32))
    again = pack_tensor(weight.coded(), layout)
    assert {k: v.tolist() for k, v in again.parts.items()} == {k: v.tolist() for k, v in packed.parts.items()}


@MATRIX_FORMS
@SCALES
def test_linear(form, scales):
    weight, dense = make(form, (24, 300), 24 if form == "dense" else 1, scales)
    x, bias = torch.randn(5, 7, 300), torch.randn(24)
    exact = {} if form in ("tiled", "rows") else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(call("linear", weight.args, x, bias), F.linear(x, dense, bias), **exact)
    torch.testing.assert_close(call("linear", weight.args, x[0, 0], None), F.linear(x[0, 0], dense))


@MATRIX_FORMS
def test_embedding(form):
    weight, dense = make(form, (50, 30))
    indices = torch.randint(0, 50, (4, 9))
    assert torch.equal(call("embedding", weight.args, indices, torch.float32), F.embedding(indices, dense))


@pytest.mark.parametrize(
    ("form", "scales"), [("dense", True), ("bitmap", False), ("tiled", False), ("tiled", True), ("rows", True)]
)
def test_opcheck(form, scales):
    """Schema, fake kernel, autograd registration and AOT dispatch, with static and dynamic shapes."""
    linear, _ = make(form, (8, 80), scales=scales)
    x = torch.randn(3, 80, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    cases = {
        "linear": (linear, (x, bias)),
        "linear_grad": (linear, (torch.randn(3, 8),)),
        "embedding": (linear, (torch.tensor([0, 3, 3]), torch.float32)),
        "weight": (linear, (linear.like,)),
    }
    if form != "rows":
        conv, _ = make(form, (8, 7, 3, 3), scales=scales)
        image = torch.randn(2, 7, 9, 9, requires_grad=True)
        cases["convolution"] = (conv, (image, bias, *GEOMETRY))
        cases["convolution_grad"] = (conv, (torch.randn(2, 8, 9, 9), [2, 7, 9, 9], *GEOMETRY))
    if form == "tiled":
        cases["linear_int8"] = (linear, (torch.randn(3, 80), bias.detach(), 32))
    assert {f"{name}_{form}" for name in cases} == {name for name in OPS if name.endswith(form)}
    for name, (weight, operands) in cases.items():
        torch.library.opcheck(OPS[f"{name}_{form}"], (*operands, *packed_arguments(weight)))


@FORMS
def test_channels_last_images(form):
    weight, _ = make(form, (8, 16, 3, 3))
    image = torch.randn(2, 16, 9, 9).to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(OPS[f"convolution_{form}"], (image, None, *GEOMETRY, *packed_arguments(weight)))


@MATRIX_FORMS
@SCALES
def test_gradients_against_finite_differences(form, scales):
    linear, _ = make(form, (8, 80), scales=scales)
    double = {"dtype": torch.float64, "requires_grad": True}
    x, bias = torch.randn(3, 80, **double), torch.randn(8, **double)
    assert torch.autograd.gradcheck(lambda x, b: call("linear", linear.args, x, b), (x, bias))
    assert torch.autograd.gradcheck(lambda x, b: call("linear", linear.args, x, b), (x[0], bias))


@FORMS
@SCALES
def test_gradients_of_convolutions_against_finite_differences(form, scales):
    conv, _ = make(form, (8, 7, 3, 3), scales=scales)
    double = {"dtype": torch.float64, "requires_grad": True}
    image, bias = torch.randn(1, 7, 5, 4, **double), torch.randn(8, **double)
    for geometry in (GEOMETRY, ([2, 1], [0, 1], [1, 2], False, [0, 0], 1)):
        assert torch.autograd.gradcheck(
            lambda x, b, g=geometry: call("convolution", conv.args, x, b, *g), (image, bias)
        )


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("shape", "channels", "geometry"),
    [
        ((8, 1, 3, 3), 8, ([1, 2], [1, 1], [1, 1], False, [0, 0], 8)),
        ((8, 2, 3, 3), 4, ([1, 1], [1, 0], [1, 2], False, [0, 0], 2)),
        ((6, 4, 3, 3), 6, ([2, 2], [1, 1], [1, 1], True, [1, 0], 1)),
        ((6, 2, 2, 3), 6, ([2, 1], [0, 1], [1, 2], True, [0, 0], 3)),
    ],
    ids=["depthwise", "grouped", "transposed", "transposed, grouped"],
)
def test_convolutions_of_every_design(shape, channels, geometry, order):
    weight, _ = make("tiled", shape, scales=True)
    image = torch.randn(2, channels, 5, 6).contiguous(memory_format=order).requires_grad_()
    arguments = packed_arguments(weight)
    torch.library.opcheck(OPS["convolution_tiled"], (image, None, *geometry, *arguments))
    double = image.detach().double().requires_grad_()
    # Linear in the image: one direction at random tells as much as each number by itself.
    assert torch.autograd.gradcheck(
        lambda x: call("convolution", weight.args, x, None, *geometry), (double,), fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_input_dtypes(dtype):
    weight, dense = make("dense", (24, 300))
    x, bias = torch.randn(5, 300).to(dtype), torch.randn(24)
    actual = call("linear", weight.args, x, bias)
    assert actual.dtype == dtype
    assert torch.equal(actual, F.linear(x, dense.to(dtype), bias.to(dtype)))
    image = torch.randn(2, 7, 6, 6).to(dtype)
    conv, kernel = make("dense", (8, 7, 3, 3))
    expected = F.conv2d(image, kernel.to(dtype), padding=1)
    assert torch.equal(call("convolution", conv.args, image, None, *GEOMETRY), expected)


def count_decodes(monkeypatch):
    import sqs_pyro.kernels.decode as module

    calls = []
    monkeypatch.setattr(module, "decode", lambda packed: calls.append(packed.shape) or decode(packed))
    return calls


def test_a_weight_is_decoded_once(monkeypatch):
    calls = count_decodes(monkeypatch)
    weight, _ = make("dense", (24, 300))
    x = torch.randn(5, 300, requires_grad=True)
    for _ in range(3):
        call("linear", weight.args, x, None).sum().backward()
    with torch.inference_mode():
        call("linear", weight.args, x, None)
    weight.dense()
    assert len(calls) == 1


def test_the_decoded_weight_dies_with_its_module():
    before = len(decoded_weights)
    weight, _ = make("dense", (24, 300))
    call("linear", weight.args, torch.randn(2, 300), None)
    assert len(decoded_weights) == before + 1
    del weight
    assert len(decoded_weights) == before


def test_decoded_tensor_itself_is_freed():
    import weakref

    cache = DecodedWeights()
    weight, _ = make("dense", (24, 300))
    decoded = weakref.ref(cache.get(weight.args, torch.float32))
    assert decoded() is not None
    del weight
    assert decoded() is None


@MATRIX_FORMS
@SCALES
@pytest.mark.parametrize("inference", [False, True])
def test_new_weights_are_seen(form, inference, scales):
    first, _ = make(form, (24, 300), scales=scales)
    second = in_form(pack_tensor(replace(first.coded(), codebook=-first.coded().codebook)), form)
    x = torch.randn(2, 300)
    with torch.inference_mode(inference):
        before = call("linear", first.args, x, None)
        first.load_state_dict(second.state_dict())
        after = call("linear", first.args, x, None)
        torch.testing.assert_close(after, -before)
        assert torch.equal(first.coded().dense(), second.coded().dense())
        first.load_state_dict(second.state_dict(), assign=True)
        torch.testing.assert_close(call("linear", first.args, x, None), -before)


def test_an_edited_table_is_seen():
    weight, dense = make("dense", (24, 300))
    x = torch.randn(2, 300)
    call("linear", weight.args, x, None)
    weight.table.view(torch.float32).mul_(2)
    torch.testing.assert_close(call("linear", weight.args, x, None), F.linear(x, 2 * dense))


def test_a_new_table_object_is_seen():
    weight, dense = make("dense", (24, 300))
    x = torch.randn(2, 300)
    call("linear", weight.args, x, None)
    weight.table = (weight.table.view(torch.float32) * 2).view(torch.uint8)
    torch.testing.assert_close(call("linear", weight.args, x, None), F.linear(x, 2 * dense))


def test_state_dicts_do_not_depend_on_the_form():
    coded = coded_for("dense", (24, 300))
    dense, tiled = (in_form(pack_tensor(coded), form) for form in ("dense", "tiled"))
    assert dense.codes.numel() != tiled.codes.numel()
    expected, found = dense.state_dict(), tiled.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    other = pack_tensor(replace(coded, codebook=-coded.codebook))
    for form in ("dense", "tiled"):
        weight = in_form(other, form)
        weight.load_state_dict(expected)
        assert torch.equal(weight.coded().dense(), coded.dense())


def test_casting_leaves_the_packed_weight_alone():
    weight, dense = make("dense", (24, 300))
    weight.half()
    assert weight.codes.dtype == weight.table.dtype == torch.uint8
    assert weight.dense().dtype == torch.float16
    assert torch.equal(weight.dense(), dense.half())
    assert torch.equal(weight.coded().dense(), dense)


def test_a_kernel_of_its_own_takes_over():
    """The seam for later kernels: one registered for a device is called instead of the reference."""
    weight, dense = make("dense", (4, 30))
    x = torch.randn(2, 30, requires_grad=True)

    def kernel(x, bias, codes, table, scales, shape, bits):
        return x.new_full((*x.shape[:-1], shape[0]), bits)

    with torch.library._scoped_library("sqs", "IMPL") as library:
        library.impl("linear_dense", kernel, "CPU")
        y = call("linear", weight.args, x, None)
        assert y.unique().tolist() == [weight.bits]
        y.sum().backward()
        torch.testing.assert_close(x.grad, dense.sum(0).expand(2, 30))
    assert torch.equal(call("linear", weight.args, x, None), F.linear(x, dense))


def test_a_packed_weight_says_what_it_is():
    weight, _ = make("dense", (4, 30))
    assert "[4, 30], layout=" in repr(weight)
    assert isinstance(weight, nn.Module)
    assert not list(weight.parameters())
