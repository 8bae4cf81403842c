"""Networks made for their difficulties: what is shared, extreme, laid out strangely, compressed only if asked."""

from collections import namedtuple

import pyro.distributions as dist
import torch
from kits.network_case import CLASSES, Network, tensor
from torch import Tensor, nn
from torch.nn import functional as F

ROW, SIGNAL, PICTURE, VOLUME = tensor(6), tensor(2, 12), tensor(2, 8, 8), tensor(1, 4, 6, 6)
Two = namedtuple("Two", "answer features")


class Module(nn.Module):
    """A module out of a function of its children and inputs."""

    def __init__(self, forward, **children) -> None:
        super().__init__()
        self.call = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *args, **kwargs):
        return self.call(self, *args, **kwargs)


def mlp(*middle: nn.Module, width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), *middle, nn.Linear(width, CLASSES))


def pooled(*layers: nn.Module, channels: int) -> nn.Sequential:
    """Layers over ``[B, channels, ...]``, a mean over positions, and a classifier."""
    return nn.Sequential(*layers, Module(lambda _, x: x.flatten(2).mean(2)), nn.Linear(channels, CLASSES))


def norm_of(kind: type, channels: int) -> nn.Module:
    """A batch norm that has seen data: statistics far from 0 and 1."""
    norm = kind(channels)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.2, 4)
    nn.init.uniform_(norm.weight, 0.5, 2)
    return norm


# Shared.


