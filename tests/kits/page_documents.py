"""Documents of made-up runs, as pages are made of them, with names that are markup."""

from typing import Any

from kits.study import metrics as study_metrics
from kits.study import result

from sqs_pyro.reporting.study_summary import summarise

EVIL = "<script>alert('x')</script>\"&<img src=x onerror=alert(1)>"
_COUNTS = [0] * 60 + [3, 5, 2, 1]


def size(tensors: int = 3, *, parts: bool = True) -> dict[str, Any]:
    """What a file weighs, to the byte."""
    rows = []
    for i in range(tensors):
        row = {
            "name": f"layer{i}.{EVIL}.weight" if i == 0 else f"layer{i}.weight",
            "shape": [8 * (i + 1), 16],
            "layout": "bitmap" if i else "entropy",
            "bits": 3 if i else 0,
            "components": 8,
            "groups": 1,
            "nonzeros": 40 * (i + 1),
            "bytes": 60 + 40 * i,
        }
        rows.append({**row, "parts": {"codes": 40 + 40 * i, "masks": 4, "codebooks": 16}} if parts else row)
    codes = sum(row["bytes"] for row in rows) - 20 * tensors
    found = {"codes": codes, "masks": 4 * tensors, "codebooks": 16 * tensors, "tables": 0, "uncompressed": 120}
    found |= {"manifest": 90, "header": 50, "padding": 6}
    total = sum(found.values())
    return {
        "file_bytes": total,
        "fp32_bytes": 20 * total,
        "ratio": 20.0,
        "bits_per_weight": 1.25,
        "nonzero_rate": 0.3125,
        "parts": found,
        "compressed_share": 0.97,
        "largest_uncompressed": [{"name": EVIL, "shape": [16], "numel": 16}],
        "tensors": rows,
    }


def run(**more: Any) -> dict[str, Any]:
    """A run of a classifier with everything that a page can show."""
    quality = {
        "accuracy": 0.9512,
        "nll": 0.1234,
        "ece": 0.0101,
        "brier": 0.08,
        "num_examples": 900,
    }
    worse = {**quality, "accuracy": 0.9387, "nll": 0.1666}
    curve = {"confidence": [0.0, 0.31, 0.9], "accuracy": [0.0, 0.25, 0.95], "counts": [0, 100, 800]}
    metrics = {
        "name": EVIL,
        "seed": 7,
        "baseline": quality,
        "compressed": worse,
        "validation": worse,
        "accuracy_drop": 0.0125,
        "reliability": {"fp32": curve, "packed file": curve},
        "size": size(),
        "nonzero_rate": 0.3125,
        "coverage": {"compressed": 768, "total": 800},
        "findings": [{"sentence": f"Layer '{EVIL}' starves; exclude the layer.", "site": EVIL}],
        "seconds": 435.2,
        "stage_seconds": {"compression": 435.2},
        "versions": {"torch": EVIL},
        "machine": {"processor": EVIL, "instructions": ["avx2"], "threads": 2},
        "search": {
            "points": 0.5,
            "attempts": [
                {"target": 20, "ratio": 20.1, "bytes": 54_000, "points": -0.1, "epochs": 4},
                {"target": 31, "ratio": 30.9, "bytes": 35_000, "points": 0.8, "epochs": 2},
            ],
            "chosen": 0,
            "unmet": None,
        },
        "latency": {"batch": {"1": {"dense_ms": 2.0, "packed_ms": 1.6}, "32": {"dense_ms": 30, "packed_ms": 40}}},
    }
    history = [
        {
            "step": str(step),
            "stage": EVIL if step < 200 else "frozen",
            "loss": str(2.0 / step),
            "nll": str(1.5 / step),
        }
        | {"kl": "0.1", "nonzero_rate": "0.5", "temperature": "1.0", "accuracy": "0.9" if step % 100 == 0 else ""}
        for step in range(1, 401)
    ]
    layers = [
        {"name": row["name"], "low": -0.5, "high": 0.5, "pruned": [*reversed(_COUNTS)], "kept": _COUNTS}
        | {"codebook": [[0.25, 6], [0.4, 5]]}
        for row in size()["tensors"]
    ]
    recipe = {
        "network": {"name": EVIL},
        "data": {"name": "digits", "task": "classification"},
        "compression": {"target_ratio": 20.0, "epochs": 4, "num_components": 8, "allocation": "rate_distortion"},
    }
    whole = {"metrics": metrics, "recipe": recipe, "recipe_text": f"name: {EVIL}\n", "history": history}
    return {**whole, "layers": layers, "bounds": bounds(), **more}


def bounds() -> dict[str, Any]:
    """Bounds at two temperatures."""
    kl = {
        "num_weights": 100,
        "gate_kl": 10.0,
        "lower": 50.0,
        "jensen": 60.0,
        "dominant": 61.0,
        "dominant_below": 0,
    }
    kl |= {"monte_carlo": 52.0, "monte_carlo_error": 0.5, "width": 10.0, "bits_per_weight": 0.9}
    elbo = {"nll": 3.0, "nll_error": 0.1, "elbo_low": -63.0, "elbo_high": -53.0}
    at = [
        {"temperature": tau, **elbo, "total": {"name": "all sites", **kl}, "sites": [{"name": EVIL, **kl}]}
        for tau in (0.05, 1.0)
    ]
    return {"num_examples": 64, "num_samples": 4, "temperatures": at}


def language_model() -> dict[str, Any]:
    """A run of a language model."""
    text = {"perplexity": 12.345, "tokens": 16_384, "window": 512, "stride": 256}
    worse = {**text, "perplexity": 13.579}
    blocks = [
        {"block": i, "bits": 3.0 + i / 10, "error": 0.01 * (i + 1), "seconds": 2.0, "layers": {}} for i in range(4)
    ]
    return {
        "metrics": {
            "name": EVIL,
            "seed": 0,
            "baseline": {"held_out": text, EVIL: text},
            "compressed": {"held_out": worse, EVIL: {**worse, "perplexity": None}},
            "perplexity_ratio": {"held_out": 1.1, EVIL: None},
            "size": size(parts=False),
            "nonzero_rate": 0.9,
            "blocks": blocks,
            "findings": [],
            "seconds": 8.0,
            "versions": {"torch": "2"},
        },
        "recipe": {"network": {"path": EVIL}, "blockwise": {"bits": 3.2}},
        "recipe_text": "name: x\n",
    }


def study() -> dict[str, Any]:
    """A study with a failed run and a name that is markup."""
    results = [
        result(f"a{i}", seed, study_metrics(0.9 + i / 50 + seed / 100, 0.2, 1000 + 100 * i))
        for i in range(3)
        for seed in range(3)
    ]
    failed = result(EVIL, 0, None, error=f"It failed: {EVIL}.")
    return {"command": f"sqs compare {EVIL}", **summarise(EVIL, [*results, failed])}
