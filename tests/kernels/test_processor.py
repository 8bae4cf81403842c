"""What is told of the processor."""

import torch

from sqs_pyro.kernels import processor
from sqs_pyro.kernels.processor import multiplies_bfloat16


def test_only_processors_that_are_known_are_said_to_have_no_bfloat16(monkeypatch):
    monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
    by_torch = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert multiplies_bfloat16(torch.device("cpu")) == by_torch
    assert multiplies_bfloat16(torch.device("cuda"))
    monkeypatch.setattr(processor.platform, "machine", lambda: "arm64")
    assert multiplies_bfloat16(torch.device("cpu"))
