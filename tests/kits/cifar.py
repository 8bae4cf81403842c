"""CIFAR-10's layout with made images; torchvision is told the MD5 of these files."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, labels: list[int]) -> np.ndarray:
    """Write six batches with an image for each label; return pixels, uint8 ``[6, n, 3072]``, planes R, G, B."""
    from torchvision.datasets import CIFAR10

    directory = root / CIFAR10.base_folder
    directory.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, len(labels), 3072)).astype(np.uint8)

    def write(name: str, content: dict) -> list[str]:
        (directory / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((directory / name).read_bytes()).hexdigest()]

    batches = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    lists = [write(name, {"data": pixels[i], "labels": labels}) for i, name in enumerate(batches)]
    name, md5 = write("batches.meta", {"label_names": [str(i) for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "train_list", lists[:5])
    monkeypatch.setattr(CIFAR10, "test_list", lists[5:])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return pixels
