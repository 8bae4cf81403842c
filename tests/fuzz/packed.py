"""Packed files: single networks, ensembles, scales, built by the registry or given."""

import hashlib
import json
import zlib
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import sqs_pyro
from fuzz.kind import Kind
from fuzz.mutations import changed, damaged, json_text
from sqs_pyro.kernels.network import packed_ensemble, packed_network, save
from sqs_pyro.networks.registry import build_network, register_network
from sqs_pyro.packing.file import _header
from sqs_pyro.packing.leftovers import field_bytes
from sqs_pyro.packing.words import WORDS
from sqs_pyro.runs.files import inspect_file
from sqs_pyro.testing.layouts import random_coded


@register_network("fuzzed")
class FuzzedNet(nn.Module):
    """Convolution, norm, embedding and two layers, one of them without compression."""

    def __init__(self, width: int = 8, classes: int = 3, rows: int = 5, depth: int = 1) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm1d(width)
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
        self.head = nn.Linear(width, classes)
        self.register_buffer("mask", torch.full((width,), float("-inf")).where(torch.arange(width) > 5, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[B, T]`` to logits ``[B, C]``."""
        hidden = self.norm(self.conv(self.table(x).transpose(1, 2))).mean(-1)
        return self.head(self.layers(hidden).relu() * self.mask.exp())


def network(seed: int) -> nn.Module:
    """One whose tensors are not constant."""
    net = build_network("fuzzed", width=8, classes=3, rows=5, depth=1)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    return net.eval()


def coded(seed: int, *, scales: bool | int = False, draw: int = 0) -> dict[str, Any]:
    """Compressed weights of :func:`network`."""
    shapes = {"table.weight": (5, 8), "conv.weight": (8, 8, 3), "layers.0.weight": (8, 8)}
    made = {name: random_coded(shape, 4, seed=seed, scales=scales) for name, shape in shapes.items()}
    if draw:
        other = {name: random_coded(shape, 4, seed=seed + draw) for name, shape in shapes.items()}
        made = {n: type(c)(other[n].codes, other[n].mask, c.codebook, c.scales) for n, c in made.items()}
    return made


def split(content: bytes) -> tuple[str, dict[str, Any], bytes]:
    """Version, manifest and data of a packed file."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    size = header["manifest"]["shape"][0]
    start = 8 + length
    manifest = json.loads(zlib.decompressobj(zdict=WORDS).decompress(content[start : start + size]))
    return header["__metadata__"]["format_version"], manifest, content[start + size :]


def joined(version: str, manifest: bytes, data: bytes) -> bytes:
    """The packed file with checksums that fit."""
    digest = hashlib.sha256(manifest + data).hexdigest()
    return _header(version, digest, len(manifest), len(data)) + manifest + data


class Packed(Kind):
    """Half of them damaged at random bytes, half in their manifest or data, with checksums that fit."""

    name, share = "packed", 1.0
    file = "net.safetensors"

    def prepare(self, directory: Path) -> None:
        """Files of every version and layout."""
        metadata = {"recipe": {"data": {"name": "digits"}}, "metrics": {"accuracy": 0.5}}
        nets = [
            *(
                packed_network(network(0), coded(0), layout=x, metadata=metadata)
                for x in ("dense", "bitmap", "entropy", "adaptive", "structured")
            ),
            packed_network(network(1), coded(1, scales=True), leftover_dtype="float32"),
            packed_network(network(3), coded(3, scales=4)),
            packed_ensemble(network(2), [coded(2, draw=d) for d in range(3)], metadata=metadata),
        ]
        self.x = torch.arange(12).view(3, 4) % 5
        self.good: list[tuple[bytes, Tensor]] = []
        for net in nets:
            save(net, directory / self.file)
            self.good.append(((directory / self.file).read_bytes(), net(self.x)))
        self.plain = network(5)

    def damage(self, directory: Path, random: Random) -> bool:
        """Damage bytes as they are, or content under checksums that fit."""
        content, self.expected = random.choice(self.good)
        self.given = random.random() < 0.3
        if random.random() < 0.5:
            (directory / self.file).write_bytes(damaged(content, random))
            return False
        version, manifest, data = split(content)
        if random.random() < 0.15:
            bomb = zlib.compress(random.choice((b"[[]" + b",[]" * 10**6, b" " * 10**7, b'{"a":' * 10**5)), 9)
            packed = joined(version, bomb, data)
        elif random.random() < 0.2:
            packed = joined(version, damaged(zlib.compress(json.dumps(manifest).encode(), 9), random), data)
        else:
            how = random.random()
            if how < 0.3:
                data = damaged(data, random)
            elif how < 0.6:
                changed(manifest["metadata"]["network" if random.random() < 0.6 else "recipe"], random)
            else:
                manifest = changed(manifest, random)
            if random.random() < 0.9:
                _fit_checksums(manifest, data)
            packed = joined(version, zlib.compress(json_text(manifest, random), 9), data)
        (directory / self.file).write_bytes(packed)
        return True

    def read(self, directory: Path) -> Tensor:
        """Load it and call it; describe it, too."""
        path = directory / self.file
        net = sqs_pyro.load(path, self.plain if self.given else None)
        inspect_file(path)
        return net(self.x)

    def is_right(self, value: Tensor) -> bool:
        """Whether outputs are the same, bit for bit."""
        return torch.equal(value, self.expected)


def _fit_checksums(manifest: Any, data: bytes) -> None:
    """Compute the tensors' checksums anew, as far as the manifest still makes sense."""
    try:
        columns, position = manifest["tensors"], 0
        for row, lengths in enumerate(columns["lengths"]):
            size = sum(lengths.values())
            columns["crc32"][row] = zlib.crc32(data[position : position + size])
            position += size
        for kind in manifest["leftovers"]:
            for row, shapes in enumerate(kind["shapes"]):
                pairs = zip(kind["fields"], shapes, strict=True)
                size = sum(field_bytes(field, shape) for field, shape in pairs)
                kind["crc32"][row] = zlib.crc32(data[position : position + size])
                position += size
    except (KeyError, TypeError, IndexError, AttributeError, ValueError):
        return
