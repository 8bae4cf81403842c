"""Results of made-up runs, in the form that `summarise` takes."""

FP32 = 20_000  # bytes


def metrics(accuracy=0.9, nll=0.2, file_bytes=1000, **more):
    quality = {"accuracy": accuracy, "nll": nll, "ece": 0.01, "brier": 0.1, "num_examples": 100}
    return {
        "baseline": {**quality, "accuracy": 0.95},
        "compressed": quality,
        "validation": {**quality, "accuracy": accuracy - 0.01},
        "accuracy_drop": 0.95 - accuracy,
        "size": {
            "file_bytes": file_bytes,
            "fp32_bytes": FP32,
            "ratio": FP32 / file_bytes,
            "bits_per_weight": 1.5,
            "paper_ratio": 40.0,
        },
        "nonzero_rate": 0.25,
        "beta": 0.01,
        "seconds": 3.0,
        "versions": {"torch": "2"},
        **more,
    }


def result(variant, seed, found, values=None, error=None):
    values = values or {}
    point = ", ".join(f"{key}={value}" for key, value in values.items())
    return {
        "variant": variant,
        "point": point,
        "values": values,
        "seed": seed,
        "metrics": found,
        "error": error,
    }
