"""What every command prints: at any width, in any encoding; one sentence for odd input; JSON and nothing else."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from sqs_pyro.cli import app

_PLAN = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_ABOUT = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 50}


@pytest.fixture(scope="module")
def commands(small_run, tmp_path_factory):
    """Commands that only read, by name, and one that writes."""
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    (checkpoint / "config.json").write_text(json.dumps({**_ABOUT, **_PLAN}))
    packed = small_run / "packed.safetensors"
    return {
        "inspect": ["inspect", packed],
        "runtime": ["inspect", packed, "--runtime"],
        "ensemble": ["inspect", small_run / "ensemble.safetensors"],
        "evaluate": ["evaluate", packed],
        "report": ["report", small_run],
        "plan": ["plan", checkpoint],
        "export": [
            "export",
            packed,
            "--format",
            "dense",
            "--overwrite",
            "--out",
            checkpoint / "plain.safetensors",
        ],
    }


def _sqs(arguments, *, width=80, encoding="utf-8"):
    runner = CliRunner(charset=encoding, env={"COLUMNS": str(width), "TERM": "xterm"})
    return runner.invoke(app, [str(argument) for argument in arguments])


_COMMANDS = pytest.mark.parametrize(
    "name", ["inspect", "runtime", "ensemble", "evaluate", "report", "plan", "export"]
)


def _numbers(text):
    return set(re.findall(r"\d+(?:[.,]\d+)+", text))  # those that could be broken


@_COMMANDS
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit(commands, name, width, encoding):
    result = _sqs(commands[name], width=width, encoding=encoding)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= width
    assert "object at 0x" not in result.output and "\\u" not in result.output
    whole = _sqs(commands[name], width=1000, encoding=encoding).stdout
    assert _numbers(whole) - _numbers(result.stdout) <= {"0.0", *_times(whole)}


def _times(text):
    return _numbers("".join(line for line in text.splitlines() if "difference" in line))


@_COMMANDS
def test_json_is_one_document(commands, name):
    result = _sqs([*commands[name], "--json"])
    assert result.exit_code == 0, result.output
    assert isinstance(json.loads(result.stdout), dict)
    assert result.stdout.startswith("{") and result.stdout.endswith("}\n")


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize(
    "command",
    [
        "",
        "compress",
        "evaluate",
        "uncertainty",
        "inspect",
        "export",
        "plan",
        "report",
        "compare",
        "sweep",
        "bench",
        "bench model",
    ],
)
def test_help_fits_and_says_all(command, width, monkeypatch):
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", width)
    result = _sqs([*command.split(), "--help"], width=width)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= width
    assert "kept ." not in result.stdout  # brackets in a text are no markup
    assert width < 80 or "…" not in result.stdout


@pytest.fixture(scope="module")
def odd(small_run, tmp_path_factory):
    """What is given in place of a file, a recipe or a directory."""
    place = tmp_path_factory.mktemp("odd")
    (place / "empty.safetensors").write_bytes(b"")
    (place / "text.txt").write_text("hello\n")
    (place / "junk.bin").write_bytes(bytes(range(256)) * 4)
    (place / "list.yaml").write_text("- 1\n")
    (place / "directory").mkdir()
    (place / "dangling").symlink_to("nowhere")
    names = ["missing", "empty.safetensors", "text.txt", "junk.bin", "list.yaml", "directory", "dangling"]
    return ["-", *(place / name for name in names)]


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", ...],
        ["inspect", ..., "--json"],
        ["evaluate", ...],
        ["uncertainty", ..., "--out", "figures"],
        ["report", ...],
        ["plan", ...],
        ["bench", "model", ...],
        ["bench", "kernels", "--out", ...],
        ["compare", ..., "--out", "study"],
        ["sweep", ..., "--out", "study"],
        ["compress", ..., "--out", "run"],
        ["export", ..., "--format", "dense", "--out", "plain.safetensors"],
    ],
    ids=lambda command: " ".join(word for word in command if word is not ...),
)
def test_odd_input_is_one_sentence(command, odd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in odd:
        result = _sqs([given if word is ... else word for word in command])
        assert result.exit_code == 2, (given, result.output)
        assert re.fullmatch(r"error: [^\n]+\.\n", result.stderr), (given, result.stderr)
        assert result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_run_directory_stands_for_the_file_in_it(small_run, tmp_path):
    for command in ("inspect", "evaluate"):
        found = [_sqs([command, each]).stdout for each in (small_run, small_run / "packed.safetensors")]
        assert found[0] == found[1] and "packed.safetensors" in found[0]
        refused = _sqs([command, tmp_path])
        assert refused.exit_code == 2 and "is a directory without a 'packed.safetensors'" in refused.stderr


def test_a_directory_of_data_where_none_is_used_is_refused(small_run, tmp_path):
    result = _sqs(["evaluate", small_run / "packed.safetensors", "--root", tmp_path])
    assert result.exit_code == 2 and "leave it out" in result.stderr


@pytest.mark.parametrize(
    ("export_format", "name"),
    [
        *(("dense", f"plain{suffix}") for suffix in (".pt", ".pth", ".onnx", ".pt2", ".json", ".txt")),
        ("onnx", "net.pt"),
        ("onnx", "net.safetensors"),
        ("onnx-qdq", "net.pt"),
        ("aoti", "net.pt2"),
        ("aoti", "net.safetensors"),
    ],
)
def test_an_export_is_what_its_name_says(small_run, tmp_path, export_format, name):
    out = tmp_path / name
    result = _sqs(["export", small_run / "packed.safetensors", "--format", export_format, "--out", out])
    assert result.exit_code == 2
    assert f"suffix {out.suffix}" in result.stderr and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_real_terminal_of_ascii(small_run):
    """A process on a pseudo-terminal of 80 columns: nothing is cut, no traceback."""
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "PYTHONIOENCODING": "ascii", "TERM": "xterm"}
    command = [sys.executable, "-m", "sqs_pyro", "report", str(small_run)]
    with subprocess.Popen(command, stdout=slave, stderr=slave, env=environment) as process:
        os.close(slave)
        shown = bytearray()
        while True:
            try:
                shown.extend(os.read(master, 4096))
            except OSError:
                break
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode("ascii"))
    assert process.returncode == 0 and "Traceback" not in text and "+-" in text
    assert max(len(line.rstrip("\r")) for line in text.split("\n")) <= 80
