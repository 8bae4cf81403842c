"""Whole or not at all: the same promises of every writer, and leftovers of killed processes."""

import os
import signal
import stat
from pathlib import Path

import pytest
import torch
from kits import forks
from kits.writers import WRITERS, content, file_size_limit
from safetensors.torch import save_file

from sqs_pyro.atomic import appearing, check_place, clean, merging, resolved, write_text
from sqs_pyro.errors import OutputError

every_writer = pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)


@every_writer
def test_a_disk_that_fills_at_any_moment_leaves_what_was_there(writer, tmp_path):
    path = tmp_path / f"net{writer.suffix}"
    writer.write(path)
    whole = content(tmp_path)
    largest = max(len(data) for data in whole.values())
    for size in sorted({0, 1, largest // 3, largest - 1}):
        with file_size_limit(size), pytest.raises(OutputError, match=r"File too large.*: make room") as found:
            writer.write(path)
        assert "\n" not in str(found.value) and ".sqs-" not in str(found.value)
        assert content(tmp_path) == whole
    writer.write(path)
    assert content(tmp_path) == whole


@every_writer
@pytest.mark.parametrize("place", ["/proc/self/net", "/dev/null/net"])
def test_a_place_that_takes_no_files(writer, place):
    with pytest.raises(OutputError, match=r"'/(proc|dev)/.*' cannot be (written|made)"):
        writer.write(Path(f"{place}{writer.suffix}"))


def test_the_root_of_the_file_system_is_no_place():
    with pytest.raises(OutputError, match=r"'/' cannot be written \(Is a directory\): choose another path"):
        check_place("/")


def test_a_writer_within_a_place_speaks_of_the_place_to_come(tmp_path):
    with file_size_limit(1), pytest.raises(OutputError) as found, appearing(tmp_path / "net") as made:
        save_file({"weight": torch.ones(9)}, made)
    assert str(found.value).startswith(f"'{tmp_path}/net' cannot be written")
    assert str(found.value).endswith("make room, or raise the limit on the size of files.")
    with file_size_limit(1), pytest.raises(OutputError) as found, appearing(tmp_path / "net") as made:
        write_text(made, "two")
    assert str(found.value).startswith(f"'{tmp_path}/net' cannot be written")


@every_writer
def test_names_of_any_length(writer, tmp_path):
    with pytest.raises(OutputError, match=r"File name too long.*: choose a shorter name"):
        writer.write(tmp_path / f"{'n' * 300}{writer.suffix}")
    assert content(tmp_path) == {}
    writer.write(tmp_path / f"{'n' * 240}{writer.suffix}")
    assert [path.name for path in tmp_path.iterdir()] == [f"{'n' * 240}{writer.suffix}"]


@every_writer
def test_a_link_stays_and_its_target_is_written(writer, tmp_path):
    (tmp_path / "far").mkdir()
    link, target = tmp_path / f"link{writer.suffix}", tmp_path / "far" / f"net{writer.suffix}"
    link.symlink_to(target)
    if writer.directory:
        writer.write(resolved(link))  # as every run does first
    else:
        writer.write(link)
    assert link.is_symlink() and target.exists() and not target.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"far", link.name}


@every_writer
def test_modes_are_those_of_the_umask(writer, tmp_path):
    before = os.umask(0o027)
    try:
        writer.write(tmp_path / f"net{writer.suffix}")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_a_circle_of_links(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OutputError, match=r"symbolic links.*: correct the symbolic link"):
        write_text(tmp_path / "a", "")
    with pytest.raises(OutputError, match="is no path"):
        write_text("a\0b", "")


def test_an_error_of_the_writer_leaves_nothing(tmp_path):
    write_text(tmp_path / "net", "old")
    with pytest.raises(RuntimeError), appearing(tmp_path / "net") as made:
        made.write_text("half")
        raise RuntimeError
    assert content(tmp_path) == {"net": b"old"}


def test_a_place_is_checked_without_a_trace(tmp_path):
    check_place(tmp_path / "new" / "net")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot be made, because '.*/file' is a file"):
        check_place(tmp_path / "file" / "net")


_KILLED = """
import os, signal, sys
from sqs_pyro.atomic import appearing
with appearing(sys.argv[1]) as made:
    made.mkdir() if len(sys.argv) > 2 else made.write_text("half")
    if len(sys.argv) > 2:
        os.replace(sys.argv[1], made.parent / "replaced")  # a directory steps aside before it is replaced
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("directory", [False, True])
def test_what_a_killed_process_left_is_removed_and_nothing_else(directory, tmp_path):
    target = tmp_path / "net"
    if directory:
        target.mkdir()
        (target / "old").touch()
    process = forks.run(_KILLED, target, *(["dir"] if directory else []))
    assert process.returncode == -signal.SIGKILL
    assert any(path.name.startswith(".sqs-") for path in tmp_path.iterdir())
    with appearing(tmp_path / "other") as made:
        made.write_text("other")
        clean(tmp_path / "other")  # what a living call works in is no leftover
        assert made.exists()
    clean(target)
    assert content(tmp_path) == {"other": b"other"} | ({"net/old": b""} if directory else {})


def test_files_are_merged_into_a_directory_and_stale_ones_go(tmp_path):
    for name in ("model-1.safetensors", "notes.txt", "config.json"):
        (tmp_path / name).write_text("old")
    with merging(tmp_path, last="config.json", stale=("model*.safetensors",)) as made:
        for name in ("model.safetensors", "config.json"):
            (made / name).write_text("new")
    assert content(tmp_path) == {"config.json": b"new", "model.safetensors": b"new", "notes.txt": b"old"}
