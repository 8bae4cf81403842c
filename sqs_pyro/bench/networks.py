"""Packed networks whose latency is measured, and inputs for them: out of files, or built in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sqs_pyro.models.catalogue  # noqa: F401  # registers networks
from sqs_pyro.bench.report import random_coded
from sqs_pyro.errors import NetworkError, RecipeError
from sqs_pyro.integrations.pretrained import transformers_package
from sqs_pyro.kernels import packed_network
from sqs_pyro.networks.registry import build_network
from sqs_pyro.packing.stored import StoredEnsemble
from sqs_pyro.runs.files import opened
from sqs_pyro.runs.kinds import kind_of

_NONZERO_RATE = 0.5


@dataclass(frozen=True, eq=False)
class BenchNetwork:
    """A packed network and what it is called with.

    Attributes:
        name: in tables.
        network: packed, in float32 and evaluation mode.
        shapes: of one example's input, each measured by itself: ``(C, H, W)`` or ``(tokens,)``.
        vocabulary: tokens that the network knows; None: it takes images.
        masked: whether it takes its tokens as a mapping with an attention mask.
    """

    name: str
    network: nn.Module
    shapes: tuple[tuple[int, ...], ...]
    vocabulary: int | None = None
    masked: bool = False

    def inputs(self, shape: tuple[int, ...], batch: int, dtype: torch.dtype) -> Any:
        """Return inputs of a shape, the same at every call: random pixels in a dtype, or tokens."""
        generator = torch.Generator().manual_seed(0)  # methods are compared by what they give for the same input
        if self.vocabulary is None:
            return torch.randn(batch, *shape, generator=generator).to(dtype)
        tokens = torch.randint(self.vocabulary, (batch, *shape), generator=generator)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)} if self.masked else tokens


def bench_networks(
    asked: str,
    bits: Sequence[int],
    input_shape: tuple[int, ...] | None,
    lengths: tuple[int, ...],
    network: str | None = None,
) -> list[BenchNetwork]:
    """Return the networks that one argument of ``sqs bench model`` names.

    Args:
        asked: a name out of :data:`BUILT_IN`, or a packed file.
        bits: of built-in networks' codes; each makes a network.
        input_shape: of images, instead of the shape of the file's data.
        lengths: of texts, in tokens.
        network: the name of what builds the file's network, where that is code of the user's.

    Raises:
        PackedFileError: the file is missing or not intact.
        RecipeError: bits outside of 1..8, or the file does not say which data it is for.
        DataError: the file's data is not on this machine.
        NetworkError: the file is an ensemble, or a package that the network needs is missing.
    """
    if asked not in BUILT_IN:
        return [_file_network(asked, input_shape, lengths, network)]
    if not bits or not set(bits) <= set(range(1, 9)):
        raise RecipeError(f"Codes of {list(bits)} bits are asked for, but a code has 1 to 8 bits.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [BUILT_IN[asked](width, lengths) for width in bits]


def _resnet20(bits: int, lengths: tuple[int, ...]) -> BenchNetwork:
    net = build_network("resnet20", in_channels=1)
    return BenchNetwork(f"resnet20, {bits} bits", _random_packed(net, bits), ((1, 28, 28),))


def _of_torchvision(name: str) -> Callable[[int, tuple[int, ...]], BenchNetwork]:
    def made(bits: int, lengths: tuple[int, ...]) -> BenchNetwork:
        net = build_network(f"torchvision/{name}").eval()
        return BenchNetwork(f"{name}, {bits} bits", _random_packed(net, bits), ((3, 224, 224),))

    return made


def _transformer(bits: int, lengths: tuple[int, ...]) -> BenchNetwork:
    """Build 12 of SmolLM2-135M's 30 blocks, with a small vocabulary: blocks are what counts."""
    transformers = transformers_package()
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        use_cache=False,
    )
    net = transformers.LlamaForCausalLM(config)
    shapes = tuple((length,) for length in lengths)
    return BenchNetwork(f"transformer, {bits} bits", _random_packed(net, bits), shapes, config.vocab_size)


#: Networks that need no file, with random codes of so many bits, half of them zero.
BUILT_IN: dict[str, Callable[[int, tuple[int, ...]], BenchNetwork]] = {
    "resnet20": _resnet20,
    "transformer": _transformer,
    "mobilenet_v3_small": _of_torchvision("mobilenet_v3_small"),
    "efficientnet_b0": _of_torchvision("efficientnet_b0"),
}


def _random_packed(net: nn.Module, bits: int) -> nn.Module:
    """Pack random weights of about the size that the network's own have; latency does not depend on values."""
    coded = {}
    for name, weight in net.named_parameters():
        if weight.dim() > 1:
            # Zeros take a share of the variance: the others make up for it, so that activations keep their size.
            scale = float(weight.detach().std()) / _NONZERO_RATE**0.5
            coded[name] = random_coded(weight.shape, bits, _NONZERO_RATE, scale)
    return packed_network(net, coded, layout="dense")


def _file_network(
    file: str, input_shape: tuple[int, ...] | None, lengths: tuple[int, ...], network: str | None
) -> BenchNetwork:
    if not Path(file).exists() and not Path(file).suffix:
        raise RecipeError(
            f"'{file}' is neither a packed file nor a built-in network: give the path of a file that `sqs` "
            f"wrote, or one of {', '.join(BUILT_IN)}."
        )
    source = opened(file, network=network)
    path, kind = source.path, kind_of(source.document)
    net = kind.network(source)
    if isinstance(net, StoredEnsemble):
        raise NetworkError(
            f"Packed file '{path}' is an ensemble of {net.num_draws} draws, which has no dense counterpart: give "
            "the file of one network."
        )
    form = kind.input_form(net, source, input_shape, lengths)
    # Methods in other dtypes are made of it; a file's network may be in half precision.
    return BenchNetwork(file, net.to(torch.float32), form.shapes, form.vocabulary, form.masked)
