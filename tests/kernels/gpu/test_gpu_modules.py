"""Packed modules on the GPU kernels, as users and torch's own tools see them: a GPU, or Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from kits.gpu import DEVICE, INTERPRETED, needs_gpu, needs_kernels, rounded, tolerance
from torch import nn

from sqs_pyro.kernels import packed_network
from sqs_pyro.kernels.decode import decoded_weights
from sqs_pyro.kernels.gpu import register
from sqs_pyro.kernels.ops import OPS
from sqs_pyro.packing import CodedTensor
from sqs_pyro.testing.layouts import random_coded

pytestmark = needs_kernels


@pytest.fixture(autouse=True, scope="module")
def on_this_device():
    """Under the interpreter the ops' kernels for GPUs stand in for those for CPUs."""
    if INTERPRETED:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sqs_pyro.kernels.form.native_kernels", lambda form: False)
            register.register("cpu")
            yield
    else:
        yield


def coded_for(form, shape, groups=1, scales=False):
    if form == "dense":
        return random_coded(shape, 11, groups=groups, scales=scales)
    symbols = torch.arange(shape[0] * shape[1]).view(shape) * 37
    mask = symbols % 9 > 0
    codes = (symbols % 256).to(torch.uint8) * mask  # 256 codes and zero: 8 bits cannot hold them
    return CodedTensor(codes, mask, (torch.arange(256)[None] - 127.5) / 512)


def make(form, shape=(24, 192), dtype=torch.float32, **options):
    coded = coded_for(form, shape, **options)
    net = nn.Sequential(nn.Embedding(*shape), nn.Linear(shape[1], shape[0]))
    net[1].weight = net[0].weight  # tied: one packed weight
    packed = packed_network(net, {"0.weight": coded}).to(DEVICE, dtype)
    assert packed[0].packed_weight.form == form
    return packed, coded.dense(), packed[1].bias.detach().float().cpu()  # files hold it in half precision


FORMS = pytest.mark.parametrize("form", ["dense", "bitmap"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@FORMS
@DTYPES
@pytest.mark.parametrize("rows", [(), (3,), (2, 8), (70,)], ids=str)
def test_linear_and_embedding(form, dtype, rows):
    packed, weight, bias = make(form, dtype=dtype)
    kept = len(decoded_weights)
    x = torch.randn(*rows, 192).to(dtype)
    found = packed[1](x.to(DEVICE)).detach().cpu()
    expected = F.linear(x.double(), weight.double(), bias.to(dtype).double())
    size = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    assert found.dtype == dtype and ((found.double() - expected).abs() <= 2 * tolerance(dtype) * size).all()
    indices = torch.randint(0, 24, (2, 3))
    assert torch.equal(packed[0](indices.to(DEVICE)).cpu(), rounded(weight, dtype)[indices])
    assert len(decoded_weights) <= kept + (form == "bitmap")  # ranks are kept, weights are not


def test_codebooks_of_outputs_and_scales():
    packed, weight, bias = make("dense", groups=24, scales=True)
    x = torch.randn(3, 192)
    torch.testing.assert_close(packed[1](x.to(DEVICE)).cpu(), F.linear(x, weight, bias))


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("groups", [1, 24, 72])
def test_scales_of_parts_of_outputs(rows, groups):
    packed, weight, bias = make("dense", groups=groups, scales=4)
    kept, x = len(decoded_weights), torch.randn(rows, 192)
    torch.testing.assert_close(packed[1](x.to(DEVICE)).detach().cpu(), F.linear(x, weight, bias))
    indices = torch.randint(0, 24, (2, 3))
    assert torch.equal(packed[0](indices.to(DEVICE)).cpu(), weight[indices])
    assert len(decoded_weights) == kept


@FORMS
def test_float64_and_gradients_are_the_references(form):
    packed, weight, bias = make(form)
    x = torch.randn(3, 192, dtype=torch.float64)
    expected = F.linear(x, weight.double(), bias.double())
    torch.testing.assert_close(packed[1](x.to(DEVICE)).cpu(), expected)
    x = torch.randn(3, 192, device=DEVICE, requires_grad=True)
    packed[1](x).sum().backward()
    torch.testing.assert_close(x.grad.cpu(), weight.sum(0).expand(3, 192))
    torch.testing.assert_close(packed[1].bias.grad.cpu(), torch.full((24,), 3.0))


@FORMS
def test_opcheck(form):
    packed, _, _ = make(form)
    args = packed[1].packed_weight.args
    mask = [] if args.mask is None else [args.mask]
    weight = (args.codes, args.table, *mask, args.scales, list(args.shape), args.bits)
    x = torch.randn(3, 192, device=DEVICE, requires_grad=True)
    indices = torch.tensor([0, 3, 3], device=DEVICE)
    torch.library.opcheck(OPS[f"linear_{form}"], (x, None, *weight))
    torch.library.opcheck(OPS[f"embedding_{form}"], (indices, torch.float32, *weight))
    torch.library.opcheck(OPS[f"weight_{form}"], (x.detach(), *weight))


@FORMS
def test_compiled_as_one_graph(form):
    packed, _, _ = make(form)
    compiled = torch.compile(
        packed, fullgraph=True, dynamic=True, backend="inductor" if DEVICE == "cuda" else "eager"
    )
    for count in (1, 3):
        indices = torch.randint(0, 24, (count,), device=DEVICE)
        with torch.no_grad():
            assert torch.equal(compiled(indices), packed(indices))


@FORMS
def test_new_weights_in_place(form):
    packed, _, _ = make(form)
    x = torch.randn(2, 192, device=DEVICE)
    with torch.inference_mode():
        before = packed[1](x)
        state = {name: value.clone() for name, value in packed.state_dict().items()}
        flipped = "1.packed_weight.mask" if form == "bitmap" else "1.packed_weight.codes"
        tied = flipped.replace("1.", "0.")
        state[flipped] = state[tied] = torch.cat([state[flipped][1:], state[flipped][:1]])
        if form == "bitmap":
            return_to = packed.state_dict()[flipped].clone()
            packed.load_state_dict(state)
            weight = packed[1].weight
            torch.testing.assert_close(packed[1](x), F.linear(x, weight, packed[1].bias))
            state[flipped] = state[tied] = return_to
        packed.load_state_dict(state)
        torch.testing.assert_close(packed[1](x), F.linear(x, packed[1].weight, packed[1].bias))
        assert form == "bitmap" or not torch.equal(packed[1](x), before)


@needs_gpu
@FORMS
@pytest.mark.parametrize("rows", [1, 4, 16, 100])
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_a_cuda_graph(form, rows, warm):
    packed, _, _ = make(form, dtype=torch.bfloat16)
    x = torch.randn(rows, 192, device=DEVICE, dtype=torch.bfloat16)
    with torch.inference_mode():
        if not warm:  # kernels are compiled, but this network has not run
            make(form, dtype=torch.bfloat16)[0][1](x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if warm:
                packed[1](x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = packed[1](x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(found, packed[1](x))


@needs_gpu
@FORMS
def test_compiled_with_cuda_graphs(form):
    packed, _, _ = make(form, dtype=torch.bfloat16)
    compiled = torch.compile(packed, fullgraph=True, mode="reduce-overhead")
    indices = torch.randint(0, 24, (4,), device=DEVICE)
    with torch.no_grad():
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(compiled(indices), packed(indices))
