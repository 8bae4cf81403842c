"""A language model's checkpoint as one GGUF file, written by the gguf package."""

import json
from pathlib import Path

from kits.language_checkpoint import tokenizer


def write_gguf(path: Path, net, *, architecture: str = "llama") -> Path:
    """Write a Llama in float32 with the tokenizer of the checkpoints' kit, named as llama.cpp names tensors."""
    import gguf

    words, config = tokenizer(), net.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = words.get_vocab()
    writer.add_tokenizer_model("gpt2")
    # As GPT-2's has it, whose kind it is: transformers would add a token that the network does not know.
    tokens = [token.replace("</s>", "<|endoftext|>") for token in sorted(vocabulary, key=vocabulary.get)]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if index in words.all_special_ids else 1 for index in range(len(tokens))])
    merges = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(words.bos_token_id)
    writer.add_eos_token_id(words.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in net.state_dict().items():
        array = value.float()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            name.split(".")[-2]
        )
        if heads is not None:  # llama.cpp turns pairs of neighbours, transformers halves
            array = array.view(heads, 2, -1, array.shape[-1]).transpose(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), array.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
