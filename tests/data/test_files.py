"""Arrays and columns of files: read as they stand, standardised by training examples, refused in a sentence."""

import csv
import json

import numpy as np
import pytest
import torch

from sqs_pyro.data import DataRecipe, load_data
from sqs_pyro.errors import DataError, RecipeError
from sqs_pyro.recipes import parse

N = 60


def rng():
    return np.random.default_rng(0)


def recipe(name, **keys):
    return parse(DataRecipe, {"name": str(name), "batch_size": 8, **keys}, "data")


def everything(loader):
    x, y = zip(*loader, strict=True)
    return torch.cat(x), torch.cat(y)


def table(path, header, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


@pytest.fixture
def numbers(tmp_path):
    """Three columns and what is to be learned of them."""
    x = rng().normal(5, [1, 10, 100], (N, 3))
    return table(tmp_path / "t.csv", ["a", "b", "c", "y"], np.column_stack([x, x @ [1, 2, 3]]).tolist()), x


def test_columns_are_standardised_by_the_training_examples(numbers):
    path, x = numbers
    data = load_data(recipe(path, task="regression"))
    assert (data.num_classes, data.input_shape, data.task) == (1, (3,), "regression")
    sizes = [len(loader.dataset) for loader in (data.train, data.validation, data.test)]
    assert sizes == [44, 4, 12]  # a fifth for the test, a tenth of the others for choices
    mean, std = np.array(data.about["input_mean"]), np.array(data.about["input_std"])
    raw = data.train.dataset.tensors[0].double().numpy()
    assert np.allclose(mean, raw.mean(0)) and np.allclose(std, raw.std(0), rtol=1e-5)
    # All examples are there once, and each goes with its own target.
    found = [everything(loader) for loader in (data.validation, data.test)]
    found.append((data.train.dataset.tensors[0] * 1.0, data.train.dataset.tensors[1]))
    for number, (inputs, targets) in enumerate(found):
        values = inputs.double().numpy()
        values = values if number == 2 else values * std + mean
        expected = (values @ [1, 2, 3] - data.about["target_mean"][0]) / data.about["target_std"][0]
        assert np.allclose(targets[:, 0].numpy(), expected, atol=1e-4)
    firsts = [
        *(found[0][0].numpy() * std + mean)[:, 0],
        *(found[1][0].numpy() * std + mean)[:, 0],
        *found[2][0][:, 0],
    ]
    assert sorted(map(float, firsts)) == pytest.approx(sorted(x[:, 0]), rel=1e-4)
    assert data.about["inputs"] == ["a", "b", "c"] and data.about["targets"] == ["y"]


def test_the_split_is_the_same_in_every_run(numbers):
    first, second = (load_data(recipe(numbers[0], task="regression"), seed) for seed in (0, 1))
    assert torch.equal(everything(first.test)[0], everything(second.test)[0])
    assert not torch.equal(next(iter(first.train))[0], next(iter(second.train))[0])


def test_nothing_is_standardised_where_it_shall_not_be(numbers):
    data = load_data(recipe(numbers[0], task="regression", standardise=False))
    x, y = everything(data.test)
    assert torch.allclose(x.double() @ torch.tensor([1.0, 2, 3], dtype=torch.float64), y[:, 0].double(), rtol=1e-4)
    assert data.about["input_mean"] == [0, 0, 0] and data.about["target_std"] == [1]


def test_a_constant_column_is_not_divided_by_zero(tmp_path):
    rows = np.column_stack([np.full(N, 1e6), rng().normal(size=N), np.arange(N)])
    data = load_data(recipe(table(tmp_path / "t.csv", ["a", "b", "y"], rows.tolist()), task="regression"))
    assert everything(data.test)[0][:, 0].abs().max() == 0


def test_columns_are_chosen_by_name(numbers):
    data = load_data(recipe(numbers[0], task="regression", inputs=["c", "a"], targets=["b", "y"]))
    assert (data.num_classes, data.input_shape) == (2, (2,))
    assert data.about["inputs"] == ["c", "a"]


def test_names_of_classes_are_numbered_and_kept(tmp_path):
    kinds = [["cat", "ant", "bee"][i % 3] for i in range(N)]
    path = table(tmp_path / "t.csv", ["a", "kind"], [[i, kind] for i, kind in enumerate(kinds)])
    data = load_data(recipe(path, standardise=False))
    assert (data.num_classes, data.about["classes"]) == (3, ["ant", "bee", "cat"])
    x, y = everything(data.test)
    assert [data.about["classes"][label] for label in y] == [kinds[int(i)] for i in x[:, 0]]
    assert torch.bincount(y).tolist() == [4, 4, 4]  # some of each


def test_test_examples_of_their_own(tmp_path, numbers):
    other = table(tmp_path / "other.csv", ["a", "b", "c", "y"], [[1, 2, 3, 4], [5, 6, 7, 8]])
    data = load_data(recipe("t.csv", root=tmp_path, test="other.csv", task="regression", standardise=False))
    assert len(data.train.dataset) + len(data.validation.dataset) == N
    assert everything(data.test)[0].tolist() == [[1, 2, 3], [5, 6, 7]] and other.is_file()


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_kinds_of_tables_say_the_same(tmp_path, kind, numbers):
    path, _ = numbers
    with path.open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    other = tmp_path / f"t.{kind}"
    if kind == "jsonl":
        other.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "json":
        other.write_text(json.dumps(rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), other)
    first, second = (load_data(recipe(each, task="regression")) for each in (path, other))
    assert torch.equal(everything(first.test)[0], everything(second.test)[0])
    assert first.about == second.about


@pytest.mark.parametrize("names", [("x_train", "y_train", "x_test", "y_test"), ("x", "y", "x_test", "y_test")])
def test_arrays_with_test_examples(tmp_path, names):
    x, y = rng().normal(size=(N, 2, 5)).astype("float32"), np.arange(N) % 4
    np.savez(tmp_path / "a.npz", **dict(zip(names, (x[10:], y[10:], x[:10], y[:10]), strict=True)))
    data = load_data(recipe(tmp_path / "a.npz"))
    assert (data.num_classes, data.input_shape, len(data.test.dataset)) == (4, (2, 5), 10)
    found, labels = everything(data.test)
    mean, std = (torch.tensor(data.about[f"input_{key}"])[:, None] for key in ("mean", "std"))
    assert torch.allclose(found * std + mean, torch.from_numpy(x[:10]), atol=1e-5)
    assert labels.tolist() == y[:10].tolist()


@pytest.mark.parametrize("shape", [(N, 6, 7), (N, 6, 7, 3), (N, 3, 6, 7), (N, 1, 6, 7)])
def test_bytes_are_images_with_channels_first(tmp_path, shape):
    images = rng().integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(N) % 2)
    data = load_data(recipe(tmp_path / "a.npz"))
    channels = 3 if 3 in shape else 1
    assert data.input_shape == (channels, 6, 7)
    assert data.train.dataset.tensors[0].dtype == torch.uint8  # a quarter of the memory
    whole = images.transpose(0, 3, 1, 2) if shape[-1] == 3 else images.reshape(N, channels, 6, 7)
    train = data.train.dataset.tensors[0].numpy() / 255
    assert np.allclose(data.about["input_mean"], train.mean((0, 2, 3)), atol=1e-6)
    assert np.allclose(data.about["input_std"], train.std((0, 2, 3)), atol=1e-6)
    x, _ = everything(data.test)
    mean, std = (torch.tensor(data.about[f"input_{key}"])[:, None, None] for key in ("mean", "std"))
    back = ((x * std + mean) * 255).round().to(torch.uint8).numpy()
    assert {image.tobytes() for image in back} <= {np.ascontiguousarray(image).tobytes() for image in whole}


