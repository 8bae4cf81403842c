"""What blockwise compression does, as one validated section of a recipe."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from sqs_pyro.arguments import is_whole
from sqs_pyro.compression.layers import OwnSettings, of_layer
from sqs_pyro.packing.layouts import SCALE_BYTES
from sqs_pyro.recipes import MAX_SEED, RecipeSection

#: Keys that change how a network is compressed, but nothing in what comes of it.
WITHOUT_EFFECT = {"streamed"}
#: Keys that say how small the file is.
SIZE = {"bits", "megabytes"}
#: Keys of what comes behind all blocks, which calls share that differ in them.
BEHIND_BLOCKS = {"finish_steps"}
# Bits by which the entropy of a layer's symbols stays below log2 of their number, about, when none is left out.
_UNUSED = 0.25
_SCALE_BITS = 8 * SCALE_BYTES
_NEAR = 1.0  # bits that layers which matter may have beyond the average
_MOST_BITS = 8.0
#: Methods that round to whole numbers of a fixed width.
ROUNDING = ("gptq", "awq", "rtn")
#: What they leave no choice in.
_OF_ROUNDING = {
    "grid": "uniform",
    "allocation": "even",
    "megabytes": None,
    "channel_scales": False,
    "adapt_inputs": False,
    "rounds": 2,
    "moving_steps": 0,
    "settle_steps": 0,
    "finish_steps": 0,
}


class BlockLayerRecipe(OwnSettings):
    """What the layers whose names match a pattern have of their own.

    Attributes:
        bits: a weight, of each of these layers, whatever the allocation.
        runtime_bits: bits that the code of a weight takes in memory, in place of what all layers have.
    """

    bits: float | None = Field(default=None, gt=0, le=8)
    runtime_bits: Literal[2, 3, 4, 5] | None = None


class BlockwiseRecipe(RecipeSection):
    """Compression block after block, from a few hundred sequences, without fine-tuning of the whole network.

    Attributes:
        method: `sqs`, symbols under the learned prior. Or, to compare with, whole numbers of a fixed width, -8 to
            7 if left out, times scales by the largest weight of an output or of a group of inputs: `rtn` rounds
            to nearest; `gptq` rounds one input after the other, by falling curvature, and lets those that are left
            make up for it; `awq` rounds to nearest in units of inputs by the sizes of activations, and clips. They
            leave a choice of `num_components` or `runtime_bits`, `group_size`, `damping`, and of keys of data and
            file; `embedding` and `head` stay as they are unless asked for, and are then rounded as layers are.
        bits: bits a weight that codes, tables and codebooks of all that is compressed take in the file, on
            average; of what has no bits of its own.
        megabytes: of the whole file, 10⁶ bytes, instead of `bits`: norms, biases and what else is not compressed
            come out of them.
        embedding: whether the embedding of tokens is compressed, too; a head that is tied to it is the same
            tensor. Left out, it is where it can be; true refuses other networks.
        head: whether a head of its own, which gives the logits of tokens, is compressed; as `embedding`.
        layers: settings of single layers, by pattern of their names as file names have them (`*`, `?`, `[abc]`):
            `{"*.down_proj": {bits: 4}, "model.layers.0.*": {skip: true}}`. Of each setting the last pattern counts
            that matches.
        allocation: `importance` gives all layers one β on the network's own scale, so that layers which matter
            more get more bits; `even` gives every layer the same bits.
        num_components: K, values of a codebook besides zero, at most. Where that is few, `bits` that are left out
            are a quarter of one less than `log2(1 + K)`, near all that so few values can take.
        runtime_bits: bits that the code of a weight takes in memory, which bounds K by `2^runtime_bits - 1`; left
            out, K decides. Kernels keep 5 codes of 3 bits in 16, so that they take 3.2. Without `bits` and
            `megabytes` the file has a quarter of a bit less. Layers may have their own.
        grid: `free` lets codewords be any numbers; with `uniform` they are whole numbers, `-⌈K/2⌉` to `⌊K/2⌋`,
            times a scale of each output, as integer kernels of other runtimes multiply.
        channel_scales: whether outputs of a layer that matter more, and rows of an embedding, may have a finer
            grid, by a scale of 16 bits for each; layers where it is not worth its bits have none, nor has any
            layer of a block with allocation `even`. Where K values are too few for finer grids, outputs have
            scales by the size of their weights.
        group_size: inputs of a block's layers that share a scale of 16 bits, in each output, in place of the
            outputs' own; it must divide the inputs of every layer. Embeddings and heads keep scales of rows.
        rounds: pairs of M- and E-steps after the first pass over a layer's weights.
        damping: what is added to the diagonal of a layer's curvature, in units of its mean.
        adapt_inputs: whether a layer's weight is first fitted to what the original layer gave, from the inputs
            that the compressed layers before it give.
        importance_sequences: sequences, the first of the calibration, that tell how much each output matters.
        token_prior: pseudo-count of each token beside those of the calibration, which say how much each row of an
            embedding or a head matters; 1/2 is Jeffreys' prior of their frequencies.
        batch_size: sequences that run at once.
        units: into how many parts minibatches, and rows of a layer, are divided among the ranks that `torchrun`
            starts: as many ranks at most. The file depends on their number in its last bits, and not on how many
            ranks there are.
        moving_steps: steps of SVI on each block, a minibatch each, in which codes move, too: weights go to
            neighbouring codewords, zero among them, where the block's output gains. Behind them the file may have
            a little more or less than ``bits``.
        settle_steps: steps of SVI on each block at fixed codes, a minibatch each, in which codebooks, norms and
            biases settle.
        finish_steps: steps of SVI on the whole network behind its last block, at fixed codes, two examples each:
            in them codebooks, scales, norms and biases learn what the original network says. What brings the two
            networks no nearer is not taken.
        codebook_learning_rate: of codewords (Adam), relative to the layer's root mean square weight, and of
            scales, relative to themselves.
        leftover_learning_rate: of norms and biases (Adam), relative to each tensor's root mean square.
        precision: of multiplications in steps of SVI, see `compression.precision`.
        layout: of packed tensors in the file, see `compression.layout`.
        leftover_dtype: of everything that is not compressed.
        streamed: whether weights stay in the checkpoint's safetensors files until their block is at work, so that
            one block is in memory at a time and not the whole network; the file is the same, byte for byte. It
            needs allocation `even`, for gradients of `importance` go through the whole network.
        seed: of the draws of importance, and of the order of sequences in each block's steps.
    """

    method: Literal["sqs", "gptq", "awq", "rtn"] = "sqs"
    bits: float | None = Field(default=3.2, gt=0, le=_MOST_BITS)
    megabytes: float | None = Field(default=None, gt=0)
    embedding: bool | None = None
    head: bool | None = None
    layers: dict[str, BlockLayerRecipe] = Field(default_factory=dict)
    allocation: Literal["importance", "even"] = "importance"
    num_components: int = Field(default=31, ge=1, le=255)
    runtime_bits: Literal[2, 3, 4] | None = None
    grid: Literal["free", "uniform"] = "free"
    channel_scales: bool = True
    group_size: int | None = Field(default=None, ge=32, multiple_of=32)
    rounds: int = Field(default=2, ge=1)
    damping: float = Field(default=0.01, gt=0)
    adapt_inputs: bool = True
    importance_sequences: int = Field(default=24, ge=1)
    token_prior: float = Field(default=0.5, gt=0)
    batch_size: int = Field(default=8, ge=1)
    units: int = Field(default=8, ge=1)
    moving_steps: int = Field(default=0, ge=0)
    settle_steps: int = Field(default=0, ge=0)
    finish_steps: int = Field(default=0, ge=0)
    codebook_learning_rate: float = Field(default=2e-3, ge=0)
    leftover_learning_rate: float = Field(default=1e-3, ge=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    layout: Literal["auto", "dense", "bitmap", "entropy", "adaptive"] = "auto"
    leftover_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    streamed: bool = False
    seed: int = Field(default=0, ge=0, le=MAX_SEED)

    @model_validator(mode="before")
    @classmethod
    def _one_key_decides_defaults_of_others(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        decided: dict[str, Any] = {}
        runtime, few, group = (values.get(key) for key in ("runtime_bits", "num_components", "group_size"))
        scales = _SCALE_BITS / group if group is not None and is_whole(group, 1) else 0.0
        if runtime in (2, 3, 4):  # of anything else the field itself complains, here and below
            decided = {"num_components": 2**runtime - 1, "bits": runtime - _UNUSED + scales}
        if few is not None and is_whole(few, 1):
            most = math.log2(1 + few) - _UNUSED + scales
            decided["bits"] = min(decided.get("bits", cls.model_fields["bits"].default), most)
        if values.get("megabytes") is not None:
            decided["bits"] = None
        if values.get("method") in ROUNDING:
            few = values.get("num_components", decided.get("num_components", 15))
            width = math.log2(1 + few) if is_whole(few, 1) else 1.0
            decided |= _OF_ROUNDING | {"num_components": few, "bits": min(width + scales, _MOST_BITS)}
            decided |= {"embedding": False, "head": False}
        return {**decided, **values}

    def components_of(self, name: str) -> int:
        """Return how many values besides zero a layer has at most: K, or as many as its own codes can tell."""
        own: int | None = of_layer(self.layers, name).get("runtime_bits")
        return self.num_components if own is None else 2**own - 1

    def has_few_components(self, bits: float) -> bool:
        """Return whether K may keep layers from ``bits`` a weight and those of more than average from theirs."""
        return bits - self.scale_bits > math.log2(1 + self.num_components) - _NEAR

    @property
    def scale_bits(self) -> float:
        """Bits a weight that scales of groups of inputs take; 0 without groups."""
        return 0.0 if self.group_size is None else _SCALE_BITS / self.group_size

    def skips(self, name: str) -> bool:
        """Return whether a layer is left uncompressed."""
        return bool(of_layer(self.layers, name).get("skip"))

    def bits_of(self, name: str) -> float | None:
        """Return the bits a weight of a layer that has some of its own."""
        return of_layer(self.layers, name).get("bits")

    @model_validator(mode="after")
    def _rounding_leaves_no_choice(self) -> "BlockwiseRecipe":
        if self.method not in ROUNDING:
            return self
        if self.num_components < 2:
            raise ValueError(
                f"num_components: at least 2 beside method: {self.method}, so that weights of both signs have a "
                f"value, but it is {self.num_components}: raise it"
            )
        width = min(math.log2(1 + self.num_components) + self.scale_bits, _MOST_BITS)
        own = {f"layers.{name}.bits": each.bits for name, each in self.layers.items()}
        of_rounding = {**_OF_ROUNDING, **dict.fromkeys(own), "bits": width}
        for key, value in {**self.model_dump(include={*_OF_ROUNDING, "bits"}), **own}.items():
            if value != of_rounding[key]:
                raise ValueError(
                    f"{key}: left out beside method: {self.method}, which has codes of a fixed width and steps of "
                    f"its own, but it is {value}: leave it out, or choose by num_components and group_size"
                )
        return self

    @model_validator(mode="after")
    def _one_size_is_asked_for(self) -> "BlockwiseRecipe":
        if (self.bits is None) == (self.megabytes is None):
            raise ValueError(
                f"one of bits, of a weight, and megabytes, of the whole file, but they are {self.bits} and "
                f"{self.megabytes}: leave out one"
            )
        return self

    @model_validator(mode="after")
    def _values_fit_into_memory_and_bits(self) -> "BlockwiseRecipe":
        if self.runtime_bits is not None and self.num_components >= 2**self.runtime_bits:
            raise ValueError(
                f"num_components: at most {2**self.runtime_bits - 1} beside runtime_bits: {self.runtime_bits}, "
                f"but it is {self.num_components}: leave it out"
            )
        codes = [(own.bits, own.runtime_bits) for own in self.layers.values()]
        for bits, runtime in [(self.bits, None), *codes]:
            values = self.num_components if runtime is None else 2**runtime - 1
            most = math.log2(1 + values) + self.scale_bits
            if bits is not None and bits > most:
                scales = f" and scales of {self.group_size} inputs" if self.group_size else ""
                raise ValueError(
                    f"bits: at most {most:.2f}, which zero and num_components: {values} values{scales} can take, "
                    f"but it is {bits:g}: lower it, or allow more values"
                )
        return self

    @model_validator(mode="after")
    def _streamed_blocks_have_even_bits(self) -> "BlockwiseRecipe":
        if self.streamed and self.finish_steps:
            raise ValueError(
                f"finish_steps: 0 beside streamed: true, but it is {self.finish_steps}: gradients go through the "
                "whole network"
            )
        if self.streamed and self.allocation != "even":
            raise ValueError(
                f"allocation: even beside streamed: true, for '{self.allocation}' takes gradients through the "
                "whole network"
            )
        return self
