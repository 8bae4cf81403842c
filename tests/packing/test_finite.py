"""Numbers that are none: refused where a network is compressed, saved and loaded, whatever tensor holds them."""

import pytest
import torch
from torch import nn

from sqs_pyro import compress, load
from sqs_pyro.errors import NetworkError, PackedFileError
from sqs_pyro.kernels import packed_network
from sqs_pyro.kernels.network import save
from sqs_pyro.packing.file import read_packed, write_packed
from sqs_pyro.testing.layouts import random_coded


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))

    def forward(self, x):
        return self.fc(self.norm(x))


WRONG = [("norm.weight", "nan"), ("fc.bias", "nan"), ("fc.bias", "inf"), ("norm.running_mean", "nan")]


def packed():
    return packed_network(Net(), {"fc.weight": random_coded((3, 6), 4)})


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_network_with_it_is_not_saved(name, value, tmp_path):
    net = packed()
    with torch.no_grad():
        net.state_dict(keep_vars=True)[name][1] = float(value)
    with pytest.raises(NetworkError, match=rf"'{name}' has 1 values of \d that are NaN"):
        save(net, tmp_path / "net")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_file_with_it_is_not_loaded(name, value, tmp_path):
    save(packed(), tmp_path / "net")
    contents = read_packed(tmp_path / "net")
    contents.leftovers[name] = contents.leftovers[name].clone().fill_(float(value))
    write_packed(tmp_path / "net", contents)
    with pytest.raises(PackedFileError, match=rf"'{name}' has \d values of \d that are NaN"):
        load(tmp_path / "net", Net())


def test_a_mask_of_infinities_is_a_buffer_like_others(tmp_path):
    save(packed(), tmp_path / "net")
    assert load(tmp_path / "net", Net()).mask.tolist() == [0.0, float("-inf")]


@pytest.mark.parametrize("name", ["norm.bias", "norm.running_var"])
def test_a_network_with_it_is_not_compressed(name):
    net = Net()
    with torch.no_grad():
        net.state_dict(keep_vars=True)[name][1] = float("nan")
    data = torch.utils.data.TensorDataset(torch.randn(8, 6), torch.arange(8) % 3)
    with pytest.raises(NetworkError, match=rf"'{name}' has 1 values of 6 that are NaN"):
        compress(net, torch.utils.data.DataLoader(data, 4), {"epochs": 1, "num_components": 2})
