"""The architectures that are known from the beginning, one table each."""

from collections.abc import Mapping

from sqs_pyro.networks.architecture import Architecture

_CAUSAL_PARTS = {
    "embedding": ("embed_tokens",),
    "head": ("lm_head",),
    "classifier": ("score", "qa_outputs"),
}
_ATTENTION = (
    {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
    {"o": "self_attn.o_proj"},
)
_GATED = ({"gate": "mlp.gate_proj", "up": "mlp.up_proj"}, {"down": "mlp.down_proj"})
# Norms whose weight multiplies, each in front of one group alone. What a down projection reads is a product with
# what the up projection gives; what an output projection reads, a mean of values.
_PRECEDING = {
    "q": "input_layernorm",
    "o": "self_attn.v_proj",
    "gate": "post_attention_layernorm",
    "down": "mlp.up_proj",
}
_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")
# The same names of layers, but norms that add 1 to their weight, have none, stand behind, or serve two groups.
_OTHER_NORMS = ("gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "stablelm")

# One attention and one feed-forward network behind it, with the names of GPT-NeoX and Bloom.
_FEED_FORWARD = ({"intermediate": "mlp.dense_h_to_4h"}, {"output": "mlp.dense_4h_to_h"})
_FUSED_ATTENTION = ({"qkv": "self_attention.query_key_value"}, {"o": "self_attention.dense"})

_EXPERTS = {"expert_gate_up": "mlp.experts.gate_up_proj.*"}
_EXPERTS_DOWN = {"expert_down": "mlp.experts.down_proj.*"}
_SHARED_EXPERT = {"shared_gate": "mlp.shared_expert.gate_proj", "shared_up": "mlp.shared_expert.up_proj"}
_SHARED_EXPERT_DOWN = {"shared_down": "mlp.shared_expert.down_proj"}
# Some blocks of a mixture of experts may have a plain feed-forward network instead.
_EITHER = ("gate", "up", "down", "expert_gate_up", "expert_down")


def _seq2seq_attention(prefix: str, role: str, output: str) -> tuple[Mapping[str, str], ...]:
    """Return the groups of an attention whose queries may come from elsewhere than its keys and values."""
    q, k, v = (f"{prefix}.{name}" for name in ("q_proj", "k_proj", "v_proj"))
    return ({f"{role}q": q}, {f"{role}k": k, f"{role}v": v}, {f"{role}o": f"{prefix}.{output}"})


_OUT_PROJ = (
    {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
    {"o": "self_attn.out_proj"},
)

TABLES: tuple[Architecture, ...] = (
    *(
        Architecture(name, "layers", (*_ATTENTION, *_GATED), _CAUSAL_PARTS, preceding=_PRECEDING)
        for name in _LIKE_LLAMA
    ),
    *(Architecture(name, "layers", (*_ATTENTION, *_GATED), _CAUSAL_PARTS) for name in _OTHER_NORMS),
    Architecture(
        name="phi3",  # and Phi-4, which is of the same type
        blocks="layers",
        groups=(
            {"qkv": "self_attn.qkv_proj"},
            {"o": "self_attn.o_proj"},
            {"gate_up": "mlp.gate_up_proj"},
            {"down": "mlp.down_proj"},
        ),
        parts=_CAUSAL_PARTS,
        preceding={"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"},
    ),
    Architecture(
        name="gpt_neox",
        blocks="layers",
        groups=({"qkv": "attention.query_key_value"}, {"o": "attention.dense"}, *_FEED_FORWARD),
        parts={
            "embedding": ("embed_in",),
            "head": ("lm_head", "embed_out"),
            "classifier": ("score", "classifier", "qa_outputs"),
        },
    ),
    Architecture(
        name="opt",
        blocks="decoder.layers",
        groups=(*_OUT_PROJ, {"intermediate": "fc1"}, {"output": "fc2"}),
        parts={
            "embedding": ("decoder.embed_tokens",),
            "projection": ("decoder.project_in", "decoder.project_out"),
            "head": ("lm_head",),
            "classifier": ("score", "qa_outputs"),
        },
    ),
    *(
        Architecture(
            name=name,
            blocks="h",
            groups=(*_FUSED_ATTENTION, *_FEED_FORWARD),
            parts={
                "embedding": ("word_embeddings",),
                "head": ("lm_head",),
                "classifier": ("score", "classifier", "qa_outputs"),
            },
            bare=False,
        )
        for name in ("falcon", "bloom")
    ),
    Architecture(
        name="gpt2",
        blocks="h",
        groups=(
            {"qkv": "attn.c_attn"},
            {"o": "attn.c_proj"},
            {"intermediate": "mlp.c_fc"},
            {"output": "mlp.c_proj"},
        ),
        parts={
            "embedding": ("wte",),
            "head": ("lm_head",),
            "classifier": ("score", "classifier", "qa_outputs"),
        },
    ),
    Architecture(
        name="mixtral",
        blocks="layers",
        groups=(*_ATTENTION, _EXPERTS, _EXPERTS_DOWN),
        parts=_CAUSAL_PARTS,
        apart=("expert_down",),
    ),
    Architecture(
        name="qwen2_moe",
        blocks="layers",
        groups=(*_ATTENTION, *_GATED, _SHARED_EXPERT, _SHARED_EXPERT_DOWN, _EXPERTS, _EXPERTS_DOWN),
        parts=_CAUSAL_PARTS,
        optional=(*_EITHER, "shared_gate", "shared_up", "shared_down"),
        apart=("expert_down",),
        kept=("mlp.shared_expert_gate",),
    ),
    Architecture(
        name="qwen3_moe",
        blocks="layers",
        groups=(*_ATTENTION, *_GATED, _EXPERTS, _EXPERTS_DOWN),
        parts=_CAUSAL_PARTS,
        optional=_EITHER,
        apart=("expert_down",),
    ),
    Architecture(
        name="t5",
        blocks=("encoder.block", "decoder.block"),
        groups=(
            {each: f"layer.0.SelfAttention.{each}" for each in "qkv"},
            {"o": "layer.0.SelfAttention.o"},
            {"cross_q": "layer.1.EncDecAttention.q"},
            {f"cross_{each}": f"layer.1.EncDecAttention.{each}" for each in "kv"},
            {"cross_o": "layer.1.EncDecAttention.o"},
            # Of an encoder's block the feed-forward network is its second layer, of a decoder's the third.
            {f"{each}_{i}": f"layer.{i}.DenseReluDense.{each}" for i in (1, 2) for each in ("wi", "wi_0", "wi_1")},
            {f"wo_{i}": f"layer.{i}.DenseReluDense.wo" for i in (1, 2)},
        ),
        parts={"embedding": ("shared",), "head": ("lm_head",), "classifier": ("classifier", "qa_outputs")},
        optional=(
            *(f"cross_{each}" for each in "qkvo"),
            *(f"{each}_{i}" for i in (1, 2) for each in ("wi", "wi_0", "wi_1", "wo")),
        ),
        bare=False,
    ),
    Architecture(
        name="whisper",
        blocks=("encoder.layers", "decoder.layers"),
        groups=(
            *_OUT_PROJ,
            *_seq2seq_attention("encoder_attn", "cross_", "out_proj"),
            {"intermediate": "fc1"},
            {"output": "fc2"},
        ),
        parts={"embedding": ("decoder.embed_tokens",), "head": ("proj_out",), "classifier": ("classifier",)},
        optional=("cross_q", "cross_k", "cross_v", "cross_o"),
    ),
    Architecture(
        name="clip",
        blocks=("text_model.encoder.layers", "vision_model.encoder.layers"),
        groups=(*_OUT_PROJ, {"intermediate": "mlp.fc1"}, {"output": "mlp.fc2"}),
        parts={
            "embedding": ("text_model.embeddings.token_embedding",),
            "head": ("text_projection", "visual_projection"),
        },
    ),
    Architecture(
        name="vit",
        blocks="layers",
        groups=(
            {"q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj"},
            {"o": "attention.o_proj"},
            {"intermediate": "mlp.fc1"},
            {"output": "mlp.fc2"},
        ),
        parts={
            "embedding": ("embeddings.patch_embeddings.projection",),
            "pooler": ("pooler.dense",),
            "classifier": ("classifier",),
        },
    ),
    Architecture(
        name="bert",
        blocks="encoder.layer",
        groups=(
            {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"},
            {"o": "attention.output.dense"},
            {"intermediate": "intermediate.dense"},
            {"output": "output.dense"},
        ),
        parts={
            "embedding": ("embeddings.word_embeddings",),
            "pooler": ("pooler.dense",),
            "head": ("cls.predictions.transform.dense", "cls.predictions.decoder"),
            "classifier": ("classifier", "qa_outputs", "cls.seq_relationship"),
        },
    ),
)
