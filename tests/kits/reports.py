"""One of every kind of report, with long names and large numbers, to be printed in tests."""

import functools
from collections.abc import Callable

import torch
from kits.study import metrics, result
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sqs_pyro import SQSELBO, CompressionResult, compress, elbo_report, size_report
from sqs_pyro.compression.blockwise.blocks import BlockwiseResult
from sqs_pyro.compression.blockwise.store import BlockRecord
from sqs_pyro.reporting import tables
from sqs_pyro.reporting.bench_tables import kernel_tables, model_tables
from sqs_pyro.reporting.study_summary import summarise
from sqs_pyro.reporting.study_tables import comparison_tables, sweep_tables

NAMES = [f"model.layers.{i}.self_attn.{part}_projection.weight" for i in (0, 10) for part in ("query", "value")]
_MACHINE = {"processor": "A processor of some vendor", "instructions": ["avx2", "avx512f"], "threads": 2}


@functools.cache
def compressed() -> CompressionResult:
    """A small network, compressed with a validation and findings."""
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("a_first_layer_with_a_long_name", nn.Linear(8, 16))
    net.add_module("between", nn.ReLU())
    net.add_module("last", nn.Linear(16, 3))
    data = DataLoader(TensorDataset(torch.randn(32, 8), torch.randint(0, 3, (32,))), batch_size=8)
    return compress(net, data, {"epochs": 1, "num_components": 4, "nonzero_rate": 0.01}, validation=data)


@functools.cache
def elbo():
    """Its bounds at two temperatures."""
    found = compressed()
    x, y = torch.randn(8, 8), torch.randint(0, 3, (8,))
    assert SQSELBO().loss(found.model, found.guide, x, y)
    return elbo_report(found.model, found.guide, x, y, temperatures=(0.1, 1.0), num_samples=2, num_particles=2)


def _size() -> dict:
    tensors = [
        {"name": name, "shape": [14336, 4096], "layout": "entropy", "bits": 0, "nonzeros": 29_360_128}
        | {"bytes": 12_582_912}
        for name in NAMES
    ]
    parts = {"codes": 50_331_648, "masks": 0, "codebooks": 0, "uncompressed": 1_048_576, "manifest": 4_096}
    return {
        "fp32_bytes": 939_524_096,
        "file_bytes": 51_384_832,
        "ratio": 18.284,
        "bits_per_weight": 1.7132,
        "nonzero_rate": 0.5,
        "tensors": tensors,
        "parts": {**parts, "header": 480, "padding": 32},
        "compressed_share": 0.9731,
        "largest_uncompressed": [{"name": NAMES[0], "shape": [4096, 4096], "numel": 16_777_216}],
    }


def _bench_rows(**about: object) -> list[dict]:
    methods = ["float32", "bfloat16", "int4, groups of 64 (aten)", "packed, 4 bits, float32"]
    return [{**about, "method": method, "microseconds": 1234.5 + i} for i, method in enumerate(methods)]


def _run() -> dict:
    measured = {"accuracy": 0.98765, "nll": 0.123456, "ece": 0.0123, "brier": 0.02, "entropy": 0.5}
    averaged = {**measured, "samples": 20, "temperature": 1.0}
    findings = [{"sentence": f"Posterior collapse in '{NAMES[1]}': only 0.12% of the gates are open."}]
    networks = {"baseline": measured, "compressed": measured, "posterior_mean": measured, "averaged": averaged}
    return {
        "metrics": {
            "name": "a run",
            "seed": 3,
            **networks,
            "size": _size(),
            "seconds": 1234.5,
            "findings": findings,
        },
        "bounds": elbo().to_dict(),
    }


def _study() -> dict:
    values = {"compression.nonzero_rate": 0.125, "compression.num_components": 16}
    results = [
        result("outlier-aware windows", seed, metrics(0.9 + seed / 100, 0.25, 123_456), values)
        for seed in range(3)
    ]
    results += [result("equal-mass windows", seed, metrics(0.8 + seed**2 / 100), values) for seed in range(3)]
    return summarise("a study", [*results, result("broken", 0, None, error="The loss is not finite at step 12.")])


