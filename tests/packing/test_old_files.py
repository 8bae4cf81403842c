"""Files that commit 8223038 has written, of every version of the format, go on to load, to the same numbers.

They are kept as they were written, in ``fixtures``: a reader that is tested only with today's files would change
together with their writer. Expected values come from codes and codebooks, one weight after the other, by NumPy.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sqs_pyro import load, save, size_report
from sqs_pyro.packing import layout_names, read_packed
from sqs_pyro.packing.stored import StoredEnsemble, stored_weights

FIXTURES = Path(__file__).parent / "fixtures"
FILES = sorted(path.stem for path in FIXTURES.glob("*.safetensors"))
DIGEST = "8abf9733717c6581a73604da9206f467fa492ea686f721e49fae0ed4d83bf667"
LAYOUTS = {"dense", "bitmap", "entropy", "conditional"}
WEIGHTS = {"0.weight", "3.weight", "4.weight"}


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 48), nn.Linear(48, 6)
    ).eval()


def expected(name):
    with np.load(FIXTURES / "expected.npz") as arrays:
        return {key.removeprefix(f"{name}/"): arrays[key] for key in arrays if key.startswith(f"{name}/")}


def test_nobody_has_written_them_anew():
    digest = hashlib.sha256()
    for path in sorted(FIXTURES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    assert digest.hexdigest() == DIGEST


def test_every_version_and_layout_is_there():
    assert {name.split("_")[0] for name in FILES} == {"version1", "version2", "version3"}
    for version in (1, 3):
        assert {f"version{version}_{layout}" for layout in LAYOUTS} <= set(FILES)
    layouts = {packed.layout for name in FILES for packed in read_packed(path_of(name)).tensors.values()}
    assert layouts == LAYOUTS
    assert set(layout_names()) == LAYOUTS | {"structured", "adaptive"}  # came with versions 4 and 5


@pytest.mark.parametrize("name", FILES)
def test_the_file_says_what_it_said(name):
    contents, values = read_packed(path_of(name)), expected(name)
    assert contents.format_version == int(name[len("version")])
    assert contents.draws == (3 if "draws" in name else None)
    assert contents.metadata["recipe"] == {"written_by": "commit 8223038"}
    assert contents.metadata["metrics"] == {"accuracy": 0.5}
    assert set(contents.tensors) == WEIGHTS
    for key, packed in contents.tensors.items():
        assert_same(packed.unpack().dense(), values[key])
    for key, value in contents.leftovers.items():
        assert_same(value.to(torch.from_numpy(values[key]).dtype), values[key])


@pytest.mark.parametrize("name", FILES)
def test_the_network_has_these_weights(name):
    packed, values = load(path_of(name), network()), expected(name)
    root = packed.network if isinstance(packed, StoredEnsemble) else packed
    for key, weight in stored_weights(root).items():
        assert_same(weight.coded().dense(), values.pop(key))
    for key, value in values.items():
        assert_same(root.state_dict()[key], value)
    assert packed(torch.randn(2, 3, 4, 4)).shape == (2, 6)


@pytest.mark.parametrize("name", FILES)
def test_saved_again_it_has_the_same_bytes(name, tmp_path):
    loaded = load(path_of(name), network())
    save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path_of(name).read_bytes()
    assert size_report(loaded) == size_report(path_of(name))


def path_of(name: str) -> Path:
    return FIXTURES / f"{name}.safetensors"


def assert_same(found: torch.Tensor, values: np.ndarray) -> None:
    """Bit for bit: -0.0 is not 0.0."""
    assert found.shape == values.shape and found.numpy().dtype == values.dtype
    assert np.ascontiguousarray(found.numpy()).tobytes() == np.ascontiguousarray(values).tobytes()
