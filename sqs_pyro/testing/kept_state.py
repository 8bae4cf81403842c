"""Contract kit: any state that is kept to go on from inherits these tests; it supplies ``call``."""

import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest

from sqs_pyro.compression.checkpoint import read_checkpoint
from sqs_pyro.errors import NetworkError, SQSError


class KeptStateContract:
    """Inherit, and say how the state is made and what another call of it is.

    Attributes:
        changes: by what differs, changes of the call, and what the refusal must say.
    """

    changes: ClassVar[dict[str, tuple[dict[str, Any], str]]]

    def call(self, path: str | Path, **changes: Any) -> Any:
        """Do the work with its state kept at ``path``; return what can be compared by ``==``."""
        raise NotImplementedError

    def files(self, path: Path) -> list[Path]:
        """Return the files that are kept."""
        return [path]

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
        """Return where the state of one call is kept, and what the call returned."""
        path = tmp_path_factory.mktemp("kept") / "kept"
        return path, cls().call(path)

    @pytest.fixture
    def kept(self, made: tuple[Path, Any], tmp_path: Path) -> tuple[Path, Any]:
        """Return a copy of it, to be damaged."""
        copied = tmp_path / "kept"
        (shutil.copytree if made[0].is_dir() else shutil.copyfile)(made[0], copied)
        return copied, made[1]

    def test_the_same_call_takes_it_by_text_too(self, kept: tuple[Path, Any]) -> None:
        path, result = kept
        # Taken, not made anew: the bytes stay, and nothing else appears beside them.
        before = {file: file.read_bytes() for file in self.files(path)}
        assert self.call(str(path)) == result
        assert {file: file.read_bytes() for file in self.files(path)} == before
        assert {each.name for each in path.parent.iterdir()} == {path.name}

    def test_what_another_call_kept_is_refused(self, kept: tuple[Path, Any]) -> None:
        path, result = kept
        for what, (change, sentence) in self.changes.items():
            with pytest.raises(SQSError, match=sentence) as found:
                self.call(path, **change)
            assert "\n" not in str(found.value) and len(str(found.value)) < 500, what
        assert self.call(path) == result

    def test_damage_anywhere_is_refused(self, kept: tuple[Path, Any]) -> None:
        path, _ = kept
        for file in self.files(path):
            whole = file.read_bytes()
            # One bit, another one each time, at some fifty places from the first byte to the last.
            places = [*range(0, len(whole), max(1, len(whole) // 50)), len(whole) - 1]
            damaged = [whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :] for i in places]
            for content in [*damaged, b"", whole[:-1], whole + b"\n"]:
                file.write_bytes(content)
                with pytest.raises(NetworkError, match=rf"{file.name}' cannot be read \(.*: delete it to start"):
                    read_checkpoint(file)
            with pytest.raises(SQSError, match=rf"{file.name}' cannot be read") as found:
                self.call(path)
            assert "\n" not in str(found.value)
            file.write_bytes(whole)
