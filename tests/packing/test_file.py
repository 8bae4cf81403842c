"""The packed file: what goes in comes out, the bytes are always the same, and no damage passes."""

import json
import os
import struct
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sqs_pyro.errors import NetworkError, OutputError, PackedFileError
from sqs_pyro.packing import PackedContents, pack_tensor, read_packed, write_packed
from sqs_pyro.packing.file import _header, file_image, opened_file
from sqs_pyro.packing.manifest import MAX_MANIFEST_BYTES
from sqs_pyro.testing.layouts import random_coded

METADATA = {"network": {"name": "tiny", "options": {"width": 3}}, "recipe": {"τ": 0.1}, "metrics": {"a": [1]}}


@pytest.fixture
def tensors():
    return {
        "conv.weight": pack_tensor(random_coded((8, 3, 3, 3), 4), "bitmap"),
        "fc.weight": pack_tensor(random_coded((10, 24), 16, groups=10, nonzero_rate=1.0), "dense"),
        "deep.er.weight": pack_tensor(random_coded((20, 24), 5, exact_half=False), "entropy"),
        "dead.weight": pack_tensor(random_coded((4, 4), 5, nonzero_rate=0.0)),
    }


@pytest.fixture
def leftovers():
    return {
        "bn1.weight": torch.randn(8).half(),
        "bn1.running_var": torch.ones(8),
        "bn1.num_batches_tracked": torch.tensor(7),
        "bn2.weight": torch.randn(5).half(),
        "bn2.running_var": torch.ones(5),
        "bn2.num_batches_tracked": torch.tensor(7),
        "scale": torch.randn(3, 2, dtype=torch.float64),
        "brain": torch.randn(3).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "negative_zero": torch.tensor([0.0, -0.0]),
        "nan": torch.full((3,), float("nan")),
        "empty": torch.empty(0, 3),
        "minus_infinity": torch.tensor(float("-inf")),
        "transposed": torch.arange(6.0).view(2, 3).t(),
    }


@pytest.fixture
def packed_file(tensors, leftovers, tmp_path):
    write_packed(tmp_path / "net.safetensors", PackedContents(tensors, leftovers, METADATA))
    return tmp_path / "net.safetensors"


def parts(packed):
    return {name: part.tolist() for name, part in packed.parts.items()}


def test_what_goes_in_comes_out(packed_file, tensors, leftovers):
    contents = read_packed(packed_file)
    assert contents.metadata == METADATA
    assert contents.format_version == 1
    assert list(contents.tensors) == list(tensors)
    for name, packed in tensors.items():
        again = contents.tensors[name]
        assert {**vars(again), "parts": parts(again)} == {**vars(packed), "parts": parts(packed)}
    assert set(contents.leftovers) == set(leftovers)
    for name, value in leftovers.items():
        again = contents.leftovers[name]
        assert again.dtype == value.dtype
        torch.testing.assert_close(again, value, rtol=0, atol=0, equal_nan=True)
    assert contents.leftovers["negative_zero"].signbit().tolist() == [False, True]


def test_nothing_but_the_network(tmp_path):
    write_packed(tmp_path / "empty", PackedContents({}, {}, {}))
    contents = read_packed(tmp_path / "empty")
    assert (contents.tensors, contents.leftovers, contents.metadata) == ({}, {}, {})


def test_safetensors_reads_it(packed_file):
    with safe_open(packed_file, "pt") as opened:
        assert sorted(opened.keys()) == ["data", "manifest"]
        assert opened.metadata()["format"] == "sqs-pyro"
        assert opened.metadata()["format_version"] == "1"
        manifest = json.loads(zlib.decompress(opened.get_tensor("manifest").numpy().tobytes()))
    assert manifest["tensors"]["name"] == ["conv.weight", "fc.weight", "deep.er.weight", "dead.weight"]
    assert manifest["metadata"] == METADATA


def test_same_content_same_bytes(packed_file, tensors, leftovers, tmp_path):
    write_packed(tmp_path / "again", PackedContents(tensors, leftovers, METADATA))
    assert (tmp_path / "again").read_bytes() == packed_file.read_bytes()
    contents = read_packed(packed_file)
    write_packed(tmp_path / "copy", contents)
    first = (tmp_path / "copy").read_bytes()
    contents = read_packed(tmp_path / "copy")
    write_packed(tmp_path / "copy", contents)
    assert (tmp_path / "copy").read_bytes() == first


def test_constants_cost_no_data(tensors):
    leftovers = {"bn.running_var": torch.full((4096,), 0.3), "bn.count": torch.tensor(5)}
    image = file_image(PackedContents({}, leftovers, {}))
    assert image.data == []


