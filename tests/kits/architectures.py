"""Every architecture that is known, as a network of two layers with random weights, and what it is called with."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

VOCABULARY = 48
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 8}
_IMAGES = {key: value for key, value in _SIZES.items() if not key.endswith("_id") and key != "vocab_size"}
_IMAGES = {**_IMAGES, "image_size": 16, "patch_size": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_SOUND = {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16, "d_model": 32}
for _part in ("encoder", "decoder"):
    _SOUND |= {f"{_part}_layers": 2, f"{_part}_ffn_dim": 48, f"{_part}_attention_heads": 4}
_SOUND |= {"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None, "init_std": 0.2}
_SOUND |= {key: _SIZES[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}

#: By case: class, its configuration and options.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", "BertConfig", _SIZES),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _HEADS),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _HEADS),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _HEADS),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", _HEADS),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", _GROUPED),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _GROUPED),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", _GROUPED),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZES),
    "opt": ("OPTForCausalLM", "OPTConfig", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2}),
    "falcon": ("FalconForCausalLM", "FalconConfig", _SIZES),
    "bloom": ("BloomForCausalLM", "BloomConfig", {**_SIZES, "n_layer": 2, "n_head": 4}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {**_SIZES, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_HEADS, **_EXPERTS}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**_T5, "decoder_start_token_id": 0}),
    "t5_gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**_T5, "num_layers": 1, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"},
    ),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", _SOUND),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": _SIZES, "vision_config": _IMAGES, "projection_dim": 16},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**_IMAGES, "num_labels": 5}),
}


def make(case: str, **changes: Any) -> nn.Module:
    """Return a network with norms and biases that are not constant, so that nothing is equal by accident."""
    torch.manual_seed(0)
    kind, config, options = CASES[case]
    net = getattr(transformers, kind)(getattr(transformers, config)(**{**options, **changes})).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def inputs(net: nn.Module, count: int = 6, length: int = 12) -> dict[str, Tensor]:
    """Return what a network is called with."""
    torch.manual_seed(1)
    tokens = {"input_ids": torch.randint(3, VOCABULARY, (count, length))}
    answers = {"decoder_input_ids": torch.randint(3, VOCABULARY, (count, length // 2))}
    images = {"pixel_values": torch.randn(count, 3, 16, 16)}
    by_type: Mapping[str, dict[str, Tensor]] = {
        "t5": tokens | answers,
        "whisper": {"input_features": torch.randn(count, 8, 16)} | answers,
        "clip": tokens | images,
        "vit": images,
    }
    return by_type.get(net.config.model_type, tokens)


@torch.no_grad()
def outputs(net: nn.Module) -> dict[str, Tensor]:
    """Return tensors that a network gives for its inputs, and what it generates if it does."""
    given = inputs(net, count=2)
    found = net(**given)
    names = ("logits", "text_embeds", "image_embeds", "last_hidden_state")
    said = {name: found[name] for name in names if name in found}
    if net.can_generate():
        start = {key: value for key, value in given.items() if key != "decoder_input_ids"}
        mask = {"attention_mask": torch.ones_like(start["input_ids"])} if "input_ids" in start else {}
        said["generated"] = net.generate(**start, **mask, max_new_tokens=3, do_sample=False)
    return said