def _perplexity() -> dict:
    text = {"perplexity": 12.345, "tokens": 16_384, "window": 512, "stride": 256}
    both = {"held out": text, "a file of text of another kind.txt": text}
    ratio = dict.fromkeys(both, 1.1234)
    about = {"name": "a language model", "seed": 0, "size": _size(), "seconds": 12.0}
    return {**about, "baseline": both, "compressed": both, "perplexity_ratio": ratio}


def _inspection() -> dict:
    weights = [
        {"name": name, "form": "two codes a byte", "packed_bytes": 29_360_128, "decoded_bytes": 0}
        | {"reason": "its rows are whole bytes, and this processor has the instructions"}
        for name in NAMES
    ]
    return {
        "file": "runs/a/packed.safetensors",
        "size": _size(),
        "runtime": {"machine": _MACHINE, "weights": weights},
    }


def _export() -> dict:
    said = dict.fromkeys(NAMES, "an operator of this library multiplies with it")
    return {
        "format": "dense",
        "dtype": "float32",
        "out": "somewhere/a_plain_checkpoint.safetensors",
        "bytes": {"a_plain_checkpoint.safetensors": 939_524_096},
        "packed_bytes": 51_384_832,
        "dense_bytes": 939_524_096,
        "max_difference": 1.2e-07,
        "example": "first test examples",
        "packed": {},
        "decoded": said,
    }


def _plan() -> dict:
    moments = {"coding a block": {"weights of the block": 123_456_789, "curvature of its inputs": 9_876_543_210}}
    about = {"checkpoint": "checkpoints/some-model", "parameters": 7_000_000_000, "tokens": 65_536}
    time = {"machine": "ranks of one thread", "seconds": 7200.0, "efficiency": 0.9, "parts": {"coding": 7200.0}}
    memory = {"moments": moments, "peak": 10_000_000_000, "device_memory": 24_000_000_000, "unfit": None}
    return {**about, "streamed": True, "ranks": 2, **memory, "time": time}


def model_bench() -> dict:
    rows = [
        {**row, "cold": cold, "times_as_fast": 1.25, "bytes": 123_456_789, "relative_error": 1.2e-03}
        for cold in (True, False)
        for row in _bench_rows(network="resnet20", input=[3, 32, 32], batch=1)
    ]
    about = {"machine": {**_MACHINE, "torch": "2.13.0"}, "rounds": 3, "compiled": True}
    return {**about, "missing": {"NF4, resnet20": "not installed"}, "rows": rows}


def kernel_bench() -> dict:
    rows = [row for m in (1, 4, 16, 64) for row in _bench_rows(outputs=4096, inputs=4096, rows=m)]
    about = {"machine": {**_MACHINE, "torch": "2.13.0"}, "rounds": 3}
    return {**about, "missing": {"NF4, 4096 x 4096": "not installed"}, "rows": rows}


def _blockwise() -> BlockwiseResult:
    records = [BlockRecord(block, 3.2, 0.0123, {}, 12.5) for block in range(2)]
    return BlockwiseResult(compressed().network, records, 25.0)


#: Makers of everything that prints itself, by name.
REPORTS: dict[str, Callable[[], object]] = {
    "ElboReport": elbo,
    "ElboReport.table": lambda: elbo().table(),
    "SizeReport": lambda: size_report(compressed().network),
    "CompressionResult": compressed,
    "BlockwiseResult": _blockwise,
    "run": lambda: tables.run_tables(_run()["metrics"]),
    "language model": lambda: tables.run_tables(_perplexity()),
    "report": lambda: tables.report_tables(_run()),
    "evaluation": lambda: tables.evaluation_tables(
        {**_run()["metrics"]["compressed"], "file": "a.safetensors", "num_examples": 10_000, "size": _size()}
    ),
    "inspection": lambda: tables.inspection_tables(_inspection()),
    "export": lambda: tables.export_tables(_export()),
    "plan": lambda: tables.plan_tables(_plan()),
    "bench kernels": lambda: kernel_tables(kernel_bench()),
    "bench model": lambda: model_tables(model_bench()),
    "compare": lambda: comparison_tables(_study()),
    "sweep": lambda: sweep_tables(_study()),
}
