"""Transformers networks as networks of a task: outputs, and the way back from a packed file and a checkpoint."""

import pytest
import torch
from kits.tiny_transformers import code_matrices, tiny

import sqs_pyro
from sqs_pyro.errors import NetworkError
from sqs_pyro.integrations import save_pretrained
from sqs_pyro.kernels import packed_network
from sqs_pyro.networks.registry import build_network
from sqs_pyro.networks.sites import select_sites
from sqs_pyro.networks.task_networks import AUTO_CLASSES, include_parts, task_network, transformer_in

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5])
X = {"input_ids": IDS, "attention_mask": MASK}


def network(task, kind="bert"):
    config = tiny(kind, pad_token_id=0, num_labels=2).config
    torch.manual_seed(0)
    return task_network(getattr(transformers, AUTO_CLASSES[task]).from_config(config).eval(), task).eval()


@pytest.mark.parametrize("kind", ["bert", "llama"])
@torch.no_grad()
def test_spans(kind):
    net = network("question_answering", kind)
    logits = net(**X)
    assert logits.shape == (3, 2, 7)
    assert (logits.masked_select(MASK[:, None] == 0) == -1e4).all()
    for i, length in enumerate(MASK.sum(1)):  # each alone, without padding
        alone = net.transformer(input_ids=IDS[i : i + 1, :length])
        torch.testing.assert_close(logits[i, 0, :length], alone.start_logits[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(logits[i, 1, :length], alone.end_logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@torch.no_grad()
def test_a_decoder_s_class_is_that_of_its_last_token_before_padding(kind):
    net = network("classification", kind)
    padded = IDS.where(MASK == 1, 0)
    logits = net(input_ids=padded, attention_mask=MASK).logits
    for i, length in enumerate(MASK.sum(1)):
        alone = net(input_ids=IDS[i : i + 1, :length]).logits[0]
        torch.testing.assert_close(logits[i], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", sorted(AUTO_CLASSES.keys() - {"image_classification"}))
@pytest.mark.parametrize("kind", ["bert", "llama", "qwen2"])
@torch.no_grad()
def test_file_and_checkpoint_give_the_network_back(task, kind, tmp_path):
    net = network(task, kind)
    packed = packed_network(net, code_matrices(net, exclude=("embed", "position", "token_type")))

    def said(of):
        output = of(**X)
        return output if torch.is_tensor(output) else output.logits

    sqs_pyro.save(packed, tmp_path / "packed.safetensors")
    loaded = sqs_pyro.load(tmp_path / "packed.safetensors")  # from nothing but the file
    assert torch.equal(said(loaded), said(packed))

    save_pretrained(transformer_in(loaded), tmp_path / "checkpoint")
    auto_class = getattr(transformers, AUTO_CLASSES[task])
    again = task_network(auto_class.from_pretrained(tmp_path / "checkpoint"), task)
    assert torch.equal(said(again), said(packed))


def test_sites_of_some_parts():
    net = network("question_answering")
    blocks = select_sites(net, include_parts(net, ("blocks",)))
    assert len(blocks) == 12 and all(name.startswith("transformer.bert.encoder.layer.") for name in blocks)
    more = set(select_sites(net, include_parts(net, ("blocks", "embedding", "classifier"))))
    others = {"transformer.bert.embeddings.word_embeddings.weight", "transformer.qa_outputs.weight"}
    assert more - set(blocks) == others
    plain = network("classification")
    assert len(select_sites(plain, include_parts(plain, ("blocks",)))) == 12


def test_what_is_wrong():
    with pytest.raises(NetworkError, match="Task 'poetry' is unknown: known are classification, question"):
        build_network("transformers_network", task="poetry", config={})
    with pytest.raises(NetworkError, match="cannot build a 'nonsense' network for embedding"):
        build_network("transformers_network", task="embedding", config={"model_type": "nonsense"})
    with pytest.raises(NetworkError, match="cannot build a None network for embedding"):
        build_network("transformers_network", task="embedding", config={})
    net = network("embedding")
    with pytest.raises(NetworkError, match="has no part 'decoder': it has blocks, embedding, pooler"):
        include_parts(net, ("decoder",))
