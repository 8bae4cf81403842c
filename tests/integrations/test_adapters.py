"""LoRA adapters on packed layers do what PEFT's own do on the same weights, dense; what cannot be is refused."""

import copy

import pytest
import torch
from kits.tiny_transformers import packed_tiny

from sqs_pyro.errors import NetworkError
from sqs_pyro.integrations import from_pretrained, save_pretrained
from sqs_pyro.integrations.adapters import lora_on_packed

peft = pytest.importorskip("peft")

IDS = torch.arange(1, 17).view(2, 8)


def config(**options):
    return peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options)


@pytest.fixture
def packed():
    return packed_tiny("llama")


def adapted(net, own, seed=3):
    torch.manual_seed(seed)
    return peft.get_peft_model(net, own)


def adapters(net):
    return {name: value for name, value in net.named_parameters() if "lora_" in name}


def trained(net, steps=3):
    """Losses of a few steps, as PEFT's users would do them."""
    optimizer = torch.optim.SGD(adapters(net).values(), 0.5)
    losses = []
    for _ in range(steps):
        loss = net(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_they_learn_as_on_the_same_weights_dense(packed):
    dense = copy.deepcopy(packed).dequantize()
    codes = [value.clone() for value in packed.buffers()]
    one, other = adapted(packed, lora_on_packed(config())), adapted(dense, config())
    assert adapters(one).keys() == adapters(other).keys() and len(adapters(one)) == 2 * 2 * len(
        packed.model.layers
    )
    losses = trained(one)
    assert losses[-1] < losses[0] and losses == pytest.approx(trained(other), rel=1e-5)
    for name, value in adapters(one).items():
        torch.testing.assert_close(value, adapters(other)[name], rtol=1e-4, atol=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(packed.buffers(), codes, strict=True))


def test_saved_beside_the_packed_network_they_load_again(packed, tmp_path):
    save_pretrained(packed, tmp_path / "net")
    net = adapted(packed, lora_on_packed(config()))
    trained(net)
    net.save_pretrained(tmp_path / "adapter")
    again = from_pretrained(tmp_path / "net")
    own = lora_on_packed(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter", config=own).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, net.eval()(IDS).logits)
        with loaded.disable_adapter():
            assert torch.equal(loaded(IDS).logits, from_pretrained(tmp_path / "net")(IDS).logits)


def test_what_would_change_packed_weights_is_refused(packed):
    with pytest.raises(NetworkError, match="init_lora_weights is 'pissa', which changes the weights below"):
        lora_on_packed(config(init_lora_weights="pissa"))
    with pytest.raises(NetworkError, match="variant of LoRA that reads or changes the weights below"):
        adapted(copy.deepcopy(packed), lora_on_packed(config(use_dora=True)))
    net = adapted(packed, lora_on_packed(config()))
    with pytest.raises(NetworkError, match="Adapters cannot be merged into packed weights"):
        net.merge_and_unload()
