"""Linear layers in other words: the same function, the same memory, and the way back."""

import pytest
import torch
from kits import architectures as kit
from torch import nn

from sqs_pyro.networks.linear_form import (
    LinearConv1D,
    LinearExperts,
    every_token_to_every_expert,
    from_linear_form,
    has_linear_form,
    in_linear_form,
    to_linear_form,
)

transformers = pytest.importorskip("transformers")

OTHER_FORMS = {
    "gpt2": LinearConv1D,
    "mixtral": LinearExperts,
    "qwen2_moe": LinearExperts,
    "qwen3_moe": LinearExperts,
}


@torch.no_grad()
def logits(net):
    return net(**kit.inputs(net, count=2)).logits


@pytest.mark.parametrize("case", OTHER_FORMS)
def test_it_computes_the_same_and_is_undone(case):
    net = kit.make(case)
    before, modules = logits(net), dict(net.named_modules())
    with in_linear_form(net):
        assert any(isinstance(module, OTHER_FORMS[case]) for module in net.modules())
        assert not has_linear_form(net), "nothing is left in another form"
        torch.testing.assert_close(logits(net), before)
        with every_token_to_every_expert():
            torch.testing.assert_close(logits(net), before)
    assert has_linear_form(net) and dict(net.named_modules()) == modules


@pytest.mark.parametrize("case", OTHER_FORMS)
def test_no_weight_is_copied_until_the_way_back(case):
    net = kit.make(case)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    memory = {value.untyped_storage().data_ptr() for value in net.parameters()}
    to_linear_form(net)
    assert {value.untyped_storage().data_ptr() for value in net.parameters()} == memory
    assert net.state_dict().keys() != state.keys()
    after = from_linear_form(net).state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)


def test_only_what_is_named():
    net = kit.make("gpt2")
    to_linear_form(net, ["transformer.h.1.attn.c_attn.linear.weight", "transformer.h.0.attn.c_attn.weight"])
    found = [path for path, module in net.named_modules() if isinstance(module, LinearConv1D)]
    assert found == ["transformer.h.1.attn.c_attn"]
    assert net.get_submodule(found[0]).weight.shape == (32, 96), "to code that reads it, it is as it was"


def test_how_often_an_expert_is_chosen():
    """Against the router's own choice."""
    net = kit.make("mixtral")
    chosen = []
    router = net.model.layers[1].mlp.gate
    router.register_forward_hook(lambda module, inputs, output: chosen.append(output[2]))
    with in_linear_form(net), every_token_to_every_expert() as reached:
        logits(net)
        logits(net)
    counts = torch.stack([(torch.cat(chosen) == i).sum() for i in range(4)])
    assert torch.equal(reached["model.layers.1.mlp.experts"], counts)
    assert reached.keys() == {f"model.layers.{i}.mlp.experts" for i in range(2)}


def test_experts_of_another_kind_stay():
    net = kit.make("mixtral")
    for layer in net.model.layers:
        layer.mlp.experts.has_bias = True
    assert not to_linear_form(net) and not has_linear_form(nn.Linear(2, 2))
