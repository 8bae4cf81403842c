"""What is found without a table is what the tables say."""

import pytest
import torch
from kits import architectures as kit
from torch import nn

from sqs_pyro.errors import NetworkError
from sqs_pyro.networks.architectures import architecture_of, layer_groups, stack_paths
from sqs_pyro.networks.linear_form import in_linear_form
from sqs_pyro.networks.structure import found_by_structure

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "case", ["bert", "olmo2", "phi3", "gpt2", "falcon", "bloom", "opt", "t5", "whisper", "vit"]
)
def test_tables_are_found(case):
    net = kit.make(case)
    found, table = found_by_structure(net, kit.inputs(net, count=2)), architecture_of(net)
    (paths,) = stack_paths(net, found.architecture)
    weights = 0
    with in_linear_form(net):
        for block in map(net.get_submodule, paths):
            expected = layer_groups(block, table)
            assert list(map(set, layer_groups(block, found.architecture))) == list(map(set, expected))
            weights += sum(layer.weight.numel() for group in expected for layer in group.values())
    assert found.weights == weights and found.blocks == len(paths)
    assert found.architecture.blocks in table.stacks and found.architecture.bare == table.bare


class Block(nn.Module):
    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.joined = joined
        self.a, self.b, self.c, self.spare = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x):
        y = self.a(x)
        z = self.b(x if self.joined else y)
        return x + self.c(torch.relu(y + z))


class Own(nn.Module):
    def __init__(self, *joined: bool) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.stages = nn.ModuleList(map(Block, joined))

    def forward(self, x):
        x = self.first(x)
        for stage in self.stages:
            x = stage(x)
        return x


def test_it_says_what_would_be_compressed():
    found = found_by_structure(Own(True, True), torch.randn(2, 3))
    assert found.architecture.groups == [{"a": "a", "b": "b"}, {"c": "c"}]
    assert found.architecture.name == "Own" and found.architecture.bare
    assert str(found) == (
        "in 2 blocks at 'stages' the linear layers a, b | c, but not spare, which were not called, "
        "50.0% of 108 parameters"
    )


def test_an_input_that_is_written_to_is_another():
    class Written(Block):
        def forward(self, x):
            y = self.a(x)
            x = x.add_(1)
            return self.c(y + self.b(x))

    net = Own(True)
    net.stages[0] = Written(True)
    groups = found_by_structure(net, torch.randn(2, 3)).architecture.groups
    assert [list(group) for group in groups] == [["a"], ["b"], ["c"]]


def test_no_structure():
    with pytest.raises(NetworkError, match="Blocks of Own call a with one input, but not all of them"):
        found_by_structure(Own(True, False), torch.randn(2, 3))
    with pytest.raises(NetworkError, match="Linear has no model_type: known are bert"):
        found_by_structure(nn.Linear(2, 2), torch.randn(2, 2))
