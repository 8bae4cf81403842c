"""Every bad input: one clear sentence, an exit code that is not 0, nothing half-written left behind."""

import copy
import gzip
import json
import re
import struct

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import sqs_pyro
from sqs_pyro.cli import app
from sqs_pyro.data import load_data
from sqs_pyro.errors import DataError, DivergenceError, NetworkError, PackedFileError
from sqs_pyro.networks.registry import build_network


def _sqs(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def refused(small_run, small_recipe, tmp_path):
    """Run `sqs compress` with changes to the small recipe; return its sentence after checking all the rest."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(small_recipe.as_yaml())
    before = sorted(tmp_path.rglob("*"))

    def run(*changes, baselines=small_run.parent / "baselines"):
        options = [part for change in changes for part in ("--set", change)]
        result = _sqs("compress", recipe, "--out", tmp_path / "run", "--baselines", baselines, *options)
        return _sentence(result, before, tmp_path)

    return run


def _sentence(result, before, directory):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert result.stderr.splitlines()[-1] == lines[0]
    left = [path for path in sorted(directory.rglob("*")) if path not in before]
    assert [path for path in left if path.name != "baselines"] == []
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("compression.nonzero_rat=0.2", "'compression.nonzero_rat' is unknown: allowed here are"),
        ("compression.nonzero_rat=0.2", "did you mean 'nonzero_rate'?"),
        ("compression.num_components=0", "'compression.num_components' is 0, but should be greater than or equal"),
        (
            "compression.nonzero_rate=1.5",
            "'compression.nonzero_rate' is 1.5, but should be less than or equal to",
        ),
        ("compression.nonzero_rate=.nan", "'compression.nonzero_rate' is nan, but should be a finite number"),
        (
            "compression.temperature=-1",
            "'compression.temperature' is -1, but should be greater than or equal to 0.000001",
        ),
        (
            "compression.kl=exact",
            "'compression.kl' is 'exact', but should be 'jensen', 'dominant' or 'monte_carlo'",
        ),
        ("compression.freeze_start=0.2", "freeze_start (0.2) after coding_start (0.5)"),
        ("data.name=mnist", "'data.name' is 'mnist', but should be one of digits, fashion_mnist"),
        ("network.name=digit_net", "Network 'digit_net' is unknown: allowed networks are digits_net"),
        ("network.options.widht=3", "Network 'digits_net' has no option 'widht'"),
        ("network.options.num_classes=7", "outputs of shape (7,), but the data has 10 classes"),
        ("averaging.samples=0", "'averaging.samples' is 0, but should be greater than or equal to 1"),
    ],
)
def test_recipe(refused, change, sentence):
    assert sentence in refused(change)


def test_no_compressible_layer(refused, tmp_path):
    found = refused("compression.exclude=['.*']", baselines=tmp_path / "baselines")
    assert "no" in found.lower()
    assert "exclude" in found


def test_a_layer_with_fewer_weights_than_components(refused, tmp_path):
    found = refused("compression.num_components=100", baselines=tmp_path / "baselines")
    assert "'features.0.weight' has 72 weights a codebook, fewer than num_components=100" in found


def test_weights_that_are_not_finite(refused, tmp_path, small_recipe):
    weights = build_network("digits_net", width=8).state_dict()
    weights["fc.weight"][0, 0] = float("nan")
    path = tmp_path.parent / f"{tmp_path.name}-nan.pt"
    torch.save(weights, path)
    assert "hold values of 'fc.weight' that are not finite" in refused(f"baseline.checkpoint={path}")


def test_weights_that_are_not_there(refused, tmp_path):
    missing = tmp_path / "nothing.pt"
    assert f"The file of weights '{missing}' does not exist" in refused(f"baseline.checkpoint={missing}")


def test_training_that_diverges(refused, tmp_path):
    assert "learning_rate=1000000000000.0: lower it" in refused(
        "baseline.lr=1e12", baselines=tmp_path / "baselines"
    )
    steep = ("learning_rate=10", "weight_decay=1", "epochs=20")
    assert "The loss is not finite at step" in refused(*(f"compression.{change}" for change in steep))


def test_missing_data(refused, tmp_path):
    missing = tmp_path / "nowhere"
    assert f"'{missing}'" in refused("data.name=fashion_mnist", f"data.root={missing}")
    assert str(missing) in refused("data.name=image_folder", f"data.root={missing}")


def _idx(path, array):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


def _fashion_mnist(directory, labels):
    directory.mkdir()
    for part in ("train", "t10k"):
        _idx(directory / f"{part}-images-idx3-ubyte.gz", np.zeros((len(labels), 28, 28)))
        _idx(directory / f"{part}-labels-idx1-ubyte.gz", labels)
    return directory


def test_data_that_is_half_there(refused, tmp_path_factory):
    root = _fashion_mnist(tmp_path_factory.mktemp("half") / "data", np.arange(20) % 10)
    (root / "t10k-images-idx3-ubyte.gz").unlink()
    assert "t10k-images-idx3-ubyte" in refused("data.name=fashion_mnist", f"data.root={root}")


def test_labels_out_of_range(refused, tmp_path_factory):
    labels = np.arange(20) % 10
    labels[3] = 12
    root = _fashion_mnist(tmp_path_factory.mktemp("labels") / "data", labels)
    found = refused("data.name=fashion_mnist", f"data.root={root}")
    assert "Label 12 of example 3 is out of range: labels must be from 0 to 9" in found


class _Loader(list):
    """Minibatches of ones own, as `compress` takes them."""

    @property
    def dataset(self):
        return [example for x, _ in self for example in x]


def _loader(*, pixel=0.0, label=0):
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    x[0, 0, 0, 0] += pixel
    y[0] += label
    return _Loader([(x, y)] * 4)


RECIPE = {"epochs": 1, "num_components": 4}


@pytest.mark.parametrize(
    ("loader", "error", "sentence"),
    [
        (_loader(pixel=float("nan")), DataError, r"holds 1 values of 512 that are NaN or infinite"),
        (_loader(label=10), DataError, r"labels in minibatch 1 run from 1 to 10, .* 10 classes \(labels 0 to 9\)"),
        (_loader(label=-5), DataError, r"labels in minibatch 1 run from -5 to 7"),
        (_Loader(), DataError, r"There is no minibatch to train on"),
        (
            [(torch.rand(8, 1, 8, 8), torch.arange(8))],
            DataError,
            r"The training data is a list, but must say how much",
        ),
        (iter([]), DataError, r"The training data is a list_iterator, but must say how much there is"),
    ],
)
def test_data_of_ones_own(loader, error, sentence):
    with pytest.raises(error, match=sentence):
        sqs_pyro.compress(build_network("digits_net", width=8), loader, RECIPE)


def test_a_network_of_ones_own_that_is_not_finite():
    net = build_network("digits_net", width=8)
    with torch.no_grad():
        net.fc.weight[0, 0] = float("inf")
    with pytest.raises(NetworkError, match=r"'fc.weight'"):
        sqs_pyro.compress(net, _loader(), RECIPE)


def test_a_loss_that_is_not_finite():
    with pytest.raises(DivergenceError, match=r"The loss is not finite at step .*: lower learning_rate"):
        steep = {**RECIPE, "epochs": 20, "learning_rate": 10.0, "weight_decay": 1.0}
        sqs_pyro.compress(build_network("digits_net", width=8), _loader(), steep)


@pytest.mark.parametrize("command", ["evaluate", "inspect"])
def test_a_packed_file_that_is_not_there(tmp_path, command):
    sentence = _sentence(_sqs(command, tmp_path / "nothing.safetensors"), [], tmp_path)
    assert "nothing.safetensors' is not there" in sentence


def _truncated(content):
    return content[:-10]


def _altered(content):
    return content[:-10] + bytes([content[-10] ^ 1]) + content[-9:]


def _newer(content):
    return re.sub(rb'"format_version":"\d"', b'"format_version":"9"', content)


@pytest.mark.parametrize("command", ["evaluate", "inspect"])
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_truncated, "truncated"),
        (_altered, "damaged: their checksum does not fit"),
        (_newer, "format version 9, this program reads up to 6: update sqs-pyro"),
        (lambda content: content[:5], "has only 5 bytes"),
        (lambda content: b"not a packed file at all", "not a safetensors file"),
    ],
)
def test_a_packed_file_that_is_damaged(small_run, tmp_path, command, damage, sentence):
    file = tmp_path / "packed.safetensors"
    file.write_bytes(damage((small_run / "packed.safetensors").read_bytes()))
    found = _sentence(_sqs(command, file), [file], tmp_path)
    assert f"Packed file '{file}' cannot be used" in found
    assert sentence in found


def test_a_packed_file_made_for_another_network(small_run):
    with pytest.raises(PackedFileError, match=r"another network|fc.weight|features"):
        sqs_pyro.load(small_run / "packed.safetensors", build_network("digits_net", width=4))


def test_a_bad_input_does_not_change_the_network():
    net = build_network("digits_net", width=8)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(DataError):
        sqs_pyro.compress(net, _loader(label=10), RECIPE)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_small_recipe_itself_is_good(small_run, small_recipe):
    assert json.loads((small_run / "metrics.json").read_text())["name"] == small_recipe.name
    assert load_data(small_recipe.data).num_classes == 10
