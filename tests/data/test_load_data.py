import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from kits.cifar import write_cifar
from kits.idx import idx_bytes

from sqs_pyro.data import DataRecipe, fashion_mnist, load_data
from sqs_pyro.errors import DataError, RecipeError
from sqs_pyro.recipes import parse

FASHION = next((place for place in fashion_mnist.PLACES if place.is_dir()), None)
needs_fashion = pytest.mark.skipif(FASHION is None, reason="Fashion-MNIST is not on this machine")


def all_labels(loader) -> torch.Tensor:
    return torch.cat([y for _, y in loader])


def test_digits():
    data = load_data(DataRecipe(name="digits", batch_size=64, validation=200))
    sizes = [len(loader.dataset) for loader in (data.train, data.validation, data.test)]
    assert (sizes, data.num_classes, data.input_shape, data.name) == ([1097, 200, 500], 10, (1, 8, 8), "digits")
    x = torch.cat([x for x, _ in data.validation])
    assert x.shape == (200, 1, 8, 8)
    assert abs(float(x.mean())) < 0.05 and abs(float(x.std()) - 1) < 0.05
    assert all_labels(data.test).bincount().min() >= 48  # stratified: about 50 of each


def test_digits_are_scikit_learns_in_three_disjoint_parts():
    from sklearn.datasets import load_digits

    data = load_data(DataRecipe(name="digits"))
    parts = [loader.dataset.tensors[0] for loader in (data.train, data.validation, data.test)]
    together = (torch.cat(parts)[:, 0] * 16).numpy()
    expected = load_digits().images

    def rows(images: np.ndarray) -> list[bytes]:
        return sorted(image.astype(np.float64).tobytes() for image in images)

    assert rows(together) == rows(expected)


def test_the_seed_changes_the_order_but_never_what_is_held_out():
    first, second = (load_data(DataRecipe(name="digits"), seed) for seed in (0, 1))
    assert torch.equal(all_labels(first.validation), all_labels(second.validation))
    assert not torch.equal(all_labels(first.train), all_labels(second.train))


def test_evaluation_data_is_the_same_in_every_epoch():
    data = load_data(DataRecipe(name="digits"))
    for loader in (data.validation, data.test):
        for (x, y), (x2, y2) in zip(loader, loader, strict=True):
            assert torch.equal(x, x2) and torch.equal(y, y2)


def test_no_augmentation_when_it_is_not_wanted():
    data = load_data(DataRecipe(name="digits", augment=False))
    assert data.train.augment is None


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"name": "mnist"}, "'data.name' is 'mnist', but should be one of digits, fashion_mnist, cifar10"),
        ({"name": "digits", "batchsize": 3}, "'data.batchsize' is unknown.*did you mean 'batch_size'"),
        ({"name": "digits", "validation": 0}, "'data.validation' is 0"),
    ],
)
def test_a_wrong_recipe(values: dict, sentence: str):
    with pytest.raises(RecipeError, match=sentence):
        parse(DataRecipe, values, where="data")


def test_more_validation_than_examples():
    with pytest.raises(DataError, match=r"1297 of 1297 training examples cannot be held out"):
        load_data(DataRecipe(name="digits", validation=1297))


# Fashion-MNIST ---------------------------------------------------------------------------------------


@pytest.fixture
def small_fashion(tmp_path: Path) -> Path:
    """The four files with 30 + 20 images, two of them compressed."""
    random = np.random.default_rng(0)
    for split, count in (("train", 30), ("t10k", 20)):
        images = random.integers(0, 256, (count, 28, 28))
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(count) % 10))
    return tmp_path


def fashion(root: Path) -> DataRecipe:
    return DataRecipe(name="fashion_mnist", root=root, batch_size=5)


def test_fashion_from_a_directory(small_fashion: Path):
    data = load_data(fashion(small_fashion))
    assert [len(loader.dataset) for loader in (data.train, data.validation, data.test)] == [27, 3, 20]
    assert data.input_shape == (1, 28, 28)


