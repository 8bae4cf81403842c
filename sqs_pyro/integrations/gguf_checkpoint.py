"""Files for llama.cpp: a packed language model as GGUF, its whole numbers in ``Q4_0`` and ``Q8_0`` as they are.

Both types have blocks of 32 weights of one row, a float16 scale each: the scale of an output, or of a part of
its inputs whose size is a multiple of 32, is that of all its blocks, and no number is rounded. What has other
codewords, or none, is float16, norms and biases are float32.
"""

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sqs_pyro.errors import NetworkError
from sqs_pyro.extras import needed_for
from sqs_pyro.packing.coded import CodedTensor, block_scales
from sqs_pyro.packing.stored import stored_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLOCK = 32  # weights
_MAKER = "sqs-pyro"
#: ``config.model_type`` of networks that differ in nothing but what stands in the file, and llama.cpp's name.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
#: Those whose rotary embedding turns neighbours in llama.cpp, and halves in transformers.
_TURNS_NEIGHBOURS = ("llama",)
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens


def write_gguf(packed: "PreTrainedModel", dense: "PreTrainedModel", tokenizer: Any, path: Path) -> dict[str, str]:
    """Write a packed language model as one GGUF file.

    Args:
        packed: the model.
        dense: the same as a plain one, which says what has no codes.
        tokenizer: of transformers, byte-level BPE; None writes a file that knows ids of tokens only.
        path: of the file.

    Returns:
        What became of each compressed parameter that has kept its codes.

    Raises:
        NetworkError: an architecture or a tokenizer that is not known here, or no weight has whole numbers.
        MissingPackageError: gguf is not installed.
    """
    with needed_for("GGUF files"):
        gguf: Any = importlib.import_module("gguf")
    config = packed.config
    architecture = _architecture(config)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_quantized_by(_MAKER)
    _add_sizes(writer, config)
    _add_tokens(writer, tokenizer, config)
    names = gguf.get_tensor_name_map(
        {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture], config.num_hidden_layers
    )
    coded = {name: weight.coded() for name, weight in stored_weights(packed).items()}
    said = {}
    for name, value in _tensors(dense):
        theirs = names.get_name(name, (".weight", ".bias"))
        heads = _turned_heads(name, config) if architecture in _TURNS_NEIGHBOURS else None
        kind, data = _blocks(coded.get(name), heads)
        if kind is None:
            writer.add_tensor(theirs, _plain(value, heads))
            continue
        said[name] = f"GGUF, {kind}"
        writer.add_tensor(theirs, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    if not said:
        raise NetworkError(
            "No weight has whole numbers as codewords in rows, or parts with scales of their own, of a multiple "
            "of 32, which Q4_0 and Q8_0 need: compress with blockwise.grid: uniform."
        )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return said


def is_gguf_export(path: Path) -> bool:
    """Return whether a file was written by :func:`write_gguf`; its maker stands at its beginning."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(256)
    return head[:4] == b"GGUF" and _MAKER.encode() in head


def _architecture(config: Any) -> str:
    if config.model_type not in _ARCHITECTURES:
        raise NetworkError(
            f"Networks of type {config.model_type!r} cannot be written as GGUF here: those of type "
            f"{', '.join(_ARCHITECTURES)} can."
        )
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope != "default":
        raise NetworkError(
            f"The network scales its rotary embedding ({rope!r}), which is not written as GGUF here: 'default' is."
        )
    return _ARCHITECTURES[config.model_type]


def _add_sizes(writer: Any, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


# ---- tensors ----


def _tensors(dense: "PreTrainedModel") -> Iterator[tuple[str, Tensor]]:
    """Yield parameters by name, one that several modules share once."""
    for name, value in dense.named_parameters():
        yield name, value.detach()


def _turned_heads(name: str, config: Any) -> int | None:
    """Return the number of heads of a projection that the rotary embedding turns; None of all else."""
    layer = name.split(".")[-2]
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(layer)


def _turned(value: Tensor, heads: int | None) -> Tensor:
    """Bring rows ``[N, ...]`` from halves to neighbours, head by head."""
    if heads is None:
        return value
    return value.view(heads, 2, -1, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def _plain(value: Tensor, heads: int | None) -> np.ndarray:
    value = _turned(value, heads).contiguous()
    return (value.float() if value.dim() < 2 else value.half()).numpy()


def _blocks(coded: CodedTensor | None, heads: int | None) -> tuple[str | None, np.ndarray | None]:
    """Return the type and the bytes ``[N, bytes]`` of a weight; None of one that has no type for its numbers."""
    whole = None if coded is None else coded.whole_numbers()
    if whole is None or whole[0].dim() != 2:
        return None, None
    parts = 1 if whole[1].dim() == 1 else whole[1].shape[1]
    if whole[0].shape[1] % (parts * _BLOCK):
        return None, None
    numbers, scales = whole[0], _turned(whole[1], heads).half()
    if not torch.equal(scales.float(), _turned(whole[1], heads)):
        return None, None  # rounded, they would be those of another network
    blocks = _turned(numbers, heads).view(len(numbers), -1, _BLOCK)
    small = int(numbers.min()) >= -8 and int(numbers.max()) <= 7
    if small:
        # The low halves of 16 bytes are the first 16 weights, the high ones the others.
        from_zero = (blocks + 8).to(torch.uint8)
        codes = from_zero[..., :16] | from_zero[..., 16:] << 4
    else:
        codes = blocks.contiguous().view(torch.uint8)
    each = block_scales(scales, blocks.shape[1])[..., None].view(torch.uint8)
    return ("Q4_0" if small else "Q8_0"), torch.cat([each, codes], -1).flatten(1).numpy()


# ---- tokens ----


def _add_tokens(writer: Any, tokenizer: Any, config: Any) -> None:
    """Write what llama.cpp needs to read text."""
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    model = document["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(document))
    special = {token["id"]: token for token in document["added_tokens"]}
    words = {index: word for word, index in tokenizer.get_vocab().items()}
    kinds = [
        _UNUSED
        if index not in words
        else _NORMAL
        if index not in special
        else _CONTROL
        if special[index]["special"]
        else _USER_DEFINED
        for index in range(config.vocab_size)
    ]
    writer.add_token_list([words.get(index, f"[PAD{index}]") for index in range(config.vocab_size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in model["merges"]])
    for name in ("bos", "eos", "pad", "unk"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    begins = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    writer.add_add_bos_token(begins)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(document: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for how a tokenizer cuts text into words.

    Raises:
        NetworkError: it is no byte-level BPE, or cuts text in a way that is not known here.
    """
    kind = document["model"]["type"]
    steps = document["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if kind == "BPE" and "ByteLevel" in kinds:
        patterns = [step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split"]
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and r"\p{N}{1,3}" in patterns[0]:
            return "llama-bpe"
        if kinds == ["Split", "ByteLevel"] and r"|\p{N}|" in patterns[0]:
            return "qwen2"
    raise NetworkError(
        f"The tokenizer ({kind}, {', '.join(map(str, kinds))}) cannot be written as GGUF here: byte-level BPE as "
        "of GPT-2, SmolLM, Llama 3 and Qwen 2 can."
    )