def test_one_altered_byte_anywhere(packed_file):
    content = packed_file.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position * 5) % 8
        packed_file.write_bytes(damaged)
        with pytest.raises(PackedFileError, match=r"cannot be used\. .*\.$"):
            read_packed(packed_file)


def test_truncated_anywhere(packed_file):
    content = packed_file.read_bytes()
    for length in [*range(0, len(content), 11), len(content) - 1]:
        packed_file.write_bytes(content[:length])
        with pytest.raises(PackedFileError):
            read_packed(packed_file)


def test_truncated_file_says_so(packed_file):
    content = packed_file.read_bytes()
    packed_file.write_bytes(content[:-10])
    with pytest.raises(PackedFileError, match=f"truncated: {len(content) - 10} bytes instead of {len(content)}"):
        read_packed(packed_file)
    packed_file.write_bytes(content + b"\0")
    with pytest.raises(PackedFileError, match="followed by other bytes"):
        read_packed(packed_file)


def test_damage_is_reported_with_the_tensor(packed_file, tensors, leftovers):
    content = packed_file.read_bytes()
    image = file_image(PackedContents(tensors, leftovers, METADATA))
    position = len(image.header) + len(image.manifest)
    for name, packed in tensors.items():
        damaged = bytearray(content)
        damaged[position] ^= 1
        packed_file.write_bytes(damaged)
        with pytest.raises(PackedFileError, match=f"Tensor '{name}' cannot be read: its bytes are damaged"):
            read_packed(packed_file)
        position += packed.num_bytes
    damaged = bytearray(content)
    damaged[position] ^= 1
    packed_file.write_bytes(damaged)
    with pytest.raises(PackedFileError, match="tensors of module 'bn1' are damaged"):
        read_packed(packed_file)


def test_newer_version(packed_file):
    content = packed_file.read_bytes().replace(b'"format_version":"1"', b'"format_version":"7"')
    packed_file.write_bytes(content)
    with pytest.raises(PackedFileError, match="format version 7, this program reads up to 6: update sqs-pyro"):
        read_packed(packed_file)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "only 0 bytes"),
        (b"PK\x03\x04" + bytes(100), "not a safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "not that of a safetensors file"),
        (struct.pack("<Q", 2) + b"{}", "not one of format 'sqs-pyro'"),
        (struct.pack("<Q", 4000) + b"[" * 4000, "no JSON"),
        (b"\xff" * 64, "not a safetensors file"),
    ],
)
def test_other_files(tmp_path, content, sentence):
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(PackedFileError, match=sentence):
        read_packed(path)


def test_a_foreign_safetensors_file(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.randn(3)}, tmp_path / "other")
    with pytest.raises(PackedFileError, match="not one of format 'sqs-pyro'"):
        read_packed(tmp_path / "other")


@pytest.fixture
def drawn(tensors):
    """Tensors that hold three draws, in each of the layouts."""
    return {
        f"{layout}.weight": pack_tensor(random_coded((6, 5, 3), 4, groups=2), layout)
        for layout in ("bitmap", "dense", "entropy", "conditional")
    }


def test_draws_are_a_file_of_version_2(drawn, leftovers, tmp_path):
    write_packed(tmp_path / "draws", PackedContents(drawn, leftovers, METADATA, draws=3))
    contents = read_packed(tmp_path / "draws")
    assert (contents.draws, contents.format_version) == (3, 2)
    for name, packed in drawn.items():
        assert parts(contents.tensors[name]) == parts(packed)
    write_packed(tmp_path / "single", PackedContents(drawn, leftovers, METADATA))
    assert (read_packed(tmp_path / "single").draws, read_packed(tmp_path / "single").format_version) == (None, 1)


@pytest.mark.parametrize(("scales", "version"), [(True, 3), (5, 6)])
def test_scales_are_a_file_of_version_3_and_of_parts_6(scales, version, tensors, leftovers, tmp_path):
    scaled = {"scaled.weight": pack_tensor(random_coded((6, 5), 4, scales=scales))}
    for draws, contents in ((None, {**tensors, **scaled}), (5, scaled)):
        write_packed(tmp_path / "file", PackedContents(contents, leftovers, METADATA, draws))
        read = read_packed(tmp_path / "file")
        assert (read.draws, read.format_version) == (draws, version)
        assert parts(read.tensors["scaled.weight"]) == parts(scaled["scaled.weight"])


def test_one_altered_byte_of_draws_anywhere(drawn, tmp_path):
    path = tmp_path / "draws"
    write_packed(path, PackedContents(drawn, {}, METADATA, draws=3))
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position * 3) % 8
        path.write_bytes(damaged)
        with pytest.raises(PackedFileError):
            read_packed(path)


