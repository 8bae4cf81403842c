"""Tables show what the dictionaries hold, in percent and with thousands separated."""

from rich.console import Console

from sqs_pyro.reporting import tables

SIZE = {
    "fp32_bytes": 378_664,
    "file_bytes": 18_000,
    "ratio": 21.037,
    "bits_per_weight": 1.5,
    "nonzero_rate": 0.25,
}
MEASURED = {"accuracy": 0.9833, "nll": 0.0612, "ece": 0.0102, "brier": 0.0251, "entropy": 0.071}
MEASURED["num_examples"] = 360


def _text(shown):
    console = Console(width=120, file=None, record=True, quiet=False)
    with console.capture() as capture:
        for table in shown:
            console.print(table)
    return capture.get()


def _rows(shown):
    return [line.split() for line in _text(shown).splitlines() if line.strip()]


def test_run_tables_put_fp32_and_packed_side_by_side():
    metrics = {
        "name": "digits [demo]",
        "seed": 3,
        "baseline": {**MEASURED, "accuracy": 0.99},
        "compressed": MEASURED,
        "posterior_mean": {**MEASURED, "nll": 0.05},
        "averaged": {**MEASURED, "samples": 20, "temperature": 1.0},
        "size": SIZE,
        "seconds": 61.25,
    }
    text = _text(tables.run_tables(metrics))
    assert "digits [demo], seed 3" in text
    rows = _rows(tables.run_tables(metrics))
    assert ["accuracy,", "%", "99.00", "98.33", "98.33", "98.33"] in rows
    assert ["ECE,", "%", "1.02", "1.02", "1.02", "1.02"] in rows
    assert ["NLL,", "nats", "0.0612", "0.0612", "0.0500", "0.0612"] in rows
    assert ["Brier", "score", "0.0251", "0.0251", "0.0251", "0.0251"] in rows
    assert ["ratio", "of", "the", "whole", "file", "21.04"] in rows
    assert ["compression,", "seconds", "61.2"] in rows


def test_evaluation_names_the_file_and_the_number_of_examples():
    evaluation = {**MEASURED, "file": "runs/a[1]/packed.safetensors", "size": SIZE, "shift": None}
    title = "runs/a[1]/packed.safetensors on 360 test examples"
    assert title in _text(tables.evaluation_tables(evaluation))
    assert ["mean", "entropy,", "nats", "0.0710"] in _rows(tables.evaluation_tables(evaluation))
    shifted = {**evaluation, "shift": "rotation:30"}
    assert f"{title}, shifted by rotation:30" in _text(tables.evaluation_tables(shifted))


def test_inspection_rows_add_up_to_the_file():
    tensor = {
        "name": "conv.weight",
        "shape": [32, 1, 3, 3],
        "layout": "bitmap",
        "bits": 2,
        "nonzeros": 144,
        "bytes": 80,
    }
    inspection = {
        "file": "a.safetensors",
        "size": {
            **SIZE,
            "file_bytes": 1234,
            "tensors": [tensor],
            "parts": {"codes": 36, "masks": 36, "codebooks": 8, "uncompressed": 1000, "manifest": 100}
            | {"header": 50, "padding": 4},
        },
    }
    rows = _rows(tables.inspection_tables(inspection))
    assert ["conv.weight", "32×1×3×3", "bitmap", "2", "144", "50.0", "80", "2.22"] in rows
    assert ["uncompressed", "1,000"] in rows
    assert ["file", "1,234"] in rows
