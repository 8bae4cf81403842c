"""What is found out before the first block."""

import pytest
import torch
from kits.tiny_transformers import tiny

from sqs_pyro import compress_transformer
from sqs_pyro.compression.blockwise import forecast


def test_some_tokens_tell_as_much_as_all(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = tiny("llama")
    # The first sequences are like the others: calibrations are mixed.
    sequences = torch.randint(3, 64, (512, 12), generator=torch.Generator().manual_seed(0))
    seen = []
    moments = forecast.input_moments
    monkeypatch.setattr(
        forecast, "input_moments", lambda pairs: moments(seen.append(len(x)) or (x, x) for x, _ in pairs)
    )

    def precisions(name):
        recipe = {"bits": 3.0, "importance_sequences": 8, "batch_size": 8}
        with pytest.raises(KeyboardInterrupt):  # behind the first block the plan is there
            compress_transformer(net, sequences, recipe, directory=tmp_path / name, progress=interrupt)
        return torch.load(tmp_path / name / "plan.pt")["precisions"]

    def interrupt(record):
        raise KeyboardInterrupt

    some, read = precisions("some"), sum(seen)
    monkeypatch.setattr(forecast, "TOKENS_AN_INPUT", 10**9)
    seen.clear()
    every = precisions("every")
    assert read < 0.2 * sum(seen)
    assert some == pytest.approx(every, rel=0.15)