def shared_module():
    """One layer, called three times, under two names."""
    net = mlp(nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    net.insert(4, net[2])
    return net


def tied_weights():
    net = mlp(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    net[3].weight = net[1].weight
    return net


def tied_norms():
    """Two batch norms with one weight and bias, and statistics of their own."""
    net = mlp(norm_of(nn.BatchNorm1d, 8), nn.ReLU(), nn.Linear(8, 8), norm_of(nn.BatchNorm1d, 8), nn.ReLU())
    net[4].weight, net[4].bias = net[1].weight, net[1].bias
    return net


def norm_tied_to_a_vector():
    """A batch norm whose weight scales something else, too."""

    def forward(self, x):
        return self.last(F.relu(self.norm(self.first(x))) * self.scale)

    norm = norm_of(nn.BatchNorm1d, 8)
    net = Module(forward, first=nn.Linear(6, 8), norm=norm, last=nn.Linear(8, CLASSES))
    net.scale = norm.weight
    return net


def shared_norm():
    """One batch norm after two layers."""
    norm = norm_of(nn.BatchNorm1d, 8)
    return mlp(norm, nn.ReLU(), nn.Linear(8, 8), norm, nn.ReLU())


def tied_embedding():
    """A head that is the embedding's weight, transposed use of one tensor."""
    net = Module(lambda self, ids: self.head(self.words(ids).mean(1)))
    net.words, net.head = nn.Embedding(CLASSES, 8), nn.Linear(8, CLASSES, bias=False)
    net.head.weight = net.words.weight
    return net


# Values.


def extreme_buffers():
    """Buffers that float16 cannot hold, each of which the output depends on."""

    def forward(self, x):
        x = self.first(x) * (self.tiny * 1e9) + self.year - 20007.0
        x = x.masked_fill(~self.keep, 0) + torch.exp(self.mask) + self.huge / 1e20
        return self.last(x / self.count)

    net = Module(forward, first=nn.Linear(6, 8), last=nn.Linear(8, CLASSES))
    net.register_buffer("tiny", torch.linspace(3e-10, 3e-9, 8))
    net.register_buffer("year", torch.tensor([20007.37]))
    net.register_buffer("huge", torch.tensor(1e20))
    net.register_buffer("count", torch.tensor(2**31 + 7) // 2**30)
    net.register_buffer("keep", torch.arange(8) != 3)
    net.register_buffer("mask", torch.zeros(8).index_fill(0, torch.tensor([2]), -torch.inf))
    net.register_buffer("passing", torch.randn(8), persistent=False)
    return net


def small_statistics():
    """A batch norm of a feature in metres that is measured in kilometres: variances of 1e-10."""
    net = mlp(norm_of(nn.BatchNorm1d, 8), nn.ReLU())
    net[1].running_var.mul_(1e-8)
    net[1].running_mean.mul_(1e-4)
    net[1].eps = 1e-12
    with torch.no_grad():
        net[0].weight.mul_(1e-4)
        net[0].bias.mul_(1e-4)
    return net


def zero_layer():
    """A branch that starts as nothing, as zero-initialised residuals do."""

    def forward(self, x):
        x = F.relu(self.first(x))
        return self.last(x + self.branch(x))

    net = Module(forward, first=nn.Linear(6, 8), branch=nn.Linear(8, 8), last=nn.Linear(8, CLASSES))
    nn.init.zeros_(net.branch.weight)
    return net


def constant_layer():
    net = mlp(nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    nn.init.constant_(net[2].weight, 0.25)
    return net


def scalar_parameter():
    net = Module(lambda self, x: self.inner(x) * self.gain.exp(), inner=mlp(nn.ReLU()))
    net.gain = nn.Parameter(torch.tensor(0.3))
    return net


def double():
    return mlp(nn.LayerNorm(8), nn.Tanh()).double()


def half():
    return mlp(nn.LayerNorm(8), nn.Tanh()).bfloat16()


def mixed_dtypes():
    """float64 in the middle of a float32 network."""
    net = mlp(Module(lambda _, x: x.double()), nn.Linear(8, 8), Module(lambda _, x: x.float()))
    net[2].double()
    return net


# Layouts in memory.


def transposed_weights():
    net = mlp(nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    net[2].weight = nn.Parameter(torch.randn(8, 8).t() / 3)
    return net


def channels_last():
    net = pooled(nn.Conv2d(2, 6, 3), norm_of(nn.BatchNorm2d, 6), nn.ReLU(), nn.Conv2d(6, 6, 3), channels=6)
    return net.to(memory_format=torch.channels_last)


# Layers.


def conv1d():
    return pooled(nn.Conv1d(2, 6, 3, padding="same"), norm_of(nn.BatchNorm1d, 6), nn.ReLU(), channels=6)


def conv3d():
    return pooled(nn.Conv3d(1, 4, 2), norm_of(nn.BatchNorm3d, 4), nn.ReLU(), nn.Conv3d(4, 4, 2), channels=4)


def transposed_convolutions():
    layers = [nn.Conv2d(2, 6, 3, 2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, 2, output_padding=1, groups=2)]
    return pooled(*layers, channels=4)


def transposed_conv1d():
    return pooled(nn.ConvTranspose1d(2, 4, 3, dilation=2), nn.ReLU(), channels=4)


def grouped():
    layers = [nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=4, padding_mode="circular"), nn.ReLU()]
    return pooled(*layers, nn.Conv2d(8, 8, 3, groups=8), norm_of(nn.BatchNorm2d, 8), channels=8)


def other_norms():
    layers = [nn.Conv2d(2, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 6, 3)]
    return pooled(*layers, nn.InstanceNorm2d(6, affine=True, track_running_stats=True), channels=6)


def norms_without():
    """Batch norms without weight and bias, and without statistics."""
    return mlp(nn.BatchNorm1d(8, affine=False), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8, affine=True))


def attention():
    """A packed projection of query, key and value, as one parameter of one module."""

    def forward(self, x):
        x = x.transpose(1, 2)
        x = self.norm(self.lift(x))
        return self.head((x + self.attend(x, x, x, need_weights=False)[0]).mean(1))

    parts = {"lift": nn.Linear(2, 8), "norm": nn.LayerNorm(8), "head": nn.Linear(8, CLASSES)}
    return Module(forward, attend=nn.MultiheadAttention(8, 2, batch_first=True), **parts)


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
    lift = Module(lambda self, x: self.lift(x.transpose(1, 2)), lift=nn.Linear(2, 8))
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(lift, body, Module(lambda _, x: x.mean(1)), nn.Linear(8, CLASSES))


def embeddings():
    """Compressed only where a pattern names them; one has a padding row."""

    def forward(self, ids):
        return self.head(self.words(ids).mean(1) + self.bag(ids))

    net = Module(forward, words=nn.Embedding(9, 8, padding_idx=0), bag=nn.EmbeddingBag(9, 8, mode="mean"))
    net.head = nn.Linear(8, CLASSES)
    return net


def bilinear():
    return Module(lambda self, x: self.pair(x[:, :3], x[:, 3:]), pair=nn.Bilinear(3, 3, CLASSES))


def dropout():
    return mlp(nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 8), nn.AlphaDropout(0.2))


# Parameters of one's own, structures, arguments.


def own_parameters():
    """Parameters that a network's own forward uses: one in a product, one added."""

    def forward(self, x):
        return self.last(F.relu(x @ self.mixing + self.offset))

    net = Module(forward, last=nn.Linear(8, CLASSES))
    net.mixing, net.offset = nn.Parameter(torch.randn(6, 8) / 2), nn.Parameter(torch.randn(1, 8))
    return net


def parameter_lists():
    def forward(self, x):
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return x @ self.named["head"]

    net = Module(forward, weights=nn.ParameterList([torch.randn(6, 6), torch.randn(6, 8)]))
    net.named = nn.ParameterDict({"head": nn.Parameter(torch.randn(8, CLASSES))})
    return net


def nested():
    """Lists in dictionaries in lists, and names with a digit first."""

    def forward(self, x):
        for block in self.blocks:
            x = x + block["then"](F.relu(block["first"][0](x)))
        return self.head(x)

    def block():
        return nn.ModuleDict({"first": nn.ModuleList([nn.Linear(6, 8)]), "then": nn.Sequential(nn.Linear(8, 6))})

    return Module(forward, blocks=nn.ModuleList([block(), block()]), head=nn.Linear(6, CLASSES))


def frozen_layers():
    """What its owner does not train: a weight, a bias and a norm."""
    net = mlp(norm_of(nn.BatchNorm1d, 8), nn.ReLU(), nn.Linear(8, 8))
    for parameter in (*net[0].parameters(), *net[1].parameters()):
        parameter.requires_grad_(False)
    return net


def several_inputs():
    def forward(self, x, y):
        return self.last(F.relu(self.first(x) + self.second(y)))

    return Module(forward, first=nn.Linear(6, 8), second=nn.Linear(4, 8), last=nn.Linear(8, CLASSES))


def keyword_inputs():
    def forward(self, *, x, scale=1.0):
        return self.inner(x * scale)

    return Module(forward, inner=mlp(nn.ReLU()))


def several_outputs():
    def forward(self, x):
        features = F.relu(self.first(x))
        return Two(self.answer(features), self.value(features))

    return Module(forward, first=nn.Linear(6, 8), answer=nn.Linear(8, CLASSES), value=nn.Linear(8, 2))


def both_outputs(output: Two) -> dist.TorchDistribution:
    """Of one target ``[B, 2]`` both outputs take their part."""
    return dist.Normal(output.features + output.answer.mean(-1, keepdim=True), 1.0).to_event(1)


def regression():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def ids(count: int) -> Tensor:
    return torch.randint(CLASSES, (count, 5))


def targets(count: int) -> Tensor:
    return torch.randn(count, 2)


BUILT = {
    **{make.__name__: Network(make, ROW) for make in (shared_module, tied_weights, tied_norms)},
    **{make.__name__: Network(make, ROW) for make in (norm_tied_to_a_vector, shared_norm, extreme_buffers)},
    **{make.__name__: Network(make, ROW) for make in (small_statistics, zero_layer, constant_layer)},
    **{make.__name__: Network(make, ROW) for make in (scalar_parameter, mixed_dtypes, transposed_weights)},
    **{make.__name__: Network(make, ROW) for make in (norms_without, dropout, nested, frozen_layers)},
    **{make.__name__: Network(make, PICTURE) for make in (channels_last, transposed_convolutions)},
    **{make.__name__: Network(make, PICTURE) for make in (grouped, other_norms)},
    **{make.__name__: Network(make, SIGNAL) for make in (conv1d, transposed_conv1d, attention, encoder)},
    "conv3d": Network(conv3d, VOLUME),
    "double": Network(double, lambda count: torch.randn(count, 6, dtype=torch.float64)),
    "half": Network(half, lambda count: torch.randn(count, 6, dtype=torch.bfloat16)),
    "tied_embedding": Network(tied_embedding, ids, include=("words",)),
    "embeddings": Network(embeddings, ids, include=("words", "bag", "head.weight")),
    "bilinear": Network(bilinear, ROW, include=("pair.weight",)),
    "own_parameters": Network(own_parameters, ROW, include=("mixing", "last.weight")),
    "parameter_lists": Network(parameter_lists, ROW, include=("weights", "head")),
    "several_inputs": Network(several_inputs, lambda count: (torch.randn(count, 6), torch.randn(count, 4))),
    "keyword_inputs": Network(keyword_inputs, lambda count: {"x": torch.randn(count, 6), "scale": 0.5}),
    "several_outputs": Network(several_outputs, ROW, targets, both_outputs, classifier=False),
    "regression": Network(regression, ROW, targets, "gaussian", classifier=False),
}
