"""Tables of benchmarks: times, and ratios to what there was before."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def kernel_tables(document: Mapping[str, Any]) -> list[Any]:
    """One table for each shape: microseconds, and how many times as fast as float32 and bfloat16, if measured.

    Args:
        document: of :func:`sqs_pyro.runs.bench_kernels.bench_kernels`.
    """
    made = machine_line(document["machine"])
    tables: list[Any] = [f"{made}; medians of {document['rounds']} products, weights cold, methods in turn"]
    by_shape: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in document["rows"]:
        by_shape.setdefault((row["outputs"], row["inputs"]), []).append(row)
    for (outputs, inputs), rows in by_shape.items():
        counts = sorted({row["rows"] for row in rows})
        times = {(row["method"], row["rows"]): row["microseconds"] for row in rows}
        methods = dict.fromkeys(row["method"] for row in rows)
        bases = [name for name in ("float32", "bfloat16") if name in methods]
        table = Table(title=f"{outputs} x {inputs}: µs (times as fast as {' / '.join(bases)})")
        table.add_column("method")
        for count in counts:
            table.add_column(f"M = {count}", justify="right")
        for method in methods:
            ratios = [" / ".join(f"{times[base, m] / times[method, m]:.1f}" for base in bases) for m in counts]
            cells = [f"{_short(times[method, m])} ({ratio})" for m, ratio in zip(counts, ratios, strict=True)]
            table.add_row(method, *cells)
        tables.append(table)
    return tables + [f"{name} is missing: {why}" for name, why in document["missing"].items()]


def model_tables(document: Mapping[str, Any]) -> list[Any]:
    """One table for each network, input and batch: microseconds cold and warm, memory, and how outputs differ.

    Args:
        document: of :func:`sqs_pyro.runs.bench_model.bench_model`.
    """
    made, how = machine_line(document["machine"]), "torch.compile" if document["compiled"] else "eager"
    tables: list[Any] = [f"{made}, {how}; medians of {document['rounds']} calls, methods in turn"]
    for title, rows in model_groups(document).items():
        table = Table(title=f"{title}: µs (times as fast as float32)")
        for column in ("method", "cold", "warm", "MB held", "outputs differ by"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for method in dict.fromkeys(row["method"] for row in rows):
            cold, warm = (next(r for r in rows if r["method"] == method and r["cold"] == c) for c in (True, False))
            times = (f"{row['microseconds']:.0f} ({row['times_as_fast']:.2f})" for row in (cold, warm))
            table.add_row(method, *times, f"{cold['bytes'] / 1e6:.2f}", f"{cold['relative_error']:.1e}")
        tables.append(table)
    return tables + [f"{name} is missing: {why}" for name, why in document["missing"].items()]


def model_groups(document: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of :func:`~sqs_pyro.runs.bench_model.bench_model` by title: one for each network, input and batch."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in document["rows"]:
        shape = "x".join(map(str, row["input"]))
        unit = " token(s)" if len(row["input"]) == 1 else ""
        groups.setdefault(f"{row['network']}, {shape}{unit}, batch {row['batch']}", []).append(row)
    return groups


def _short(microseconds: float) -> str:
    return f"{microseconds:.0f}" if microseconds >= 100 else f"{microseconds:.1f}"


def machine_line(machine: Mapping[str, Any]) -> str:
    """The machine in a line."""
    if "gpu" in machine:
        versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "cuda", "triton"))
        return f"{machine['gpu']} ({machine['processors']} multiprocessors), {versions}"
    return (
        f"{machine['processor']} ({', '.join(machine['instructions'])}), {machine['threads']} thread(s), "
        f"torch {machine['torch']}"
    )
