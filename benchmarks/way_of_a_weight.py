"""What packing costs: compress of the demo's network, and pack, save, size and load of one with 135M weights.

``--before`` names a checkout of an earlier version, which is measured in turn with this one, in processes of their
own: before, after, before, ... Medians of the rounds are the result, of seconds on the clock and of seconds of the
processor, which other programs disturb less. The network of 135M weights has the shapes of
SmolLM2-135M and random codes. Packed files must be the same before and after, bit for bit. Writes
``way_of_a_weight.json`` beside this file.

    python benchmarks/way_of_a_weight.py --before DIRECTORY [--rounds 5] [--epochs 30]
"""

import argparse
import gc
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from figures import write_figures
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sqs_pyro  # before transformers, which needs torchvision's operators to be there
from sqs_pyro import compress, load, save, size_report
from sqs_pyro.kernels import packed_network
from sqs_pyro.packing import CodedTensor

ROOT = Path(__file__).parent.parent
TASKS = ("compress", "transformer")


@contextmanager
def measured(figures: dict[str, Any], name: str) -> Iterator[None]:
    """Note the seconds of a block, and the memory that it had at most, in MB."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the highest memory so far
    clock, processor = time.perf_counter(), time.process_time()
    yield
    figures[f"{name}_cpu_seconds"] = time.process_time() - processor
    figures[f"{name}_seconds"] = time.perf_counter() - clock
    figures[f"{name}_peak_mb"] = memory("VmHWM")


def memory(key: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith(key)).split()[1]) / 1024


def digits() -> tuple[nn.Module, DataLoader[Any], DataLoader[Any]]:
    """The demo's network, trained a little, and minibatches for training and validation."""
    from sklearn import datasets

    found = datasets.load_digits()
    images, labels = torch.from_numpy(found.images).float()[:, None] / 16, torch.from_numpy(found.target).long()
    train, validation = (TensorDataset(images[part], labels[part]) for part in (slice(1152), slice(1152, 1297)))
    batches = DataLoader(train, 64, shuffle=True, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net, batches, DataLoader(validation, 64)


def measure_compress(epochs: int) -> dict[str, Any]:
    """Compress by the demo's recipe."""
    recipe = yaml.safe_load((ROOT / "recipes/digits.yaml").read_text(encoding="utf-8"))["compression"]
    net, train, validation = digits()
    figures: dict[str, Any] = {}
    with measured(figures, "compress"):
        result = compress(net, train, {**recipe, "epochs": epochs}, validation=validation)
    with tempfile.TemporaryDirectory() as directory:
        figures["sha256"] = saved(result.network, Path(directory) / "packed.safetensors")
    return figures


def random_coded(shape: tuple[int, ...], random: torch.Generator) -> CodedTensor:
    """Fifteen values of normal weights, a fifth of which is zero."""
    weight = torch.randn(shape, generator=random)
    mask = weight.abs() > 0.25
    codes = ((weight + 3) * 2.5).floor_().clamp_(0, 14).to(torch.uint8) * mask
    return CodedTensor(codes, mask, ((torch.arange(15) + 0.3) / 64 - 0.11).half().float()[None])


def language_model() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def measure_transformer() -> dict[str, Any]:
    """Pack, save, count and load a network of 135M weights."""
    torch.manual_seed(0)
    net, random = language_model(), torch.Generator().manual_seed(0)
    coded = {name: random_coded(tuple(p.shape), random) for name, p in net.named_parameters() if p.dim() > 1}
    figures: dict[str, Any] = {"weights": sum(value.codes.numel() for value in coded.values())}
    with measured(figures, "pack"):
        packed = packed_network(net, coded)
    with torch.device("meta"):
        empty = language_model()
    empty.model.rotary_emb = net.model.rotary_emb  # type: ignore[union-attr]  # its buffers are in no file
    del net, coded
    gc.collect()
    figures["run_time_bytes"] = sum(buffer.nbytes for name, buffer in packed.named_buffers() if "packed_" in name)
    figures["held_mb"] = memory("VmRSS")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "packed.safetensors"
        with measured(figures, "save"):
            save(packed, path)
        figures["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        figures["held_after_save_mb"] = memory("VmRSS")
        with measured(figures, "size"):
            figures["file_bytes"] = size_report(packed).total
        assert figures["file_bytes"] == path.stat().st_size
        del packed
        with measured(figures, "load"):
            load(path, empty)
    return figures


def saved(packed: nn.Module, path: Path) -> str:
    save(packed, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def in_process(tree: Path, task: str, epochs: int) -> dict[str, Any]:
    """Measure one task with one tree, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one", task, "--epochs", str(epochs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert Path(figures.pop("tree")).resolve() == tree.resolve()
    return figures


def summary(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians before and after, and their ratio; whatever is not measured must be the same in all rounds."""
    every = [round_[tree] for round_ in rounds for tree in ("before", "after")]
    same = {key: value for key, value in every[0].items() if not key.endswith(("seconds", "_mb"))}
    for figures in every:
        assert {key: figures[key] for key in same} == same, "before and after differ in what they make"
    medians: dict[str, Any] = {}
    for key in every[0]:
        if key not in same:
            before, after = (statistics.median(each[tree][key] for each in rounds) for tree in ("before", "after"))
            medians[key] = {"before": before, "after": after, "ratio": before / after}
    return {**same, **medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of the version to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30, help="of compress; the demo's are 30")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--one", choices=TASKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(1)
        found = measure_transformer() if options.one == "transformer" else measure_compress(options.epochs)
        print(json.dumps({**found, "tree": str(Path(sqs_pyro.__file__).parent.parent)}))
        return
    if options.before is None:
        parser.error("--before is needed")
    out = Path(__file__).with_suffix(".json")
    result = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    result |= {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
    for task in options.tasks:
        trees = {"before": options.before, "after": ROOT}
        rounds = []
        for _ in range(options.rounds):
            rounds.append({name: in_process(tree, task, options.epochs) for name, tree in trees.items()})
        own = {"epochs": options.epochs} if task == "compress" else {}
        result[task] = {"rounds": options.rounds, **own, **summary(rounds)}
        print(json.dumps(result[task], indent=2))
    write_figures(out, {key: value for key, value in result.items() if key != "command"})


if __name__ == "__main__":
    main()
