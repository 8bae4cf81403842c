"""Tables of benchmarks: times, and ratios to what there was before."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def kernel_tables(document: Mapping[str, Any]) -> list[Any]:
    """One table for each shape: microseconds, and how many times as fast as float32 and bfloat16.

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
        table = Table(title=f"{outputs} x {inputs}: µs (times as fast as float32 / bfloat16)")
        table.add_column("method")
        for count in counts:
            table.add_column(f"M = {count}", justify="right")
        for method in dict.fromkeys(row["method"] for row in rows):
            cells = [
                f"{times[method, m]:.0f} ({times['float32', m] / times[method, m]:.1f} / "
                f"{times['bfloat16', m] / times[method, m]:.1f})"
                for m in counts
            ]
            table.add_row(method, *cells)
        tables.append(table)
    return tables + [f"{name} is missing: {why}" for name, why in document["missing"].items()]


def machine_line(machine: Mapping[str, Any]) -> str:
    """The machine in a line."""
    return (
        f"{machine['processor']} ({', '.join(machine['instructions'])}), {machine['threads']} thread(s), "
        f"torch {machine['torch']}"
    )