@pytest.mark.parametrize(
    ("version", "draws", "sentence"),
    [
        ("2", None, r"format version is 2, but its content \(draws: None\) is of version 1"),
        ("1", 3, r"format version is 1, but its content \(draws: 3\) is of version 2"),
        ("2", 4, r"Tensor 'bitmap.weight' of shape \[6, 5, 3\] does not hold the file's 4 draws"),
        ("2", 0, "manifest is wrong at 'draws'"),
        ("2", "3", "manifest is wrong at 'draws'"),
        ("0", None, "format version 0, which has never existed"),
    ],
)
def test_draws_that_contradict_the_file(drawn, tmp_path, version, draws, sentence):
    change = (lambda manifest: None) if draws is None else put("draws", draws)
    forge(tmp_path / "forged", drawn, {}, change, version)
    with pytest.raises(PackedFileError, match=sentence):
        read_packed(tmp_path / "forged")


def forge(path: Path, tensors, leftovers, change, version="1") -> None:
    """Write a file whose manifest is changed and whose checksums fit: what only validation can refuse."""
    import hashlib

    image = file_image(PackedContents(tensors, leftovers, METADATA))
    manifest = json.loads(zlib.decompress(image.manifest))
    changed = change(manifest)
    text = changed if isinstance(changed, bytes) else zlib.compress(json.dumps(manifest).encode())
    data = b"".join(part.numpy().tobytes() for part in image.data)
    digest = hashlib.sha256(text + data).hexdigest()
    path.write_bytes(_header(version, digest, len(text), len(data)) + text + data)


def put(*keys):
    """Return a change of the manifest: the last of the keys becomes the value at the others."""
    *path, last, value = keys

    def change(manifest):
        for key in path:
            manifest = manifest[key]
        manifest[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (put("tensors", "shape", 0, [8, 3, 3, 4]), "Tensor 'conv.weight' cannot be read: part 'mask' has"),
        (put("tensors", "shape", 0, [-8, 3, 3, 3]), "manifest is wrong at 'tensors.shape.0.0'"),
        (put("tensors", "shape", 0, [2**62]), "manifest is wrong at 'tensors.shape.0.0'"),
        (put("tensors", "layout", 0, "pickle"), "Tensor 'conv.weight' cannot be read: layout 'pickle' is unknown"),
        (put("tensors", "name", 1, "conv.weight"), "Tensor 'conv.weight' is described twice"),
        (put("tensors", "name", ["a"]), "columns of tensors differ in length"),
        (put("tensors", "nonzeros", 0, 10**6), "Tensor 'conv.weight' cannot be read: 1000000 non-zeros"),
        (put("tensors", "components", 0, 300), "Tensor 'conv.weight' cannot be read"),
        (put("tensors", "groups", 0, 7), "Tensor 'conv.weight' cannot be read: 7 codebooks"),
        (put("tensors", "codebook", 0, "int8"), "manifest is wrong at 'tensors.codebook.0'"),
        (put("tensors", "lengths", 0, {"codebook": 10**9}), "Tensor 'conv.weight' .* the data ends before it"),
        (put("tensors", "crc32", 0, 1), "Tensor 'conv.weight' cannot be read: its bytes are damaged"),
        (put("tensors", "surprise", []), "manifest is wrong at 'tensors.surprise'"),
        (put("leftovers", 0, "modules", ["bn1", "bn1"]), "tensor 'bn1.weight' is described twice"),
        (put("leftovers", 0, "shapes", 0, 0, [9]), "module 'bn1' are damaged|cut off|bytes of uncompressed"),
        (put("leftovers", 0, "shapes", [[[8]], [[5]]]), "more or fewer shapes"),
        (put("leftovers", 0, "fields", 0, "dtype", "object"), "manifest is wrong at"),
        (put("leftovers", 0, "fields", 1, "constant", "00"), "constant '00', which is no torch.float32"),
        (put("leftovers", 0, "crc32", 0, 5), "module 'bn1' are damaged"),
        (put("metadata", []), "manifest is wrong at 'metadata'"),
        (lambda manifest: b"no zlib", "cannot be decompressed"),
        (lambda manifest: zlib.compress(b"{}") + b"tail", "followed by other bytes"),
        (lambda manifest: zlib.compress(b"[1"), "manifest is wrong"),
    ],
)
def test_forged_manifests(tmp_path, tensors, leftovers, change, sentence):
    forge(tmp_path / "forged", tensors, leftovers, change)
    with pytest.raises(PackedFileError, match=sentence):
        read_packed(tmp_path / "forged")


