"""CIFAR's layouts with made images; torchvision is told the MD5 of these files."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, labels: list[int], classes: int = 10) -> np.ndarray:
    """Write batches with an image for each label: CIFAR-10's five and a test batch, CIFAR-100's two.

    Returns:
        Pixels, uint8 ``[batches, n, 3072]``, planes R, G, B; the last is the test's.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    kind, meta, key, names = {
        10: (CIFAR10, "batches.meta", "labels", [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]),
        100: (CIFAR100, "meta", "fine_labels", ["train", "test"]),
    }[classes]
    directory = root / kind.base_folder
    directory.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (len(names), len(labels), 3072)).astype(np.uint8)

    def write(name: str, content: dict) -> list[str]:
        (directory / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((directory / name).read_bytes()).hexdigest()]

    lists = [write(name, {"data": pixels[i], key: labels}) for i, name in enumerate(names)]
    of_labels = key.replace("labels", "label_names")
    name, md5 = write(meta, {of_labels: [str(i) for i in range(classes)]})
    monkeypatch.setattr(kind, "train_list", lists[:-1])
    monkeypatch.setattr(kind, "test_list", lists[-1:])
    monkeypatch.setattr(kind, "meta", {"filename": name, "key": of_labels, "md5": md5})
    return pixels
