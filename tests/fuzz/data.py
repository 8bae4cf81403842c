"""Data files: idx, rows, texts, pictures; and compiled kernels."""

import gzip
import io
import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from kits.idx import idx_bytes
from PIL import Image

from fuzz.kind import Documents, Kind
from fuzz.mutations import changed, damaged, json_text
from sqs_pyro.compiling import compiled
from sqs_pyro.data.idx import read_idx
from sqs_pyro.data.image_folder import read_image
from sqs_pyro.data.text_sources import documents_in_file


class Idx(Documents):
    """Images of MNIST's format, compressed or not."""

    name = "idx"

    def prepare(self, directory: Path) -> None:
        """A few digits."""
        content = idx_bytes(np.arange(7 * 5 * 4).reshape(7, 5, 4) % 256)
        self.good = [content, gzip.compress(content)]

    def damage(self, directory: Path, random: Random) -> bool:
        """Damage bytes, or the header's sizes; what is compressed may be a bomb."""
        content = random.choice(self.good)
        self.file = "images.gz" if content[:2] == b"\x1f\x8b" else "images"
        made = damaged(content, random) if random.random() < 0.5 else self.changed(self.good[0], random)
        if self.file == "images.gz" and made[:2] != b"\x1f\x8b" and random.random() < 0.9:
            made = gzip.compress(made)
        (directory / self.file).write_bytes(made)
        return True

    def changed(self, content: bytes, random: Random) -> bytes:
        """Other sizes, or much more."""
        sizes = [random.choice((0, 1, 5, 7, 2**16, 2**31, 2**32 - 1)) for _ in range(3)]
        more = bytes(10**7) if random.random() < 0.1 else b""
        return content[:4] + struct.pack(">3I", *sizes) + content[16:] + more

    def read(self, directory: Path) -> Any:
        """Read it."""
        return read_idx(directory / self.file, 3)


class Rows(Documents):
    """Texts in columns, or in paragraphs."""

    name = "rows"

    def prepare(self, directory: Path) -> None:
        """One of each kind."""
        rows: list[dict[str, Any]] = [{"text": f'row {i}, of "quotes"', "label": i} for i in range(5)]
        self.files = {
            "rows.json": json.dumps(rows).encode(),
            "rows.jsonl": "\n".join(map(json.dumps, rows)).encode(),
            "rows.csv": b'text,label\r\n"a, b",1\r\nc,2\r\n',
            "rows.txt": "one\n\ntwo, grün\n\nthree".encode(),
        }

    def damage(self, directory: Path, random: Random) -> bool:
        """Damage bytes or values."""
        self.file, content = random.choice(list(self.files.items()))
        is_json = self.file == "rows.json" and random.random() < 0.5
        made = self.changed(content, random) if is_json else damaged(content, random)
        (directory / self.file).write_bytes(made)
        return True

    def changed(self, content: bytes, random: Random) -> bytes:
        """Another value."""
        return json_text(changed(json.loads(content), random), random)

    def read(self, directory: Path) -> Any:
        """Read the texts."""
        return documents_in_file(directory / self.file, "text")


class Pictures(Documents):
    """Images of a folder."""

    name = "picture"

    def prepare(self, directory: Path) -> None:
        """The usual formats."""
        picture = Image.fromarray((np.arange(20 * 30 * 3) % 251).astype(np.uint8).reshape(20, 30, 3))
        self.files = {}
        for kind in ("png", "jpeg", "bmp", "webp", "tiff"):
            stream = io.BytesIO()
            picture.save(stream, kind)
            self.files[f"a.{kind}"] = stream.getvalue()

    def damage(self, directory: Path, random: Random) -> bool:
        """Damage bytes, or say other sizes."""
        self.file, content = random.choice(list(self.files.items()))
        (directory / self.file).write_bytes(self.changed(content, random))
        return True

    def changed(self, content: bytes, random: Random) -> bytes:
        """Of a PNG and a BMP, sizes stand at a fixed place."""
        place = {"a.png": 16, "a.bmp": 18}.get(self.file)
        if place is None or random.random() < 0.5:
            return damaged(content, random)
        sizes = struct.pack(
            ">2I" if self.file == "a.png" else "<2I", *random.choices((1, 30, 2**14, 2**20, 2**31 - 1), k=2)
        )
        return content[:place] + sizes + content[place + 8 :]

    def read(self, directory: Path) -> Any:
        """Decode it."""
        return read_image(str(directory / self.file))


class Kernels(Kind):
    """Compiled libraries in the cache: a damaged one is built again."""

    name = "kernel"

    def prepare(self, directory: Path) -> None:
        """Something instead of a compiler."""
        self.path = compiled("kind", [], [], self.build)
        self.good = self.path.read_bytes()

    def build(self, library: Path) -> None:
        """What a compiler would write."""
        library.write_bytes(bytes(range(256)) * 4)

    def damage(self, directory: Path, random: Random) -> bool:
        """Damage bytes."""
        self.path.write_bytes(damaged(self.good, random))
        return False

    def read(self, directory: Path) -> bytes:
        """What would be loaded."""
        return compiled("kind", [], [], self.build).read_bytes()

    def is_right(self, value: bytes) -> bool:
        """Whether it is what was built."""
        return value == self.good
