"""The `network` section of a recipe whose network comes from a checkpoint of transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from sqs_pyro.recipes import RecipeSection


class PretrainedRecipe(RecipeSection):
    """Which checkpoint of transformers.

    Attributes:
        path: a directory with `config.json`, weights and tokenizer, a GGUF file (`models/tiny.gguf`), or a model's
            name on the Hugging Face hub.
        gguf_file: name of a GGUF file in it that holds all three; None takes `config.json` and safetensors.
        dtype: of the network while it is compressed and judged; `bfloat16` needs half the memory.
    """

    path: str = Field(min_length=1)
    gguf_file: str | None = Field(default=None, min_length=1)
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="before")
    @classmethod
    def _a_file_is_one_in_its_directory(cls, values: Any) -> Any:
        path = values.get("path") if isinstance(values, Mapping) else None
        if isinstance(path, str) and is_gguf(path) and values.get("gguf_file") is None:
            return {**values, "path": str(Path(path).parent), "gguf_file": Path(path).name}
        return values


def is_gguf(path: str) -> bool:
    """Return whether a path is called as a GGUF file is."""
    return Path(path).suffix.lower() == ".gguf"
