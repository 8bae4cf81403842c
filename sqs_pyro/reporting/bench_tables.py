"""Tables of benchmarks: times, and ratios to what there was before."""

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType

from sqs_pyro.reporting.fitted import FittedTable, Line
from sqs_pyro.reporting.printed import Report


def kernel_tables(document: Mapping[str, Any]) -> Report:
    """Return a table a shape: microseconds, and how many times as fast as float32 and bfloat16, if measured.

    Args:
        document: of :func:`sqs_pyro.bench.kernels.bench_kernels`.
    """
    made = machine_line(document["machine"])
    how = f"{made}; medians of {document['rounds']} products, weights cold, methods in turn"
    tables: list[RenderableType] = [Line(how)]
    by_shape: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in document["rows"]:
        by_shape.setdefault((row["outputs"], row["inputs"]), []).append(row)
    for (outputs, inputs), rows in by_shape.items():
        counts = sorted({row["rows"] for row in rows})
        times = {(row["method"], row["rows"]): row["microseconds"] for row in rows}
        methods = dict.fromkeys(row["method"] for row in rows)
        # GPUs are not measured in float32.
        bases = [name for name in ("float32", "bfloat16") if name in methods]
        title = Line(f"{outputs} x {inputs}: µs (times as fast as {' / '.join(bases)})", style="bold")
        table = FittedTable("method", *(f"M = {count}" for count in counts))
        for method in methods:
            ratios = [" / ".join(f"{times[base, m] / times[method, m]:.1f}" for base in bases) for m in counts]
            cells = [f"{_short(times[method, m])} ({ratio})" for m, ratio in zip(counts, ratios, strict=True)]
            table.add_row(method, *cells)
        tables += [title, table]
    return Report(*tables, *_missing(document))


def model_tables(document: Mapping[str, Any]) -> Report:
    """Return a table a network, input and batch: microseconds cold and warm, memory, how outputs differ.

    Args:
        document: of :func:`sqs_pyro.bench.model.bench_model`.
    """
    made, how = machine_line(document["machine"]), "torch.compile" if document["compiled"] else "eager"
    said = f"{made}, {how}; medians of {document['rounds']} calls, methods in turn"
    tables: list[RenderableType] = [Line(said)]
    for name, rows in model_groups(document).items():
        title = Line(f"{name}: µs (times as fast as float32)", style="bold")
        table = FittedTable("method", "cold", "warm", "MB held", "outputs differ by")
        for method in dict.fromkeys(row["method"] for row in rows):
            cold, warm = (next(r for r in rows if r["method"] == method and r["cold"] == c) for c in (True, False))
            times = (f"{row['microseconds']:.0f} ({row['times_as_fast']:.2f})" for row in (cold, warm))
            table.add_row(method, *times, f"{cold['bytes'] / 1e6:.2f}", f"{cold['relative_error']:.1e}")
        tables += [title, table]
    return Report(*tables, *_missing(document))


def model_groups(document: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Return rows of :func:`~sqs_pyro.bench.model.bench_model` by title: one for each network, input and batch."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in document["rows"]:
        shape = "x".join(map(str, row["input"]))
        unit = " token(s)" if len(row["input"]) == 1 else ""
        groups.setdefault(f"{row['network']}, {shape}{unit}, batch {row['batch']}", []).append(row)
    return groups


def _missing(document: Mapping[str, Any]) -> list[Line]:
    return [Line(f"{name} is missing: {why}") for name, why in document["missing"].items()]


def _short(microseconds: float) -> str:
    return f"{microseconds:.0f}" if microseconds >= 100 else f"{microseconds:.1f}"


def machine_line(machine: Mapping[str, Any]) -> str:
    """Describe the machine in a line."""
    if "gpu" in machine:
        versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "cuda", "triton"))
        return f"{machine['gpu']} ({machine['processors']} multiprocessors), {versions}"
    return (
        f"{machine['processor']} ({', '.join(machine['instructions'])}), {machine['threads']} thread(s), "
        f"torch {machine['torch']}"
    )
