"""Architectures of transformers: two layers, random weights, as classifiers or models of the next token."""

from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from kits.network_case import CLASSES, Network
from torch import Tensor, nn

VOCABULARY, LENGTH = 24, 6
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
_DECODER = {**_SIZES, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DISTIL = {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2}
_GPT2 |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_OPT = {**_SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16, "pad_token_id": 0}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
_VIT = {**_SIZES, "image_size": 16, "patch_size": 8}
_WHISPER = {
    "vocab_size": VOCABULARY,
    "num_mel_bins": 8,
    "max_source_positions": 8,
    "max_target_positions": 8,
    "d_model": 16,
    **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 24 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
    "decoder_start_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


def _model(architecture: str, config: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    return getattr(transformers, architecture)(getattr(transformers, config)(**options))


def words(count: int) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (count, LENGTH))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pairs(count: int) -> dict[str, Tensor]:
    """What encoder and decoder get."""
    return {**words(count), "decoder_input_ids": torch.randint(3, VOCABULARY, (count, LENGTH - 2))}


def sound(count: int) -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(count, 8, 16),
        "decoder_input_ids": torch.randint(3, VOCABULARY, (count, 4)),
    }


def tokens(length: int):
    """Labels ``[count, length]``: the token at each position."""
    return lambda count: torch.randint(VOCABULARY, (count, length))


def next_tokens(output) -> dist.TorchDistribution:
    """Logits ``[B, T, V]`` of what follows each token; the first token is given, not predicted."""
    return dist.Categorical(logits=output.logits[:, :-1]).to_event(1)


def _classifier(family: str, config: str | None = None, **options) -> Network:
    config = config or f"{family}Config"
    options = {**options, "num_labels": CLASSES}
    return Network(partial(_model, f"{family}ForSequenceClassification", config, options), words)


def _language_model(architecture: str, config: str, include=None, **options) -> Network:
    build = partial(_model, architecture, config, options)
    return Network(build, words, tokens(LENGTH - 1), next_tokens, include, classifier=False)


TRANSFORMERS = {
    "bert": _classifier("Bert", **_SIZES),
    "bert_tied": Network(partial(_model, "BertForMaskedLM", "BertConfig", _SIZES), words, tokens(LENGTH)),
    "distilbert": _classifier("DistilBert", **_DISTIL),
    "roberta": _classifier("Roberta", **_SIZES),
    "albert": _classifier("Albert", **_SIZES, embedding_size=8),  # one layer, used twice
    "deberta": _classifier("DebertaV2", **_SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "electra": _classifier("Electra", **_SIZES, embedding_size=8),
    "gpt2": _classifier("GPT2", **_GPT2),  # Conv1D, the transposed linear layer
    "gpt2_lm": _language_model("GPT2LMHeadModel", "GPT2Config", ("c_attn.weight", "mlp"), **_GPT2),
    "llama": _language_model("LlamaForCausalLM", "LlamaConfig", **_DECODER),
    "llama_tied": _language_model("LlamaForCausalLM", "LlamaConfig", **_DECODER, tie_word_embeddings=True),
    "mistral": _classifier("Mistral", **_DECODER),
    "qwen2": _language_model("Qwen2ForCausalLM", "Qwen2Config", **_DECODER, tie_word_embeddings=True),
    "qwen3": _language_model("Qwen3ForCausalLM", "Qwen3Config", **_DECODER, head_dim=8),
    "opt": _language_model("OPTForCausalLM", "OPTConfig", **_OPT),
    "gpt_neox": _classifier("GPTNeoX", **_SIZES, pad_token_id=0),
    "t5": Network(partial(_model, "T5ForConditionalGeneration", "T5Config", _T5), pairs, tokens(LENGTH - 2)),
    "vit": Network(
        partial(_model, "ViTForImageClassification", "ViTConfig", {**_VIT, "num_labels": CLASSES}),
        lambda count: {"pixel_values": torch.randn(count, 3, 16, 16)},
    ),
    "whisper": Network(
        partial(_model, "WhisperForConditionalGeneration", "WhisperConfig", _WHISPER), sound, tokens(4)
    ),
}
