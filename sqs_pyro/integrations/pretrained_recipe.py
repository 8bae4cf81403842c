"""The `network` section of a recipe whose network comes from a checkpoint of transformers."""

from typing import Literal

from pydantic import Field

from sqs_pyro.recipes import RecipeSection


class PretrainedRecipe(RecipeSection):
    """Which checkpoint of transformers.

    Attributes:
        path: a directory with `config.json`, weights and tokenizer, or a model's name on the Hugging Face hub.
        gguf_file: name of a GGUF file in it that holds all three; None takes `config.json` and safetensors.
        dtype: of the network while it is compressed and judged; `bfloat16` needs half the memory.
    """

    path: str = Field(min_length=1)
    gguf_file: str | None = Field(default=None, min_length=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
