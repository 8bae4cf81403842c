"""Which parameters become sites: by type, by pattern, and tied ones."""

import pytest
import torch
from torch import nn

from sqs_pyro.errors import NetworkError
from sqs_pyro.networks.sites import check_finite, select_sites


class Zoo(nn.Module):
    """One of everything."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.conv1 = nn.Conv1d(2, 3, 3)
        self.conv2 = nn.Conv2d(2, 3, 3)
        self.conv3 = nn.Conv3d(2, 3, 3)
        self.up1 = nn.ConvTranspose1d(2, 3, 3)
        self.up2 = nn.ConvTranspose2d(2, 3, 3)
        self.up3 = nn.ConvTranspose3d(2, 3, 3)
        self.block = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.BatchNorm1d(5))
        self.attention = nn.MultiheadAttention(4, 2)
        self.scale = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(5, 2, bias=False)


DEFAULT = [
    "conv1.weight",
    "conv2.weight",
    "conv3.weight",
    "up1.weight",
    "up2.weight",
    "up3.weight",
    "block.0.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "head.weight",
]


def test_default_is_the_weights_of_linear_and_convolutions_in_the_networks_order():
    net = Zoo()
    sites = select_sites(net)
    assert sorted(sites) == sorted(DEFAULT)
    order = [name for name, _ in net.named_parameters() if name in sites]
    assert list(sites) == order
    assert all(sites[name] is net.get_parameter(name) for name in sites)


def test_subclasses_of_linear_count():
    class Special(nn.Linear):
        pass

    assert list(select_sites(nn.Sequential(Special(2, 2)))) == ["0.weight"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, ["conv", "^up"], ["block.0.weight", "attention.in_proj", "attention.out_proj", "head.weight"]),
        (None, [r"^conv\d", r"^up", "attention"], ["block.0.weight", "head.weight"]),
        (["embedding"], [], ["embedding.weight"]),
        ([r"\.0\.", "head"], [], ["block.0.weight", "block.0.bias", "head.weight"]),
        ([r"\.0\.", "head"], ["bias"], ["block.0.weight", "head.weight"]),
        (["^scale$"], (), ["scale"]),
        (["in_proj_weight"], (), ["attention.in_proj_weight"]),
    ],
)
def test_patterns(include, exclude, expected):
    sites = list(select_sites(Zoo(), include, exclude))
    assert len(sites) == len(expected)
    assert all(site.startswith(start) for site, start in zip(sorted(sites), sorted(expected), strict=True))


class Tied(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second, self.other = first, second, nn.Linear(3, 3)
        self.second.weight = self.first.weight


def test_tied_linears_are_one_site_under_the_first_name():
    assert list(select_sites(Tied(nn.Linear(4, 4), nn.Linear(4, 4)))) == ["first.weight", "other.weight"]


def test_excluding_either_name_excludes_a_tied_parameter():
    for name in ("first", "second"):
        assert list(select_sites(Tied(nn.Linear(4, 4), nn.Linear(4, 4)), exclude=[name])) == ["other.weight"]


@pytest.mark.parametrize("order", [1, -1])
def test_a_head_tied_to_its_embedding_is_left_alone_unless_named(order):
    net = Tied(*(nn.Embedding(6, 4), nn.Linear(4, 6))[::order])
    assert list(select_sites(net)) == ["other.weight"]
    assert list(select_sites(net, include=["second.weight"])) == ["first.weight"]


def test_integer_parameters_are_no_sites():
    net = nn.Sequential(nn.Linear(2, 2))
    net.counts = nn.Parameter(torch.zeros(3, dtype=torch.long), requires_grad=False)
    assert list(select_sites(net, include=[""])) == ["0.weight", "0.bias"]


class Spectral(nn.Module):
    """A layer, and parameters that no codebook can take."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.response = nn.Parameter(torch.zeros(5, dtype=torch.cfloat))
        self.gain = nn.Parameter(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("net", "arguments", "sentence"),
    [
        (nn.Sequential(nn.BatchNorm1d(3)), {}, "Sequential has no compressible layer: by default the weights of"),
        (nn.Sequential(nn.Linear(2, 2)), {"exclude": ["0"]}, r"no compressible layer.*exclude=\['0'\]"),
        (
            Zoo(),
            {"include": ["conv9"]},
            "Pattern 'conv9' matches no parameter.*named like scale, embedding.weight",
        ),
        (Zoo(), {"exclude": ["haed"]}, "Pattern 'haed' matches no parameter"),
        (Spectral(), {"include": ["response"]}, "'response' of include .* because 'response' is complex64"),
        (Spectral(), {"include": ["gain", "fc"]}, "'gain' is a single number"),
        (Zoo(), {"include": 3}, r"include or exclude is 3, but must be a text"),
        (Zoo(), {"exclude": ["conv", None]}, r"include or exclude is None, but must be a text"),
        (Zoo(), {"include": ["(conv"]}, r"Pattern '\(conv' is not a regular expression"),
    ],
)
def test_errors(net, arguments, sentence):
    with pytest.raises(NetworkError, match=sentence):
        select_sites(net, **arguments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(bad):
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        net[1].weight[0, :2] = bad
    with pytest.raises(NetworkError, match=r"'1.weight' has 2 values of 8 that are NaN or infinite"):
        select_sites(net)
    assert list(select_sites(net, exclude=[r"^1\."])) == ["0.weight"]


def test_weights_whose_squares_are_beyond_float32():
    net = nn.Linear(3, 4)
    with torch.no_grad():
        net.weight[0, 0] = -1e20
    with pytest.raises(NetworkError, match=r"'weight' has values up to 1e\+20, whose squares float32 cannot"):
        select_sites(net)


def test_empty_weights():
    with pytest.raises(NetworkError, match=r"Weight 'w' is empty \(shape \(0, 3\)\): exclude it"):
        check_finite("w", torch.empty(0, 3))
