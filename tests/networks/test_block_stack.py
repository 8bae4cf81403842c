"""Blocks called one by one give what the whole network gives."""

import pytest
import torch
from torch import nn

from sqs_pyro.errors import NetworkError
from sqs_pyro.networks.block_stack import BlockStack, input_of, run_block

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def llama():
    return (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2)),
        "model.layers",
        "model.norm",
    )


def qwen():
    config = transformers.Qwen2Config(**SMALL, num_key_value_heads=2, use_sliding_window=True, max_window_layers=1)
    return transformers.Qwen2ForCausalLM(config), "model.layers", "model.norm"


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)), "bert.encoder.layer", None


def walk(stack, inputs):
    return walk_from(stack, stack.entrance(inputs))


def walk_from(stack, entrance):
    hidden = entrance.hidden
    for block, arguments in zip(stack.blocks, entrance.arguments, strict=True):
        hidden = run_block(block, hidden, arguments)
    return hidden


@pytest.mark.parametrize("make", [llama, qwen, bert])
@torch.no_grad()
def test_walking_through_the_blocks_is_running_the_network(make):
    net, path, norm = make()
    net.eval()
    ids = torch.randint(0, 64, (2, 9))
    hidden = walk(BlockStack(net, net.get_submodule(path)), {"input_ids": ids})
    expected = net.base_model(input_ids=ids).last_hidden_state
    hidden = net.get_submodule(norm)(hidden) if norm else hidden
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize("make", [llama, qwen, bert])
@torch.no_grad()
def test_a_block_that_is_called_again_remembers_nothing(make):
    """By default causal networks keep keys and values, and the entrance's arguments serve many calls."""
    net, path, norm = make()
    net.eval()
    ids = torch.randint(0, 64, (2, 9))
    stack = BlockStack(net, net.get_submodule(path))
    entrance = stack.entrance({"input_ids": ids})

    def walked():
        hidden = walk_from(stack, entrance)
        return net.get_submodule(norm)(hidden) if norm else hidden

    before = walked()
    for name, parameter in net.named_parameters():
        if "key" in name or "k_proj" in name or "value" in name or "v_proj" in name:
            parameter.normal_()
    after = walked()
    assert not torch.equal(after, before)
    assert torch.equal(after, net.base_model(input_ids=ids).last_hidden_state)
    assert getattr(net.config, "use_cache", True)


@torch.no_grad()
def test_padding_masks_reach_the_blocks():
    net, path, _ = bert()
    net.eval()
    inputs = {"input_ids": torch.randint(0, 64, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    inputs["attention_mask"][1, 5:] = 0
    hidden = walk(BlockStack(net, net.get_submodule(path)), inputs)
    assert torch.equal(hidden, net.base_model(**inputs).last_hidden_state)


@torch.no_grad()
def test_network_is_as_before(monkeypatch):
    net, path, _ = llama()
    net.eval()
    ids = torch.randint(0, 64, (1, 5))
    before = net(input_ids=ids).logits
    stack = BlockStack(net, net.get_submodule(path))
    stack.entrance({"input_ids": ids})
    assert torch.equal(net(input_ids=ids).logits, before)
    assert all("forward" not in block.__dict__ for block in stack.blocks)


def test_blocks_need_no_weights():
    net, path, _ = llama()
    blocks = net.get_submodule(path)
    expected = net.model.embed_tokens(torch.tensor([[1, 2]])).detach()
    blocks.to("meta")
    entrance = BlockStack(net, blocks).entrance({"input_ids": torch.tensor([[1, 2]])})
    assert torch.equal(entrance.hidden, expected)
    assert len(entrance.arguments) == 3


@torch.no_grad()
def test_input_of_a_layer():
    net, path, _ = llama()
    stack = BlockStack(net.eval(), net.get_submodule(path))
    entrance = stack.entrance({"input_ids": torch.randint(0, 64, (2, 9))})
    block = stack.blocks[0]
    seen = []
    hook = block.mlp.down_proj.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    run_block(block, entrance.hidden, entrance.arguments[0])
    hook.remove()
    found = input_of(block.mlp.down_proj, block, entrance.hidden, entrance.arguments[0])
    assert torch.equal(found, seen[0])
    assert not block.mlp.down_proj._forward_pre_hooks
    with pytest.raises(NetworkError, match="does not call its Linear"):
        input_of(nn.Linear(2, 2), block, entrance.hidden, entrance.arguments[0])


class TestSaysWhatIsWrong:
    def test_blocks_of_another_network(self):
        net, _, _ = llama()
        with pytest.raises(NetworkError, match="1 blocks given are not blocks of this LlamaForCausalLM"):
            BlockStack(net, [nn.Linear(2, 2)])
        with pytest.raises(NetworkError, match="0 blocks given"):
            BlockStack(net, [])

    def test_blocks_out_of_order(self):
        net, path, _ = llama()
        stack = BlockStack(net, list(net.get_submodule(path))[::-1])
        with pytest.raises(NetworkError, match="called block 2 of 3 as number 0"):
            stack.entrance({"input_ids": torch.tensor([[1, 2]])})
        assert all("forward" not in block.__dict__ for block in stack.blocks)

    def test_blocks_that_are_not_called(self):
        net = nn.Sequential(nn.Linear(2, 2))
        net.spare = nn.Linear(2, 2)
        net.forward = lambda x: net[0](x)
        with pytest.raises(NetworkError, match="called 1 of its 2 blocks"):
            BlockStack(net, [net[0], net.spare]).entrance(torch.zeros(1, 2))
