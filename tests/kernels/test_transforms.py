"""Transforms of packed products against the same transforms of the decoded, dense modules."""

from unittest import mock

import pytest
import torch
from test_ops import bitmap_coded
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from sqs_pyro.errors import NetworkError
from sqs_pyro.kernels import packed_network
from sqs_pyro.testing.layouts import random_coded

FORMS = ("dense", "bitmap", "tiled", "rows")
MODULES = {
    "linear": (lambda: nn.Linear(8, 16), (2, 8), FORMS),
    "conv1d": (lambda: nn.Conv1d(2, 8, 3, padding=1), (1, 2, 3), ("bitmap", "tiled")),
    "conv2d": (lambda: nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False), (1, 3, 3), ("tiled",)),
    "grouped": (
        lambda: nn.Conv2d(2, 4, 3, groups=2, padding="same", padding_mode="circular"),
        (2, 3, 3),
        ("dense",),
    ),
    "transposed": (lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, output_padding=1), (2, 1, 2), ("dense",)),
    "conv3d": (lambda: nn.Conv3d(1, 4, 2), (1, 1, 2, 2, 2), ("dense",)),
    "of its own": (lambda: OfItsOwn(), (2, 4), ("dense",)),
}


class OfItsOwn(nn.Module):
    """It reads its weight by itself."""

    def __init__(self):
        super().__init__()
        self.mixing = nn.Parameter(torch.empty(8, 4))

    def forward(self, x):
        return x @ self.mixing.T


def pair(kind, form):
    """A packed module in a run-time form, its dense twin, and an input."""
    build, shape, _ = MODULES[kind]
    dense = build().eval()
    coded = {}
    for name, parameter in dense.named_parameters():
        if parameter.dim() > 1:
            size, groups = tuple(parameter.shape), parameter.shape[0] if form == "rows" else 1
            coded[name] = bitmap_coded(size) if form == "bitmap" else random_coded(size, 5, groups=groups)
    with torch.no_grad():
        for name, value in coded.items():
            dense.get_parameter(name).copy_(value.dense())
    with mock.patch("sqs_pyro.kernels.form.native_kernels", lambda wanted: wanted == form):
        packed = packed_network(dense, coded, leftover_dtype="float32")
    return packed, dense, torch.randn(shape)


def smooth(net):
    """A curved number, so that second derivatives say something."""
    return lambda x: net(x).tanh().square().sum()


def forward_mode(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


def gradient_penalty(f, x):
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def checkpointed(f, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(checkpoint(f, x, use_reentrant=False), x)[0]


def batched_backward(f, x):
    x = x.detach().requires_grad_()
    y = f(x)
    return torch.autograd.grad(
        y, x, torch.randn(3, generator=torch.Generator().manual_seed(0)), is_grads_batched=True
    )


TRANSFORMS = {
    "grad": lambda f, x: grad(f)(x),
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),))[1],
    "vjp": lambda f, x: vjp(f, x)[1](torch.tensor(2.0))[0],
    "hessian": lambda f, x: hessian(f)(x),
    "grad of grad": lambda f, x: grad(lambda x: grad(f)(x).square().sum())(x),
    "vmap of grad": lambda f, x: vmap(grad(f))(torch.stack([x, 2 * x])),
    "forward mode": forward_mode,
    "double backward": gradient_penalty,
    "autograd.functional": lambda f, x: torch.autograd.functional.hessian(f, x),
    "autograd.functional, vectorized": lambda f, x: torch.autograd.functional.hessian(f, x, vectorize=True),
    "autograd.functional.jvp": lambda f, x: torch.autograd.functional.jvp(f, x, x.cos())[1],
    "checkpoint": checkpointed,
    "gradients at once": batched_backward,
}


@pytest.mark.parametrize(("kind", "form"), [(kind, form) for kind in MODULES for form in MODULES[kind][2]])
def test_transforms_of_an_input(kind, form):
    packed, dense, x = pair(kind, form)
    for name, transform in TRANSFORMS.items():
        expected, actual = transform(smooth(dense), x), transform(smooth(packed), x)
        torch.testing.assert_close(
            actual, expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    batch = torch.stack([x, -x, x.cos()])
    torch.testing.assert_close(vmap(packed)(batch), vmap(dense)(batch), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed(x), dense(x), rtol=1e-4, atol=1e-4)  # nothing of a transform was kept


@pytest.mark.parametrize("kind", ["linear", "conv1d", "transposed"])
def test_transforms_of_biases(kind):
    packed, dense, x = pair(kind, "tiled")
    biases = dict(packed.named_parameters())
    assert list(biases) == ["bias"]

    def loss(net):
        return lambda biases: functional_call(net, biases, (x,)).tanh().square().sum()

    for transform in (grad, hessian, lambda f: lambda b: jvp(f, (b,), (b,))[1]):
        actual, expected = transform(loss(packed))(biases), transform(loss(dense))(biases)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    several = {"bias": torch.stack([biases["bias"], -biases["bias"]]).detach()}
    torch.testing.assert_close(vmap(loss(packed))(several), vmap(loss(dense))(several))


@pytest.mark.parametrize("form", FORMS)
def test_embeddings(form):
    dense = nn.Embedding(16, 32)
    coded = bitmap_coded((16, 32)) if form == "bitmap" else random_coded((16, 32), 5)
    dense.weight.data.copy_(coded.dense())
    with mock.patch("sqs_pyro.kernels.form.native_kernels", lambda wanted: wanted == form):
        packed = packed_network(dense, {"weight": coded})
    indices, scale = torch.arange(12).view(3, 4), torch.tensor(1.5)
    assert torch.equal(vmap(packed)(indices), dense(indices))

    def loss(net):
        return lambda scale: (net(indices) * scale).tanh().sum()

    for transform in (grad, hessian, lambda f: lambda s: jvp(f, (s,), (s,))[1]):
        torch.testing.assert_close(transform(loss(packed))(scale), transform(loss(dense))(scale))


def test_the_first_call_of_a_weight_may_be_within_a_transform():
    packed, dense, x = pair("linear", "dense")
    torch.testing.assert_close(vmap(grad(smooth(packed)))(x), vmap(grad(smooth(dense)))(x))
    torch.testing.assert_close(packed(x), dense(x))


def test_autocast_within_a_transform():
    packed, dense, x = pair("linear", "tiled")
    with torch.autocast("cpu", torch.bfloat16):
        assert vmap(packed)(x).dtype == torch.bfloat16
        torch.testing.assert_close(vmap(packed)(x), dense(x), rtol=0.02, atol=0.02)


def test_weights_are_constants():
    packed, _, x = pair("linear", "tiled")
    buffers = {name: torch.stack([buffer] * 2) for name, buffer in packed.named_buffers()}
    with pytest.raises(NetworkError, match=r"runs over the codes of a packed weight, .*dense_state"):
        vmap(lambda buffers: functional_call(packed, buffers, (x,)))(buffers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_transforms_within_a_graph(kind):
    packed, dense, x = pair(kind, "tiled")
    batch = torch.stack([x, -x])
    for transform in (grad, lambda f: vmap(f)):
        inputs = batch if transform is not grad else x
        compiled = torch.compile(transform(smooth(packed)), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(inputs), transform(smooth(dense))(inputs), rtol=1e-4, atol=1e-4)
