"""Transformers models of two layers with random weights, and packed ones made of them."""

import pytest
import torch

from sqs_pyro.kernels import packed_network
from sqs_pyro.testing.layouts import random_coded

transformers = pytest.importorskip("transformers")

VOCABULARY = 64
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_GROUPED = {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}

MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_SIZES, **_GROUPED}),
    "llama_tied": ("LlamaForCausalLM", "LlamaConfig", {**_SIZES, **_GROUPED, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_SIZES, **_GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_SIZES, **_GROUPED, "head_dim": 8}),
    "bert": ("BertForSequenceClassification", "BertConfig", {**_SIZES, "num_labels": 3}),
    "bert_tied": ("BertForMaskedLM", "BertConfig", _SIZES),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**_T5, "decoder_start_token_id": 0}),
}


def tiny(name: str, **changes):
    """A network with norms and biases that are not constant, so that nothing is equal by accident."""
    architecture, config, options = MODELS[name]
    net = getattr(transformers, architecture)(getattr(transformers, config)(**{**options, **changes})).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return net


def code_matrices(net, exclude=(), **options):
    """Random codes for every matrix of a network, whose names no word of ``exclude`` is in."""
    names = [n for n, p in net.named_parameters() if p.dim() > 1 and not any(word in n for word in exclude)]
    scale = {
        name: random_coded(tuple(net.get_parameter(name).shape), 5, seed=i, **options)
        for i, name in enumerate(names)
    }
    for coded in scale.values():
        coded.codebook.mul_(32)  # up to 0.3: large enough for every layer to matter
    return scale


def packed_tiny(name: str, exclude=(), layout="auto", **changes):
    net = tiny(name, **changes)
    return packed_network(net, code_matrices(net, exclude), layout=layout)


def inputs(net):
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**both, "decoder_input_ids": ids[:, :4]} if net.config.is_encoder_decoder else both


def logits(net) -> torch.Tensor:
    with torch.no_grad():
        return net(**inputs(net)).logits
