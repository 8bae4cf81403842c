"""What a function of the user's returns: used as it is, or made minibatches of."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sqs_pyro.data import Data, DataRecipe, load_data
from sqs_pyro.errors import DataError

X, Y = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4
SET = TensorDataset(X, Y)


class Named(torch.utils.data.Dataset):
    """As torchvision's are: with names of classes."""

    classes = ("a", "b", "c", "d", "e")

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return X[index], int(Y[index])


def loader(size=8):
    return DataLoader(SET, size)


MADE = {
    "sets": {"train": SET, "test": SET},
    "named": {"train": Named(), "test": Named()},
    "loaders": {"train": loader(), "validation": loader(), "test": loader(), "num_classes": 4},
    "arrays": {"train": (X.numpy(), Y.numpy()), "test": (X[:5], Y[:5])},
    "data": Data(loader(), loader(), loader(), 4, (3,), "mine"),
    "no test": {"train": SET},
    "no validation": {"train": loader(), "test": loader()},
    "a list": [1, 2],
    "numbers": {"train": 1, "test": 2},
    "uncounted": {"train": [(X[0], 1)] * 40, "test": SET},
    "unequal": {"train": (X, Y[1:]), "test": (X, Y)},
    "fails": ZeroDivisionError("on purpose"),
}


@pytest.fixture
def own(monkeypatch):
    import sys
    from types import ModuleType

    module = ModuleType("data_of_a_test")

    def made(what, **options):
        if isinstance(MADE[what], Exception):
            raise MADE[what]
        return MADE[what]

    module.made = made
    monkeypatch.setitem(sys.modules, "data_of_a_test", module)

    def load(what, **keys):
        keys = {"batch_size": 8, "num_workers": 0, **keys}
        return load_data(DataRecipe(name="data_of_a_test:made", options={"what": what}, **keys))

    return load


def test_data_and_loaders_are_used_as_they_are(own):
    assert own("data") is MADE["data"]
    data = own("loaders")
    assert data.train is MADE["loaders"]["train"] and data.test is MADE["loaders"]["test"]
    assert (data.num_classes, data.input_shape) == (4, (3,))


@pytest.mark.parametrize(("what", "classes"), [("sets", 4), ("named", 5)])
def test_of_data_sets_minibatches_are_made(own, what, classes):
    data = own(what, validation=6)
    assert (data.num_classes, data.input_shape) == (classes, (3,))
    assert [len(part.dataset) for part in (data.train, data.validation, data.test)] == [34, 6, 40]
    assert [len(y) for _, y in data.train] == [8] * 4
    first, again = ([y.tolist() for _, y in data.train] for _ in range(2))
    assert first != again
    data.train.epoch = 1
    assert [y.tolist() for _, y in data.train] == first


def test_arrays_are_those_of_a_file(own, tmp_path):
    np.savez(tmp_path / "a.npz", x=X, y=Y, x_test=X[:5], y_test=Y[:5])
    of_file = load_data(DataRecipe(name=str(tmp_path / "a.npz"), batch_size=8))
    for mine, other in zip(own("arrays").train, of_file.train, strict=True):
        assert torch.equal(mine[0], other[0]) and torch.equal(mine[1], other[1])


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("no test", r"returns {'train': .*}, but should return a mapping with 'train', 'test'"),
        ("a list", r"returns \[1, 2\], but should return a mapping"),
        ("no validation", "returns loaders without 'validation'"),
        ("numbers", "but should return a mapping"),
        ("uncounted", "does not say how many classes there are: return 'num_classes'"),
        ("unequal", "has 40 inputs and 39 targets for 'train'"),
        ("fails", r"fails with the options {'what': 'fails'} \(ZeroDivisionError: on purpose\)"),
    ],
)
def test_what_is_refused(own, what, sentence):
    with pytest.raises(DataError, match=sentence):
        own(what)
