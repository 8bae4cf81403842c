from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sqs_pyro.data import DataRecipe, load_data
from sqs_pyro.errors import DataError


def write_images(directory: Path, classes: dict[str, int]) -> None:
    random = np.random.default_rng(0)
    for name, count in classes.items():
        (directory / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(0, 256, (20, 30, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(directory / name / f"{i}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_images(tmp_path / "train", {"cat": 6, "dog": 6})
    write_images(tmp_path / "val", {"cat": 2, "dog": 2})
    return tmp_path


def recipe(root: Path | None, **values) -> DataRecipe:
    return DataRecipe(name="image_folder", root=root, batch_size=4, image_size=16, num_workers=0, **values)


def test_train_and_val(root: Path):
    data = load_data(recipe(root, validation=4))
    assert [len(loader.dataset) for loader in (data.train, data.validation, data.test)] == [8, 4, 4]
    assert (data.num_classes, data.input_shape) == (2, (3, 16, 16))
    for loader in (data.train, data.validation, data.test):
        x, y = next(iter(loader))
        assert x.shape == (4, 3, 16, 16) and x.dtype == torch.float32 and y.dtype == torch.int64


def test_train_val_and_test(root: Path):
    write_images(root / "test", {"cat": 3, "dog": 2})
    data = load_data(recipe(root))
    assert [len(loader.dataset) for loader in (data.train, data.validation, data.test)] == [12, 4, 5]


def test_limit_takes_images_of_all_classes(tmp_path: Path):
    write_images(tmp_path / "train", {"bird": 20, "cat": 30, "dog": 10})
    write_images(tmp_path / "val", {"bird": 5, "cat": 5, "dog": 5})
    data = load_data(recipe(tmp_path, validation=5, limit=24))
    parts = (data.train, data.validation, data.test)
    assert [len(loader.dataset) for loader in parts] == [19, 5, 15]
    seen = torch.cat([y for loader in parts[:2] for _, y in loader])
    assert seen.bincount().tolist() == pytest.approx([8, 12, 4], abs=3)  # the last minibatch is left out


def test_held_out_images_are_not_augmented(root: Path):
    data = load_data(recipe(root, validation=4))
    for (x, _), (x2, _) in zip(data.validation, data.validation, strict=True):
        assert torch.equal(x, x2)
    first, second = (torch.cat([x for x, _ in data.train]) for _ in range(2))
    assert not torch.equal(first, second)


def test_seed_and_epoch_decide_the_order(root: Path):
    straight, resumed = (load_data(recipe(root, validation=4, augment=False), 5).train for _ in range(2))
    list(straight)
    resumed.epoch = 1
    for (x, y), (x2, y2) in zip(straight, resumed, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)


def test_root_is_needed():
    with pytest.raises(DataError, match=r"needs `root`"):
        load_data(recipe(None))


def test_missing_directories(root: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere' is no directory"):
        load_data(recipe(tmp_path / "nowhere"))
    (root / "val").rename(root / "other")
    with pytest.raises(DataError, match=r"neither 'val' nor 'test'"):
        load_data(recipe(root))


def test_a_class_without_images(root: Path):
    (root / "train" / "emu").mkdir()
    (root / "train" / "emu" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"Class 'emu' in .*train' has no images"):
        load_data(recipe(root))


def test_no_classes_at_all(tmp_path: Path):
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"holds no classes"):
        load_data(recipe(tmp_path))


def test_classes_that_differ(root: Path):
    write_images(root / "val" / "emu", {".": 1})
    with pytest.raises(DataError, match=r"different classes: emu in only one"):
        load_data(recipe(root))


def test_fewer_images_than_a_minibatch(root: Path):
    with pytest.raises(DataError, match=r"leaves 3 images to train on, fewer than a minibatch of 4"):
        load_data(recipe(root, validation=9))
