import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sqs_pyro.data import ArrayLoader, Augmentation
from sqs_pyro.errors import DataError


def numbered_images(count: int, channels: int = 1, side: int = 6) -> torch.Tensor:
    """uint8 images whose every pixel differs from its neighbours; pixel 0 says which image it is."""
    images = torch.arange(count * channels * side * side, dtype=torch.int64).remainder(251).to(torch.uint8)
    images = images.view(count, channels, side, side) + 1
    images[:, :, 0, 0] = torch.arange(count, dtype=torch.uint8)[:, None]
    return images


def order_of(loader: ArrayLoader) -> list[int]:
    return [int(label) for _, labels in loader for label in labels]


def test_an_epoch_visits_every_example_once_and_each_epoch_in_another_order():
    loader = ArrayLoader(numbered_images(50), torch.arange(50), 8, shuffle=True, seed=3)
    first, second = order_of(loader), order_of(loader)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second != list(range(50))


def test_images_and_labels_stay_together():
    loader = ArrayLoader(numbered_images(50), torch.arange(50), 8, shuffle=True)
    for x, y in loader:
        assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), y)


def test_seed_and_epoch_decide_everything():
    images, labels = numbered_images(40, side=8), torch.arange(40)

    def loader(seed: int) -> ArrayLoader:
        return ArrayLoader(images, labels, 16, shuffle=True, augment=Augmentation(2), seed=seed)

    straight, resumed, other = loader(1), loader(1), loader(2)
    list(straight)
    resumed.epoch = 1
    for (x, y), (x2, y2) in zip(straight, resumed, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    assert order_of(loader(1)) != order_of(other)


def test_an_epoch_left_early_counts():
    loader = ArrayLoader(numbered_images(40), torch.arange(40), 16, shuffle=True)
    next(iter(loader))
    assert loader.epoch == 1


def test_lengths_and_types():
    images, labels = numbered_images(50, channels=3), torch.zeros(50, dtype=torch.int32)
    loader = ArrayLoader(images, labels, 16)
    batches = list(loader)
    assert (len(loader), len(batches), len(loader.dataset)) == (4, 4, 50)
    assert [len(y) for _, y in batches] == [16, 16, 16, 2]
    assert batches[0][0].dtype == torch.float32 and batches[0][1].dtype == torch.int64
    assert batches[0][0].shape == (16, 3, 6, 6)
    dropping = ArrayLoader(images, labels, 16, drop_last=True)
    assert len(dropping) == len(list(dropping)) == 3


def test_normalisation_agrees_with_numpy():
    images = numbered_images(9, channels=3)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    (x, _), *_ = ArrayLoader(images, torch.zeros(9, dtype=torch.long), 9, mean, std)
    expected = (images.numpy() / 255 - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    np.testing.assert_allclose(x.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_floats_are_taken_as_they_are():
    images = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    (x, _), *_ = ArrayLoader(images, torch.zeros(5, dtype=torch.long), 5)
    assert torch.equal(x, images.float())


@given(padding=st.integers(0, 4), flip=st.booleans(), seed=st.integers(0, 1000))
def test_augmentation_crops_each_image_out_of_its_padded_self(padding: int, flip: bool, seed: int):
    """Independent statement: each result is one of the image's (2p + 1)² crops, mirrored or not."""
    images = numbered_images(6, channels=2, side=5)
    augmented = Augmentation(padding, flip)(images, torch.Generator().manual_seed(seed))
    for image, result in zip(images.numpy(), augmented.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
        crops = [
            padded[:, top : top + 5, left : left + 5]
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
        ]
        crops += [crop[:, :, ::-1] for crop in crops] if flip else []
        assert any(np.array_equal(result, crop) for crop in crops)


def test_every_shift_and_both_directions_occur():
    images = numbered_images(1, side=5).expand(2000, -1, -1, -1)
    augmented = Augmentation(1, flip=True)(images, torch.Generator().manual_seed(0))
    assert len({result.numpy().tobytes() for result in augmented}) == 2 * 3 * 3


@pytest.mark.parametrize(
    ("images", "labels", "sentence"),
    [
        (torch.zeros(3, 4, 4), torch.zeros(3), r"shape \[N, C, H, W\].*have \[3, 4, 4\]"),
        (torch.zeros(0, 1, 4, 4), torch.zeros(0), r"none of it 0, but have \[0, 1, 4, 4\]"),
        (torch.zeros(3, 1, 4, 4, dtype=torch.int64), torch.zeros(3), "uint8 or floating point.*torch.int64"),
        (torch.zeros(3, 1, 4, 4), torch.zeros(2, dtype=torch.long), r"3 images need labels.*\[2\]"),
        (torch.zeros(3, 1, 4, 4), torch.zeros(3), "Labels must be integers from 0, but are torch.float32"),
        (torch.zeros(3, 1, 4, 4), torch.tensor([0, 1, 4]), "Label 4 of example 2 .* from 0 to 3"),
        (torch.zeros(3, 1, 4, 4), torch.tensor([0, -1, 2]), "Label -1 of example 1"),
    ],
)
def test_wrong_arrays_give_one_sentence(images: torch.Tensor, labels: torch.Tensor, sentence: str):
    with pytest.raises(DataError, match=sentence) as caught:
        ArrayLoader(images, labels, 2, num_classes=4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_are_counted(value: float):
    images = torch.zeros(4, 1, 3, 3)
    images[1, 0, 2, 2] = images[3, 0, 0, 0] = value
    with pytest.raises(DataError, match=r"2 of 4 images .* NaN or infinite, the first is image 1"):
        ArrayLoader(images, torch.zeros(4, dtype=torch.long), 2)


def test_labels_below_zero_are_wrong_without_a_number_of_classes():
    with pytest.raises(DataError, match=r"Label -2 of example 0 .* 0 or more"):
        ArrayLoader(torch.zeros(1, 1, 2, 2), torch.tensor([-2]), 1)


def test_a_batch_larger_than_the_training_set_is_an_error():
    with pytest.raises(DataError, match=r"batch size of 9 does not fit 4 examples"):
        ArrayLoader(torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.long), 9, drop_last=True)


@pytest.mark.parametrize("std", [(0.0,), (1.0, 1.0)])
def test_normalisation_must_fit_the_channels(std: tuple[float, ...]):
    with pytest.raises(DataError, match=r"Normalisation of images with 3 channels"):
        ArrayLoader(torch.zeros(4, 3, 2, 2), torch.zeros(4, dtype=torch.long), 2, (0.0,), std)