def test_fashion_in_torchvisions_layout(small_fashion: Path, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("torchvision")
    (root / "FashionMNIST").mkdir()
    (root / "FashionMNIST" / "raw").symlink_to(small_fashion)
    assert len(load_data(fashion(root)).test.dataset) == 20


def test_fashion_directory_missing(tmp_path: Path):
    with pytest.raises(DataError, match=r"was not found .*nowhere.*give `root`, or set `download: true`"):
        load_data(fashion(tmp_path / "nowhere"))


def test_fashion_nowhere_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(fashion_mnist, "PLACES", (tmp_path / "a", tmp_path / "b"))
    with pytest.raises(DataError, match=r"looked in '.*a', '.*b'.*make fashion-mnist"):
        load_data(DataRecipe(name="fashion_mnist"))


def test_fashion_half_there(small_fashion: Path):
    (small_fashion / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"incomplete: 't10k-labels-idx1-ubyte' .* is missing"):
        load_data(fashion(small_fashion))


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (np.arange(30), "Label 10 of example 10 is out of range: labels must be from 0 to 9"),
        (np.zeros(29), r"30 images need labels of the shape \[30\]"),
    ],
)
def test_fashion_labels_that_do_not_fit(small_fashion: Path, labels: np.ndarray, sentence: str):
    (small_fashion / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    with pytest.raises(DataError, match=f"train-images.*train-labels.*do not fit: {sentence}"):
        load_data(fashion(small_fashion))


@needs_fashion
def test_real_fashion_mnist():
    data = load_data(DataRecipe(name="fashion_mnist", root=FASHION))
    assert [len(loader.dataset) for loader in (data.train, data.validation, data.test)] == [55_000, 5_000, 10_000]
    assert all_labels(data.test).bincount().tolist() == [1000] * 10
    assert all_labels(data.validation).bincount().tolist() == [500] * 10
    pixels = data.train.dataset.tensors[0].float() / 255
    assert abs(float(pixels.mean()) - 0.2860) < 1e-3 and abs(float(pixels.std()) - 0.3530) < 1e-3


# CIFAR -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    return tmp_path, write_cifar(tmp_path, monkeypatch, list(range(8)))


def cifar(root: Path) -> DataRecipe:
    return DataRecipe(name="cifar10", root=root, batch_size=4)


def test_cifar(small_cifar: tuple[Path, np.ndarray]):
    root, pixels = small_cifar
    data = load_data(cifar(root))
    assert [len(loader.dataset) for loader in (data.train, data.validation, data.test)] == [36, 4, 8]
    assert (data.num_classes, data.input_shape) == (10, (3, 32, 32))
    assert np.array_equal(data.test.dataset.tensors[0].numpy(), pixels[5].reshape(8, 3, 32, 32))


def test_limit_takes_the_first_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pixels = write_cifar(tmp_path, monkeypatch, [i % 10 for i in range(30)])
    data = load_data(DataRecipe(name="cifar10", root=tmp_path, batch_size=4, limit=40, validation=10))
    assert [len(loader.dataset) for loader in (data.train, data.validation, data.test)] == [30, 10, 30]
    loaders = (data.train, data.validation)
    seen = {image.tobytes() for loader in loaders for image in loader.dataset.tensors[0].numpy()}
    assert seen == {image.tobytes() for image in pixels[:2].reshape(-1, 3072)[:40]}


def test_limit_is_of_the_sets_known_by_name():
    with pytest.raises(RecipeError, match="a section without limit"):
        parse(DataRecipe, {"name": "data.npz", "limit": 100}, "data")


def test_cifar_missing_half_there_and_altered(small_cifar: tuple[Path, np.ndarray], tmp_path: Path):
    with pytest.raises(DataError, match=r"CIFAR10 was not found: .* is no directory; give `root`"):
        load_data(cifar(tmp_path / "elsewhere"))
    root, _ = small_cifar
    batch = root / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"CIFAR10 in .* cannot be read"):
        load_data(cifar(root))
    batch.unlink()
    with pytest.raises(DataError, match=r"CIFAR10 in .* is incomplete: data_batch_3 missing"):
        load_data(cifar(root))


def test_cifar100_says_its_own_name(tmp_path: Path):
    with pytest.raises(DataError, match=r"CIFAR100 was not found: .*cifar-100-python"):
        load_data(DataRecipe(name="cifar100", root=tmp_path))
