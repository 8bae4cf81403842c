"""The plan of blockwise compression's time, against what torch counts, by hand, and at its limits."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sqs_pyro.compression.blockwise.machines import MACHINES
from sqs_pyro.compression.blockwise.memory_plan import plan_memory
from sqs_pyro.compression.blockwise.time_plan import plan_time
from sqs_pyro.errors import RecipeError

transformers = pytest.importorskip("transformers")
NETWORKS = Path(__file__).parents[3] / "recipes" / "networks"
EVEN = {"allocation": "even", "bits": 3.0, "embedding": False, "head": False, "units": 256, "batch_size": 1}
CPU = MACHINES["cpu"]
#: Of which everything but products takes no time.
PRODUCTS = replace(CPU, products=1.0, elements=1e30, step=0.0, doubles=1e30, parameters=1e30, reading=1e30)


@cache
def network(name):
    config = transformers.LlamaConfig(**json.loads((NETWORKS / name / "config.json").read_text()))
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def small(**changes):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 50, **changes}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **sizes, num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager"
        )
    )


@pytest.mark.parametrize(
    ("name", "parameters"), [("llama-3-8b", 8.03e9), pytest.param("llama-3-70b", 70.6e9, marks=pytest.mark.slow)]
)
def test_large_networks_from_their_configurations(name, parameters):
    net = network(name)
    plan = plan_memory(net, 128, 512, {**EVEN, "units": 8}, ranks=8)
    assert plan.parameters == pytest.approx(parameters, rel=1e-3)
    assert plan.curvature == 52 * net.config.intermediate_size**2
    time = plan_time(net, 128, 512, EVEN, CPU, ranks=8)
    assert time.seconds == sum(time.parts.values()) > time.undivided > 0
    assert time.gradients == 0


def test_operations_are_those_that_torch_counts():
    """Gradients are a forward pass, and a backward one to outputs alone; calibration is blocks at work."""
    net = small().requires_grad_(False)
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as forward:
        net(tokens)
    recipe = {"bits": 3.0, "embedding": False, "head": False, "importance_sequences": 2, "batch_size": 2}
    plan = plan_time(net, 2, 16, recipe, PRODUCTS, streamed=False)
    assert plan.gradients == pytest.approx(2 * forward.get_total_flops(), rel=1e-6)
    linear = {"q": 64 * 64, "kv": 2 * 32 * 64, "o": 64 * 64, "mlp": 2 * 96 * 64, "down": 96 * 64}
    attention = 4 * 16 * 64
    block = 2 * sum(linear.values()) + attention
    before_o = 2 * (linear["q"] + linear["kv"]) + attention
    before_mlp = before_o + 2 * linear["o"]
    before = [0, before_o, before_mlp, before_mlp + 2 * linear["mlp"]]
    taken = sum(each + 2 * inputs**2 for each, inputs in zip(before, (64, 64, 64, 96), strict=True))
    # Forecast, original and compressed; 32 tokens are less than 16 for each input.
    assert plan.calibration == pytest.approx(32 * (3 * block + 3 * taken))
    even = plan_time(net, 2, 16, recipe | {"allocation": "even", "adapt_inputs": False}, PRODUCTS)
    assert even.calibration == pytest.approx(32 * (2 * block + taken))


def test_its_limits():
    """On more ranks it is never slower than what they cannot divide, and each of them is worth less."""
    net, few = network("llama-3-8b"), 3
    for machine in MACHINES.values():
        plans = [plan_time(net, 128, 512, EVEN, machine, ranks=4**n) for n in range(few + 2)]
        alone = plans[0]
        assert alone.messages == 0 and alone.sent.number == 0
        efficiency = [alone.seconds / (4**n * plan.seconds) for n, plan in enumerate(plans)]
        assert efficiency == sorted(efficiency, reverse=True) and efficiency[0] == 1
        assert all(plan.undivided == alone.undivided <= plan.seconds for plan in plans)
        for n, plan in enumerate(plans[: few + 1]):  # as many minibatches as that divide
            assert plan.calibration == pytest.approx(alone.calibration / 4**n)
    with pytest.raises(RecipeError, match=r"512 ranks share the 256 units"):
        plan_time(net, 128, 512, EVEN, CPU, ranks=512)


def test_what_takes_longer():
    net = small(hidden_size=128, intermediate_size=256)
    recipe = {"bits": 3.0, "embedding": False, "head": False}
    plan = plan_time(net, 8, 16, recipe, CPU, streamed=False)
    assert plan_time(net, 8, 16, recipe | {"allocation": "even"}, CPU).steps == 2 * plan.steps  # β is looked for
    assert plan_time(net, 8, 16, recipe | {"grid": "uniform"}, CPU, streamed=False).coding < plan.coding
    skipped = plan_time(net, 8, 16, recipe | {"layers": {"*.down_proj": {"skip": True}}}, CPU, streamed=False)
    assert skipped.factors < plan.factors / 2 and skipped.gradients == plan.gradients
    tables = plan_time(net, 8, 16, recipe | {"embedding": True, "head": True}, CPU, streamed=False)
    assert tables.coding > plan.coding and tables.calibration > plan.calibration
    assert plan_time(
        small(hidden_size=256, intermediate_size=512), 8, 16, recipe, CPU, streamed=False
    ).factors == (8 * plan.factors)
