"""Times of calls: who is called how often, what is said of them; never how long they take."""

import re
import time

import pytest
import torch
from torch import nn

from sqs_pyro.evaluation.latency import interleaved, latency
from sqs_pyro.reporting.latency import slower


def test_calls_take_turns_and_the_first_round_only_warms_up():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    taken = interleaved(calls, 3, before=lambda call: order.append("before"))
    assert {name: len(own) for name, own in taken.items()} == {"a": 3, "b": 3}
    assert order == ["before", "a", "before", "b"] * 4
    assert all(second > 0 for own in taken.values() for second in own)


def test_a_budget_ends_it_after_three_rounds():
    assert [len(own) for own in interleaved({"a": lambda: None}, 50, seconds=0).values()] == [3]


def test_batches_that_there_are_examples_for_are_measured():
    seen = []

    class Seen(nn.Linear):
        def forward(self, x):
            seen.append((self.training, len(x)))
            return super().forward(x)

    net = Seen(4, 2).train()
    found = latency(net, net, torch.randn(9, 4))
    assert set(found["batch"]) == {"1", "9"} and set(seen) == {(False, 1), (False, 9)} and net.training
    for own in found["batch"].values():
        assert set(own) == {"dense_ms", "packed_ms", "layers"} and own["dense_ms"] > 0 and own["packed_ms"] > 0
    assert "on cpu" in found["how"]


@pytest.mark.parametrize(("packed", "said"), [(1.05, None), (2.0, "At batch 32 a call .* 2.0 times as long")])
def test_only_what_is_slower_is_said(packed, said):
    times = {"1": {"dense_ms": 1.0, "packed_ms": 0.5}, "32": {"dense_ms": 1.0, "packed_ms": packed}}
    found = slower({"batch": times})
    assert found is None if said is None else re.match(said, found)
    assert slower(None) is None


def test_a_layer_that_loses_next_to_nothing_is_not_named():
    layers = {"2": 0.5, "3": 0.01}
    found = slower({"batch": {"1": {"dense_ms": 1.0, "packed_ms": 1.6, "layers": layers}}})
    assert "(0.6 ms more; layer '2' 0.5 ms): compile" in found


def test_the_layer_that_loses_is_named():
    class Idle(nn.Linear):
        def forward(self, x):
            time.sleep(0.02)  # so long that no other work on the machine is mistaken for it
            return super().forward(x)

    dense = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    packed = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), Idle(64, 64))
    found = latency(dense, packed, torch.randn(4, 64), batches=(4,))
    assert next(iter(found["batch"]["4"]["layers"])) == "2"
    assert re.search(r"\(\d+ ms more; layer '2' \d+ ms", slower(found))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in packed.modules())
