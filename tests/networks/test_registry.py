import pytest
import torch
from torch import nn

from sqs_pyro.errors import RecipeError
from sqs_pyro.networks.registry import build_network, network_names, register_network


@register_network("test_line")
def line(size: int, bias: bool = True) -> nn.Module:
    return nn.Linear(size, size, bias=bias)


def test_builds_and_remembers_how():
    net = build_network("test_line", size=3, bias=False)
    assert isinstance(net, nn.Linear)
    assert net.bias is None
    assert net.network_spec == {"name": "test_line", "options": {"size": 3, "bias": False}}
    assert "test_line" in network_names()
    assert network_names() == sorted(network_names())


def test_the_constructor_stays_as_it_is():
    assert torch.is_tensor(line(2).weight)
    assert not hasattr(line(2), "network_spec")


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("test_lime", {}, r"Network 'test_lime' is unknown: allowed networks are .*did you mean 'test_line'\?"),
        (
            "test_line",
            {"size": 3, "bais": 1},
            r"no option 'bais': allowed options are bias, size; did you mean 'bias'",
        ),
        ("test_line", {}, r"needs the option 'size'"),
        ("test_line", {"size": torch.tensor(3)}, r"Option 'size' .* cannot be written to a file"),
        ("test_line", {"size": float("nan")}, r"Option 'size' .* cannot be written to a file"),
    ],
)
def test_what_is_refused(name, options, sentence):
    with pytest.raises(RecipeError, match=sentence):
        build_network(name, **options)


def test_a_name_belongs_to_one_constructor():
    with pytest.raises(ValueError, match=r"'test_line' belongs to .*line already"):

        @register_network("test_line")
        def other() -> nn.Module:
            return nn.Identity()
