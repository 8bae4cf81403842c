"""State dicts from files: whichever way they were saved, and every way in which they do not fit."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sqs_pyro.errors import NetworkError
from sqs_pyro.networks.state import load_weights


def network(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w"])
@pytest.mark.parametrize("write", [torch.save, save_file])
def test_a_suffix_does_not_say_what_a_file_is(tmp_path, write, name):
    saved, net = network().state_dict(), network()
    write(saved, tmp_path / name)
    load_weights(net, tmp_path / name)
    assert all(torch.equal(value, saved[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("content", [network(), {"0.weight": torch.ones(2).numpy()}])
def test_what_holds_more_than_tensors_is_not_advised_to_be_run(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", r"cannot be read \([^()\n]+\): fetch them again, or save `net.state_dict\(\)`")


@pytest.mark.parametrize("key", ["", "state_dict", "model", "network", "safetensors"])
def test_every_form_that_people_save(tmp_path, key):
    saved = network().state_dict()
    path = tmp_path / ("w.safetensors" if key == "safetensors" else "w.pt")
    if key == "safetensors":
        save_file(saved, path)
    else:
        torch.save({key: saved, "epoch": 3} if key else saved, path)
    net = network()
    load_weights(net, path)
    assert all(torch.equal(value, saved[name]) for name, value in net.state_dict().items())


def refused(path, match):
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(NetworkError, match=match):
        load_weights(net, path)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_another_network(tmp_path):
    path = tmp_path / "w.pt"
    torch.save(network(5).state_dict(), path)
    refused(path, r"w.pt' are another network's: '0.weight' is \[5, 3\] there and \[4, 3\] here; give the weights")
    torch.save({"extra": torch.ones(2), **network().state_dict()}, path)
    refused(path, r"'extra' is \[2\] there and absent here")
    torch.save(nn.Sequential(nn.Linear(3, 4)).state_dict(), path)
    refused(path, r"'1.weight' is absent there and \[4\] here")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04 cut"])
def test_damaged(tmp_path, suffix, content):
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    refused(path, r"cannot be read \(.+\): fetch them again")


def test_missing_or_no_state_dict(tmp_path):
    refused(tmp_path / "missing.pt", r"missing.pt' does not exist: correct the path")
    torch.save([1, 2], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "holds no state dict")


def test_values_that_are_not_finite(tmp_path):
    state = network().state_dict()
    state["1.bias"][2] = float("inf")
    torch.save(state, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "hold values of '1.bias' that are not finite")


def test_buffers_may_hold_infinity_but_no_nan(tmp_path):
    state = network().state_dict()
    state["1.running_var"][2] = float("inf")
    torch.save(state, tmp_path / "w.pt")
    net = network()
    load_weights(net, tmp_path / "w.pt")
    assert net[1].running_var[2] == float("inf")
    state["1.running_mean"][0] = float("nan")
    torch.save(state, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "hold values of '1.running_mean' that are not finite")


def test_code_in_a_file_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"0.weight": Payload()}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "cannot be read")
    assert not (tmp_path / "ran").exists()