def test_decompression_bomb(tmp_path, tensors):
    squeeze = zlib.compressobj()
    block = bytes(1 << 24)
    bomb = b"".join(squeeze.compress(block) for _ in range(MAX_MANIFEST_BYTES // len(block) + 1)) + squeeze.flush()
    forge(tmp_path / "bomb", tensors, {}, lambda manifest: bomb)
    with pytest.raises(PackedFileError, match=r"larger than \d+ bytes"):
        read_packed(tmp_path / "bomb")


def test_a_failed_write_leaves_everything_as_it_was(packed_file, tensors, leftovers, monkeypatch):
    before = packed_file.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OutputError, match=r"No space left on device.*: make room on the disk"):
        write_packed(packed_file, PackedContents(tensors, {}, {}))
    assert packed_file.read_bytes() == before
    assert [p.name for p in packed_file.parent.iterdir()] == [packed_file.name]


def test_what_cannot_be_written(tmp_path, tensors):
    path = tmp_path / "net"
    with pytest.raises(NetworkError, match="both compressed and uncompressed"):
        write_packed(path, PackedContents(tensors, {"fc.weight": torch.ones(3)}, {}))
    with pytest.raises(NetworkError, match="plain JSON"):
        write_packed(path, PackedContents(tensors, {}, {"metrics": {"loss": float("nan")}}))
    with pytest.raises(NetworkError, match=r"'z' is torch\.complex128"):
        write_packed(path, PackedContents(tensors, {"z": torch.zeros(2, dtype=torch.complex128)}, {}))
    assert list(tmp_path.iterdir()) == []


def test_an_uncompressed_manifest_stays_small():
    """At 32x a ResNet-20 has about 33 KB: its description must stay within a few per cent of it."""
    names = [f"stage{s}.{b}.conv{c}.weight" for s in (1, 2, 3) for b in (0, 1, 2) for c in (1, 2)]
    tensors = {name: pack_tensor(random_coded((32, 32, 3, 3), 8, nonzero_rate=0.2)) for name in names}
    leftovers = {
        f"{name.replace('conv', 'bn').removesuffix('weight')}{field}": torch.randn(32).half()
        for name in names
        for field in ("weight", "bias", "running_mean", "running_var")
    }
    image = file_image(PackedContents(tensors, leftovers, {"network": {"name": "resnet20", "options": {}}}))
    assert len(image.manifest) < 1000
    assert len(image.header) < 300


def test_an_open_file_is_read_tensor_by_tensor_and_checked_again(packed_file, tensors, leftovers):
    with opened_file(packed_file) as (contents, envelope):
        assert envelope.total == packed_file.stat().st_size
        assert all(part.is_meta for packed in contents.tensors.values() for part in packed.parts.values())
        assert {name: parts(packed.in_memory()) for name, packed in contents.tensors.items()} == {
            name: parts(packed) for name, packed in tensors.items()
        }
        assert torch.equal(contents.leftovers["bn1.weight"], leftovers["bn1.weight"])


def test_an_open_file_that_changes_is_noticed(tensors, tmp_path):
    path = tmp_path / "net"
    # Data behind the tensors, longer than what a stream has read ahead of them.
    write_packed(path, PackedContents(tensors, {"long": torch.randn(40_000)}, {}))
    with opened_file(path) as (contents, envelope):
        first = envelope.total - envelope.data_bytes  # where the first tensor begins
        content = path.read_bytes()
        path.write_bytes(content[:first] + bytes([content[first] ^ 1]) + content[first + 1 :])
        with pytest.raises(PackedFileError, match="checksum does not fit"):
            contents.tensors["conv.weight"].in_memory()
    with pytest.raises(PackedFileError, match=r"'conv.weight' cannot be read"), opened_file(path):
        raise AssertionError("a damaged file was opened")


def test_adaptive_streams_are_a_file_of_version_5(tensors, leftovers, tmp_path):
    coded = {name: pack_tensor(packed.unpack(), "adaptive") for name, packed in tensors.items()}
    write_packed(tmp_path / "net.safetensors", PackedContents(coded, leftovers, {}))
    assert b'"format_version":"5"' in (tmp_path / "net.safetensors").read_bytes()[:400]
    found = read_packed(tmp_path / "net.safetensors").tensors
    assert all(
        torch.equal(found[name].unpack().dense(), packed.unpack().dense()) for name, packed in coded.items()
    )


def test_manifests_of_version_5_share_their_words(leftovers, tmp_path):
    coded = random_coded((6, 5, 3, 3), 4)
    sizes = {}
    for layout in ("entropy", "adaptive"):
        contents = PackedContents({"conv1.weight": pack_tensor(coded, layout)}, leftovers, METADATA)
        write_packed(tmp_path / layout, contents)
        assert read_packed(tmp_path / layout).metadata == METADATA
        sizes[layout] = len(file_image(contents).manifest)
    assert sizes["adaptive"] < 0.8 * sizes["entropy"]
    with pytest.raises(zlib.error, match="Error 2"):  # it needs a dictionary
        zlib.decompress(file_image(contents).manifest)
