"""The plan of blockwise compression's memory, against counting by hand and against a process's own."""

import json
import os
import subprocess
import sys

import pytest
import torch
from kits import architectures

from sqs_pyro.compression.blockwise.memory_plan import plan_memory
from sqs_pyro.errors import NetworkError, RecipeError

transformers = pytest.importorskip("transformers")
EVEN = {"allocation": "even", "bits": 3.0}


def llama(**changes):
    options = {"vocab_size": 1000, "num_attention_heads": 8, "num_key_value_heads": 4, **changes}
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))


def test_counts_by_hand():
    net = llama(hidden_size=64, intermediate_size=96, num_hidden_layers=3)
    plan = plan_memory(net, 10, 32, EVEN)
    linear = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96  # q and o, k and v, gate, up and down
    block = linear + 2 * 64  # norms
    assert plan.weights == 4 * block
    assert plan.block == 2 * 4 * block
    assert plan.states == 4 * 4 * 10 * 32 * 64
    assert plan.packed == (3 * linear + 2 * 1000 * 64) * 3 // 8
    assert plan.coding == 45 * 64 * 96 and plan.table == 52 * 64**2 + 45 * 1000 * 64
    assert plan.moments["vocabulary"]["ends"] == plan.ends // 3
    alone = plan_memory(net, 10, 32, {**EVEN, "embedding": False, "head": False})
    assert (alone.packed, alone.table) == (3 * linear * 3 // 8, 0) and "vocabulary" not in alone.moments
    assert plan.parameters == 3 * block + 2 * 1000 * 64 + 64
    assert plan.ends == 3 * 4 * (2 * 1000 * 64 + 64)
    left = {**EVEN, "layers": {"*.down_proj": {"skip": True}}}  # of which two copies are in float32 at the end
    assert plan_memory(net, 10, 32, left).ends == plan.ends + 2 * 4 * 3 * 64 * 96
    assert plan.gradients == 0
    assert plan.peak == max(sum(parts.values()) for parts in plan.moments.values())


def test_what_makes_it_grow():
    net = llama(hidden_size=64, intermediate_size=96, num_hidden_layers=6)
    streamed, whole = (plan_memory(net, 10, 32, EVEN, streamed=s) for s in (True, False))
    assert streamed.peak < whole.peak
    assert plan_memory(net, 20, 32, EVEN).states == 2 * streamed.states
    assert plan_memory(net, 10, 32, {"bits": 3.0}, streamed=False).gradients > 0
    assert plan_memory(net, 10, 32, {**EVEN, "bits": 6.0, "num_components": 255}).packed == 2 * streamed.packed


def test_of_a_rank():
    """Hidden states and the rows that are coded are divided, the rest is as it was."""
    net = llama(hidden_size=64, intermediate_size=96, num_hidden_layers=6)
    one, two, three = (plan_memory(net, 48, 32, EVEN, ranks=ranks) for ranks in (1, 2, 3))
    # Six minibatches of eight sequences; rows in eight units, of which one of three ranks has three.
    assert (two.states, three.states) == (one.states // 2, one.states // 3)
    assert three.coding == 45 * 64 * 36 + 2 * 64 * 96
    assert two.coding == 45 * 64 * 96 + 2 * 64 * 96  # of gate and up each rank codes one
    apart = plan_memory(net, 48, 32, EVEN | {"layers": {"*.up_proj": {"skip": True}}}, ranks=2)
    assert apart.coding == 45 * 64 * 48 + 2 * 64 * 96
    assert (two.weights, two.curvature, two.packed) == (one.weights, one.curvature, one.packed)
    assert three.peak < two.peak < one.peak
    many = plan_memory(net, 48, 32, {**EVEN, "units": 1 << 9})  # whose sums have more branches
    assert many.curvature == 2 * 4 * 11 * 96**2 > one.curvature
    with pytest.raises(RecipeError, match=r"9 ranks share the 8 units of blockwise\.units"):
        plan_memory(net, 48, 32, EVEN, ranks=9)


def test_an_unknown_architecture():
    with torch.device("meta"):
        net = transformers.GPTJForCausalLM(transformers.GPTJConfig(n_layer=1, n_embd=32, n_head=2))
    with pytest.raises(NetworkError, match=r"'gptj' .* unknown"):
        plan_memory(net, 4, 16)


@pytest.mark.parametrize(("case", "widest"), [("gpt2", 128), ("mixtral", 48), ("t5", 48)])
def test_layers_in_another_form_and_in_several_stacks(case, widest):
    """From shapes alone: 52 bytes for each pair of the widest layer's inputs, as of the Llama above."""
    net = architectures.make(case).to("meta")
    modules = dict(net.named_modules())
    plan = plan_memory(net, 8, 16, streamed=False)
    assert plan.parameters == sum(value.numel() for value in net.parameters())
    assert plan.curvature == 52 * widest**2
    assert dict(net.named_modules()) == modules


_MEASURE = """
import json, sys, tempfile, threading, time
import torch, transformers
from sqs_pyro.integrations.checkpoint import compress_checkpoint

def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])

def compress(config, sequences):
    net = tempfile.mkdtemp()
    transformers.LlamaForCausalLM(config).save_pretrained(net, max_shard_size="10MB")
    compress_now = lambda: compress_checkpoint(net, sequences, {"allocation": "even", "bits": 3.0, "rounds": 1},
                                               directory=tempfile.mkdtemp())
    return compress_now

torch.set_num_threads(1)
common = dict(num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=2)
tiny = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, **common)
compress(tiny, torch.randint(0, 64, (4, 16)))()  # loads all libraries
config = transformers.LlamaConfig(vocab_size=1000, hidden_size=384, intermediate_size=1024, **common)
run = compress(config, torch.randint(0, 1000, (8, 512)))
peak = base = resident()

def watch():
    global peak
    while True:
        peak = max(peak, resident())
        time.sleep(0.01)

threading.Thread(target=watch, daemon=True).start()
run()
print(json.dumps(peak - base))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_plan_is_what_a_process_takes():
    """What was freed goes back at once, as it does for the tensors of large networks."""
    threshold = {"MALLOC_MMAP_THRESHOLD_": "200000", "MALLOC_TRIM_THRESHOLD_": "200000"}
    command = [sys.executable, "-c", _MEASURE]
    done = subprocess.run(command, env={**os.environ, **threshold}, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    net = llama(vocab_size=1000, hidden_size=384, intermediate_size=1024, num_hidden_layers=2)
    assert plan_memory(net, 8, 512, EVEN).peak == pytest.approx(measured, rel=0.35)
