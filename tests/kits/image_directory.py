"""A Hugging Face directory of a tiny classifier of images, and a folder of images for it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

transformers = pytest.importorskip("transformers")

COLOURS = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200)}
SIDE = 16


def write_directory(place: Path, **options: object) -> Path:
    """Write a vision transformer of random weights, and how its images are prepared."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    values = {"num_labels": len(COLOURS), "image_size": SIDE, "patch_size": 8, "initializer_range": 0.2}
    config = transformers.ViTConfig(**{**sizes, **values, **options})
    transformers.ViTForImageClassification(config).save_pretrained(place)
    prepared = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (place / "preprocessor_config.json").write_text(json.dumps(prepared))
    return place


def write_photos(place: Path, train: int = 16, test: int = 8) -> Path:
    """Write images of one colour each, and noise."""
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("val", test)):
        for name, colour in COLOURS.items():
            (place / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + random.normal(0, 40, (20, 24, 3)), 0, 255)
                Image.fromarray(pixels.astype("uint8")).save(place / part / name / f"{i}.png")
    return place
