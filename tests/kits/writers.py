"""Writers under test: everything in the library that makes a file or a directory, called in one way."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sqs_pyro import save
from sqs_pyro.compression.checkpoint import write_checkpoint
from sqs_pyro.exporting.dense import export_dense
from sqs_pyro.kernels import packed_network
from sqs_pyro.packing import CodedTensor
from sqs_pyro.reporting.study_summary import write_csv as write_study
from sqs_pyro.reporting.style import new_figure, write_figure
from sqs_pyro.runs.directory import METRICS, run_directory, write_csv, write_json


def packed() -> nn.Module:
    """A packed network of one layer."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(4, (64, 32), generator=generator).to(torch.uint8)
    coded = CodedTensor(codes, torch.ones(64, 32, dtype=torch.bool), torch.tensor([[-1.0, 0.5, 1.0, 2.0]]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return packed_network(nn.Sequential(nn.Linear(32, 64)), {"0.weight": coded})


def _run(path: Path) -> None:
    with run_directory(path, "name: small\n", overwrite=True) as directory:
        write_json(directory / METRICS, {"a": 1})


@dataclass(frozen=True)
class Writer:
    """One of them.

    Attributes:
        write: what makes the output at a path.
        suffix: that the name needs.
        directory: whether it is one.
    """

    write: Callable[[Path], object]
    suffix: str = ""
    directory: bool = False


_POINT = {"variant": "a", "point": "", "values": {}, "seeds": [0], "by_seed": {"accuracy": [0.5]}}

WRITERS = {
    "packed file": Writer(lambda path: save(packed(), path)),
    "dense export": Writer(lambda path: export_dense(packed(), path), ".safetensors"),
    "checkpoint": Writer(lambda path: write_checkpoint(path, {"a": torch.arange(2000.0), "b": [1]}), ".pt"),
    "json": Writer(lambda path: write_json(path, {"a": list(range(2000))}), ".json"),
    "csv": Writer(lambda path: write_csv(path, [{"a": i} for i in range(2000)]), ".csv"),
    "study csv": Writer(lambda path: write_study(path, {"points": [_POINT] * 500}), ".csv"),
    "picture": Writer(lambda path: write_figure(new_figure(1, 1), path), ".png"),
    "run directory": Writer(_run, directory=True),
}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let every file end at ``size`` bytes, as on a full disk; Python has the system say so, and not kill."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content(path: Path) -> dict[str, bytes]:
    """Bytes of every file below a path, by name."""
    return {str(each.relative_to(path)): each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file()}
