"""Too little memory, or no more threads, is one sentence, whichever library says it."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sqs_pyro import compress, load
from sqs_pyro.errors import ResourceError
from sqs_pyro.resources import enough_resources, shortage


class Greedy(nn.Sequential):
    """Takes more memory than there is once it is trained, or from the beginning."""

    def __init__(self, at_once):
        super().__init__(nn.Linear(4, 3))
        self.at_once = at_once

    def forward(self, x):
        if self.at_once or self.training:
            torch.empty(1 << 55)
        return super().forward(x)


def examples():
    return DataLoader(TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64)), batch_size=4)


@pytest.mark.parametrize("at_once", [True, False])
def test_compression_says_so_and_leaves_nothing(at_once, tmp_path):
    recipe = {"epochs": 1, "num_components": 2}
    with pytest.raises(ResourceError, match=r"needs more memory than there is \(.*\): .*") as found:
        compress(Greedy(at_once), examples(), recipe, checkpoint=tmp_path / "kept")
    assert "\n" not in str(found.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "greedy",
    [
        lambda: torch.empty(1 << 55),
        lambda: np.empty(1 << 58, dtype=np.uint8),
        lambda: bytearray(1 << 60),
        lambda: (_ for _ in ()).throw(OSError(12, "Cannot allocate memory")),
        lambda: (_ for _ in ()).throw(RuntimeError("can't start new thread")),
        lambda: (_ for _ in ()).throw(ImportError("libtorch.so: failed to map segment from shared object")),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")),
    ],
)
def test_every_library_is_understood(greedy):
    sentence = r"^Packing needs more (memory|threads) than .* \(.+\): raise it\.$"
    with pytest.raises(ResourceError, match=sentence), enough_resources("Packing", "raise it"):
        greedy()


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), ValueError("memory_format"), KeyError("memory")])
def test_other_errors_pass(error):
    assert shortage(error) is None
    with pytest.raises(type(error)), enough_resources("Packing"):
        raise error


def test_loading_names_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("sqs_pyro.kernels.network.opened_file", lambda path: bytearray(1 << 60))
    with pytest.raises(ResourceError, match=r"^Loading a packed file needs more memory"):
        load(tmp_path / "net")