def test_whole_numbers_are_tokens(tmp_path):
    np.savez(tmp_path / "a.npz", x=rng().integers(0, 50, (N, 9)), y=np.arange(N) % 2)
    data = load_data(recipe(tmp_path / "a.npz"))
    x, _ = next(iter(data.train))
    assert x.dtype == torch.int64 and "input_mean" not in data.about


def test_labels_of_pixels(tmp_path):
    labels = rng().integers(0, 3, (N, 4, 4))
    labels[:, 0, 0] = 255
    np.savez(tmp_path / "a.npz", x=np.zeros((N, 1, 4, 4), "float32"), y=labels)
    data = load_data(recipe(tmp_path / "a.npz", task="segmentation", ignore_index=255))
    assert data.num_classes == 3 and next(iter(data.train))[1].shape == (8, 4, 4)


def test_several_labels_at_once(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((N, 3), "float32"), y=rng().integers(0, 2, (N, 4)))
    data = load_data(recipe(tmp_path / "a.npz", task="multilabel"))
    assert data.num_classes == 4 and next(iter(data.train))[1].dtype == torch.float32


TRAIN = {"x_train": np.zeros((N, 2)), "y_train": np.arange(N) % 2}
ARRAYS = {
    "strings": {"x": np.array([["a"] * 2] * N), "y": np.zeros(N)},
    "nan": {"x": np.where(np.arange(2 * N).reshape(N, 2) == 5, np.nan, 1.0), "y": np.arange(N) % 2},
    "short": {"x": np.zeros((N, 2)), "y": np.zeros(N - 1)},
    "strange": {"foo": np.zeros((N, 2)), "bar": np.zeros(N)},
    "scalar": {"x": np.zeros((N, 2)), "y": np.float64(1)},
    "few": {"x": np.zeros((2, 2)), "y": np.zeros(2)},
    "numbers": {"x": np.zeros((N, 2)), "y": rng().normal(size=N)},
    "negative": {"x": np.zeros((N, 2)), "y": np.arange(N) - 1},
    "later": {**TRAIN, "x_test": np.zeros((2, 2)), "y_test": [0, 5]},
    "other shape": {**TRAIN, "x_test": np.zeros((2, 3)), "y_test": [0, 1]},
    "pixels": {"x": np.zeros((N, 2, 2)), "y": np.full((N, 2, 2), 255) - 256},
    "whole numbers": {"x": np.zeros((N, 2)), "y": np.arange(N) // 2},
    "huge": {"x": np.full((N, 2), 1e300), "y": np.arange(N) % 2},
    "good": {"x": np.zeros((N, 2)), "y": np.arange(N) % 2},
}


@pytest.mark.parametrize(
    ("case", "keys", "sentence"),
    [
        ("strings", {}, "Inputs of .* are <U1, but should be numbers"),
        ("nan", {}, "1 of 60 examples have values that are NaN or infinite, the first is example 2"),
        ("short", {}, "has 60 examples in 'x', but 59 in 'y'"),
        ("strange", {}, "has the arrays foo, bar, of which it does not tell inputs and targets"),
        ("good", {"inputs": ["z"], "targets": ["y"]}, "has no 'z', which `inputs` asks for: it has x, y"),
        ("good", {"inputs": ["x", "y"]}, "is one array: name it"),
        ("scalar", {}, "is a single value"),
        ("few", {"task": "regression"}, "2 examples, too few"),
        ("numbers", {}, "60 different values in 60 examples.*give `task: regression`"),
        ("whole numbers", {}, "30 different values in 60 examples, the first 0, which are no classes"),
        ("huge", {}, "60 of 60 examples have values that are NaN or infinite"),
        ("negative", {}, "begin at -1, but are numbered from 0"),
        ("later", {}, "have the class 5, but those of training end at 1"),
        ("other shape", {}, r"for test have the shape \[3\], but those for training \[2\]"),
        ("pixels", {"task": "segmentation"}, "hold -1, which is no class: .*`ignore_index: -1`"),
        ("pixels", {}, r"Targets of .* have the shape \[60, 2, 2\], but a class is one number"),
        ("good", {"task": "segmentation"}, "a class for each pixel or token"),
        ("numbers", {"task": "multilabel"}, "several labels at once are zeros and ones"),
        ("good", {"batch_size": 50}, "leaves 44 examples to train on, fewer than a minibatch of 50"),
        ("good", {"test": "b.npz"}, "is not there: correct the path"),
    ],
)
def test_arrays_that_are_refused(tmp_path, case, keys, sentence):
    np.savez(tmp_path / "a.npz", **ARRAYS[case])
    with pytest.raises(DataError, match=sentence) as refused:
        load_data(recipe("a.npz", root=tmp_path, **keys))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "keys", "sentence"),
    [
        ("a,b\n1,x\n2,y\nred,x\n" * 9, {}, "Column 'a' of .* holds 'red', which is no number: leave it out"),
        ("a,b\n1,2\n3\n", {}, "Row 2 of .* has not the columns of the first one"),
        ("a,b\n", {}, "has no rows of named columns"),
        ("a,b\n1,2\n", {"targets": ["c"]}, "has no 'c', which `targets` asks for: it has a, b"),
        ("a\n1\n", {}, "has no column left for `inputs`"),
        ("a,b\n1,inf\n2,3\n3,4\n4,5\n", {"task": "regression"}, "NaN or infinite, the first is example 0"),
    ],
)
def test_tables_that_are_refused(tmp_path, text, keys, sentence):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=sentence) as refused:
        load_data(recipe("t.csv", root=tmp_path, **{"batch_size": 1, **keys}))
    assert "\n" not in str(refused.value)


def test_pickles_are_not_read(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{}] * N, dtype=object), y=np.zeros(N))
    with pytest.raises(DataError, match=r"cannot be read as NumPy's \.npz"):
        load_data(recipe(tmp_path / "a.npz"))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"name": "digitz"}, r"'data.name' is 'digitz', but should be one of digits, .*module:function"),
        ({"name": "digits", "task": "regression"}, "without task regression: digits has a class for each image"),
        ({"name": "digits", "inputs": ["x"]}, "without inputs, which is of files"),
        ({"name": "a.npz", "options": {"a": 1}}, "without options, which are of functions"),
    ],
)
def test_sections_that_are_refused(keys, sentence):
    with pytest.raises(RecipeError, match=sentence):
        parse(DataRecipe, keys, "data")
