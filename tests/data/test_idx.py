import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from kits.idx import idx_bytes

from sqs_pyro.data.idx import read_idx
from sqs_pyro.errors import DataError


@pytest.fixture
def array() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 4, 5))


@pytest.mark.parametrize("compressed", [False, True])
def test_reads_what_was_written(tmp_path: Path, array: np.ndarray, compressed: bool):
    path = tmp_path / ("images.gz" if compressed else "images")
    path.write_bytes(gzip.compress(idx_bytes(array)) if compressed else idx_bytes(array))
    result = read_idx(path, ndim=3)
    assert result.dtype == torch.uint8 and np.array_equal(result.numpy(), array)
    result += 1  # writable, or torch would warn


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda b: b[:-1], "promises 140 bytes .* but 139 follow"),
        (lambda b: b + b"\x00", "promises 140 bytes .* but 141 follow"),
        (lambda b: b[:9], "ends within its header"),
        (lambda b: b[:3], "begins with 0x000008 instead of 0x00000803"),
        (lambda b: b"\x00\x00\x0d" + b[3:], "begins with 0x00000d03"),
        (lambda b: b"", "begins with 0x instead"),
        (lambda b: b[:4] + struct.pack(">3I", 0, 4, 5), "holds no examples"),
    ],
)
def test_a_damaged_file_is_named_with_the_reason(tmp_path: Path, array: np.ndarray, damage, sentence: str):
    path = tmp_path / "train-images"
    path.write_bytes(damage(idx_bytes(array)))
    with pytest.raises(DataError, match=f"train-images.*{sentence}") as caught:
        read_idx(path, ndim=3)
    assert "\n" not in str(caught.value)


def test_labels_are_not_images(tmp_path: Path):
    path = tmp_path / "labels"
    path.write_bytes(idx_bytes(np.zeros(3)))
    with pytest.raises(DataError, match=r"not an idx file of bytes with 3 dimensions"):
        read_idx(path, ndim=3)


@pytest.mark.parametrize("cut", [slice(0, -9), slice(0, 12), slice(5, None)])
def test_a_damaged_gzip_file(tmp_path: Path, array: np.ndarray, cut: slice):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx_bytes(array))[cut])
    with pytest.raises(DataError, match=r"truncated or altered"):
        read_idx(path, ndim=3)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(DataError, match=r"cannot be read: No such file"):
        read_idx(tmp_path / "nothing", ndim=1)
