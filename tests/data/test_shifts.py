"""Shifts against scipy's rotation, moments, and rotations by right angles."""

import numpy as np
import pytest
import scipy.ndimage
import torch

from sqs_pyro.data import ArrayLoader, ShiftedLoader, parse_shift
from sqs_pyro.data.shifts import GaussianNoise, Resized, Rotation, UniformNoise
from sqs_pyro.errors import DataError


@pytest.fixture
def random():
    return torch.Generator().manual_seed(7)  # not the tests' own seed: images would be the noise


def smooth(height: int, width: int) -> torch.Tensor:
    """Images that are black outside of their middle, so that no border comes in."""
    rows, columns = torch.linspace(-2, 2, height)[:, None], torch.linspace(-2, 2, width)
    spot = torch.exp(-3 * ((rows - 0.4) ** 2 + (columns + 0.2) ** 2))
    return spot.view(1, 1, height, width)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_right_angles(random, quarters):
    images = torch.randn(3, 2, 9, 9)
    turned = Rotation(90 * quarters)(images, random)
    torch.testing.assert_close(turned, torch.rot90(images, quarters, (2, 3)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("degrees", [-50.0, 10.0, 30.0])
def test_rotation_against_scipy(random, degrees):
    images = smooth(31, 31)
    expected = scipy.ndimage.rotate(images[0, 0].numpy(), degrees, reshape=False, order=1, mode="nearest")
    np.testing.assert_allclose(Rotation(degrees)(images, random)[0, 0].numpy(), expected, atol=1e-4)


def test_rotation_keeps_shapes_in_images_that_are_not_square(random):
    images = smooth(41, 61)
    expected = scipy.ndimage.rotate(images[0, 0].numpy(), 30, reshape=False, order=1, mode="nearest")
    np.testing.assert_allclose(Rotation(30)(images, random)[0, 0].numpy(), expected, atol=1e-4)


def test_noise_has_its_scale(random):
    images = torch.randn(50, 1, 28, 28)
    noise = GaussianNoise(0.5)(images, random) - images
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(0.5, rel=0.02)


def test_uniform_noise_has_nothing_of_the_images(random):
    images = torch.randn(50, 1, 28, 28).clamp(-1, 2)
    noise = UniformNoise()(images, random)
    assert float(noise.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(noise.var()) == pytest.approx(9 / 12, rel=0.02)
    assert abs(float((noise * images).mean() - noise.mean() * images.mean())) < 0.02


def test_resized(random):
    images = torch.full((2, 3, 8, 8), 0.25)
    assert torch.equal(Resized((3, 28, 20))(images, random), torch.full((2, 3, 28, 20), 0.25))
    colours = torch.stack([torch.full((4, 4), value) for value in (0.0, 1.0, 2.0)])[None]
    grey = Resized((1, 4, 4))(colours, random)
    torch.testing.assert_close(grey, torch.ones(1, 1, 4, 4))
    assert Resized((3, 4, 4))(grey, random).shape == (1, 3, 4, 4)


def test_a_shifted_loader_is_the_same_in_every_pass():
    loader = ArrayLoader(torch.rand(10, 1, 4, 4), torch.arange(10), 4)
    shifted = ShiftedLoader(loader, GaussianNoise(1.0))
    first, second = ([x for x, _ in shifted] for _ in range(2))
    assert len(shifted) == len(loader) == len(first) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0] - next(iter(loader))[0], first[1] - list(loader)[1][0])
    assert torch.equal(torch.cat([y for _, y in shifted]), torch.arange(10))
    assert len(shifted.dataset) == 10
    assert not torch.equal(first[0], next(iter(ShiftedLoader(loader, GaussianNoise(1.0), seed=1)))[0])


def test_shifts_by_name():
    assert parse_shift("rotation:-30") == Rotation(-30)
    assert parse_shift("noise:0.5") == GaussianNoise(0.5)
    assert parse_shift("uniform") == UniformNoise()


@pytest.mark.parametrize(
    "text", ["", "rotation", "rotation:", "rotation:x", "rotation:inf", "blur:1", "uniform:1"]
)
def test_unknown_shifts(text):
    with pytest.raises(DataError, match="is unknown: give rotation:DEGREES, noise:SCALE"):
        parse_shift(text)
