"""Data sets of the Hugging Face hub, from copies on the disk: images as of a folder, tables as of a file."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from sqs_pyro.data import DataRecipe, load_data
from sqs_pyro.data.hub import is_saved
from sqs_pyro.errors import DataError, MissingPackageError, RecipeError, SQSError
from sqs_pyro.fingerprint import loader_fingerprint
from sqs_pyro.recipes import parse

datasets = pytest.importorskip("datasets")

NAMES = ["dog", "cat"]  # whose numbers are not in alphabetical order
FEATURES = {"id": datasets.Value("int64"), "img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}


def images(count, seed=0):
    random = np.random.default_rng(seed)
    pixels = [random.integers(0, 256, (20, 30, 3)).astype("uint8") for _ in range(count)]
    columns = {"id": list(range(count)), "img": [Image.fromarray(p) for p in pixels]}
    columns["label"] = [i % 2 for i in range(count)]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(FEATURES))


def numbers(count, **more):
    random = np.random.default_rng(count)
    x = random.normal(size=(count, 2))
    return datasets.Dataset.from_dict({"a": x[:, 0], "b": x[:, 1], "y": x.sum(1), **more})


@pytest.fixture
def saved(tmp_path):
    def save(**splits):
        made = datasets.DatasetDict(splits) if set(splits) != {"alone"} else splits["alone"]
        made.save_to_disk(str(tmp_path / "set"))
        return str(tmp_path / "set")

    return save


def recipe(name, **values):
    small = {"batch_size": 4, "image_size": 16, "num_workers": 0, "augment": False}
    return parse(DataRecipe, {"name": name, **small, **values})


def examples(data):
    return [len(loader.dataset) for loader in (data.train, data.validation, data.test)]


def test_images_are_prepared_as_those_of_a_folder(saved, tmp_path):
    rows = images(12)
    name = saved(train=rows, validation=images(4, 1), test=images(6, 2))
    data = load_data(recipe(name))
    assert examples(data) == [12, 4, 6]
    assert (data.num_classes, data.input_shape, data.about["classes"]) == (2, (3, 16, 16), NAMES)
    for part, row in (("train", rows), ("test", images(6, 2))):
        for i in range(len(row)):
            place = tmp_path / "folder" / part / row.features["label"].int2str(row[i]["label"])
            place.mkdir(parents=True, exist_ok=True)
            row[i]["img"].save(place / f"{i}.png")
    folder = load_data(recipe("image_folder", root=tmp_path / "folder", validation=2))
    x, y = next(iter(data.test))
    expected = {tuple(x.flatten().tolist()): int(k) for x, k in folder.test.dataset}
    for image, label in zip(x, y, strict=True):  # a folder numbers its classes in alphabetical order
        assert expected[tuple(image.flatten().tolist())] == sorted(NAMES).index(NAMES[int(label)])


def test_what_is_missing_is_held_out(saved):
    data = load_data(recipe(saved(alone=images(40))))
    assert examples(data) == [40 - 8 - 3, 3, 8]
    more = load_data(recipe(saved(alone=images(40)), validation=8))
    assert examples(more) == [24, 8, 8]
    # The test examples do not depend on how many are held out for choices; no example is in two parts.
    assert list(more.test.dataset.rows["id"]) == list(data.test.dataset.rows["id"])
    kept = [list(part.dataset.rows["id"]) for part in (data.train, data.validation, data.test)]
    assert sorted(i for part in kept for i in part) == list(range(40))
    assert all(int(y) == i % 2 for i, y in zip(kept[2], data.test.dataset.labels, strict=True))


def test_one_split_beside_training_is_for_the_final_figures(saved):
    name = saved(train=images(20), dev=images(6))
    assert examples(load_data(recipe(name))) == [18, 2, 6]
    name = saved(train=images(20), dev=images(6), other=images(8))
    assert examples(load_data(recipe(name, test="other"))) == [20, 6, 8]


def test_the_order_follows_from_the_seed(saved):
    name = saved(train=images(12), test=images(4))
    first, again, other = (load_data(recipe(name), seed) for seed in (0, 0, 1))
    for (x, y), (x2, y2) in zip(first.train, again.train, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    assert not torch.equal(next(iter(first.train))[0], next(iter(other.train))[0])
    kept = loader_fingerprint(first.test)
    assert kept == loader_fingerprint(other.test)
    moved = load_data(recipe(saved(train=images(12), test=images(4, seed=3))))
    assert loader_fingerprint(moved.test) != kept


def test_pixels_are_normalised_as_it_is_said(saved):
    name = saved(train=images(12), test=images(4))
    plain, other = (load_data(recipe(name, mean=mean, std=std)) for mean, std in (([0], [1]), ([0.5], [0.25])))
    x, x2 = (next(iter(data.test))[0] for data in (plain, other))
    torch.testing.assert_close((x - 0.5) / 0.25, x2)
    assert other.about["input_mean"] == [0.5] * 3 and other.about["input_std"] == [0.25] * 3


def test_tables_are_those_of_a_file(saved, tmp_path):
    rows, test = numbers(40), numbers(10)
    data = load_data(recipe(saved(train=rows, test=test), task="regression"))
    rows.to_pandas().to_csv(tmp_path / "train.csv", index=False)
    test.to_pandas().to_csv(tmp_path / "test.csv", index=False)
    values = {"task": "regression", "test": str(tmp_path / "test.csv")}
    of_file = load_data(recipe(str(tmp_path / "train.csv"), **values))
    assert (data.input_shape, data.num_classes, data.about["targets"]) == ((2,), 1, ["y"])
    for key in ("input_mean", "input_std", "target_mean", "target_std"):
        assert data.about[key] == pytest.approx(of_file.about[key])
    assert data.about["inputs"] == of_file.about["inputs"] == ["a", "b"]
    for (x, y), (x2, y2) in zip(data.train, of_file.train, strict=True):
        torch.testing.assert_close(x, x2)
        torch.testing.assert_close(y, y2)


def test_columns_by_name(saved):
    data = load_data(recipe(saved(train=numbers(40)), task="regression", inputs=["b"], targets=["a"]))
    assert data.about["inputs"] == ["b"] and data.about["targets"] == ["a"]


def test_the_hub_is_asked_by_the_name_behind_it(monkeypatch):
    asked = []

    def load_dataset(path, **options):  # `name` is that of a configuration, as in datasets' own
        asked.append((path, options))
        if path == "away":
            raise ConnectionError("Couldn't reach the hub\nat all.")
        return datasets.DatasetDict(train=images(12), test=images(4))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert examples(load_data(recipe("hub/owner/name", options={"name": "plain", "revision": "1"}))) == [11, 1, 4]
    assert asked == [("owner/name", {"name": "plain", "revision": "1"})]
    with pytest.raises(
        DataError, match=r"'away' could not be loaded .*\(Couldn't reach the hub\): check its name"
    ):
        load_data(recipe("hub/away"))


def test_what_is_a_copy(saved, tmp_path):
    assert is_saved(saved(train=images(4))) and is_saved(saved(alone=images(4)))
    assert not is_saved(tmp_path) and not is_saved("nowhere")


@pytest.mark.parametrize(
    ("splits", "values", "sentence"),
    [
        ({"a": images(4), "b": images(4)}, {}, "has no split 'train': it has a, b"),
        ({"train": images(4)}, {"test": "other"}, "has no split 'other', which `test` asks for: it has train"),
        (
            {"train": images(4)},
            {"inputs": ["pic"]},
            "has no 'pic', which `inputs` asks for: it has id, img, label",
        ),
        ({"train": images(8)}, {"targets": ["id"]}, "8 different values in 8 examples, .* which are no classes"),
        ({"train": images(8)}, {"task": "regression"}, "has images, of which a class each is learned"),
        ({"train": images(8)}, {"inputs": ["img", "id"]}, "name one column as `inputs` and one as `targets`"),
        ({"train": images(8), "test": images(4)}, {"batch_size": 64}, "leaves 7 images to train on, fewer than"),
        ({"train": numbers(30, t=["x"] * 30)}, {"targets": ["y"], "task": "regression"}, "holds 'x', which is no"),
    ],
)
def test_what_is_refused(splits, values, sentence, saved):
    with pytest.raises(DataError, match=sentence) as refused:
        load_data(recipe(saved(**splits), **values))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kept", "sentence"),
    [
        ({"bytes": b"none", "path": None}, r"Image 0 of .* cannot be read \(.*\): remove or replace it"),
        (None, "Image 0 of .* is missing: remove the row"),
    ],
)
def test_a_damaged_image_is_named(kept, sentence, saved):
    features = datasets.Features(FEATURES)
    columns = {"id": [0] * 8, "img": [kept] * 8, "label": [0, 1] * 4}
    broken = datasets.Dataset.from_dict(columns, features=features)
    data = load_data(recipe(saved(train=images(12), test=broken)))
    with pytest.raises(DataError, match=sentence):
        next(iter(data.test))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"name": "hub/x", "root": "y"}, "a section without root: hub/x is found by its name"),
        (
            {"name": "hub/x", "options": {"data_files": "z"}},
            "options are name and revision alone, without 'data_f",
        ),
        ({"name": "a/copy", "options": {"name": "z"}}, "without options, which are of functions .* and hub/NAME"),
        ({"name": "digits", "inputs": ["a"]}, "a section without inputs, which is of files .* and hub/NAME"),
        ({"name": "digit"}, "hub/NAME, the directory of a data set .*; did you mean 'digits'"),
    ],
)
def test_recipes_that_do_not_fit(values, sentence):
    with pytest.raises(RecipeError, match=sentence):
        parse(DataRecipe, values)


def test_what_is_not_there(tmp_path, monkeypatch):
    for name in ("a/copy", str(tmp_path)):
        with pytest.raises(DataError, match="is no directory of a data set that save_to_disk made: correct"):
            load_data(recipe(name))
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(SQSError, match=r"cannot be read \(.*\): save it anew"):
        load_data(recipe(str(tmp_path)))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r"need the package 'datasets', .*\[text\]', or give a file"):
        load_data(recipe("hub/x"))
