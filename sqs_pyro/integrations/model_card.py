"""README.md of a checkpoint: how to load it, and what takes how many bytes."""

from pathlib import Path

from sqs_pyro.atomic import write_text
from sqs_pyro.integrations.checkpoint_size import CheckpointSize, checkpoint_size

_MARK = "<!-- written by sqs_pyro.integrations.save_pretrained; delete this line to keep your own text -->"

_MEANINGS = {
    "codes": "which codebook value each weight has",
    "masks": "which weights are not zero",
    "codebooks": "the values",
    "tables": "frequencies of the entropy coder",
    "uncompressed": "all other tensors",
    "headers": "safetensors headers and alignment",
    "configs": "config.json and the like, which describe the tensors",
}


def write_model_card(directory: Path, architecture: str) -> None:
    """Write the README.md of a checkpoint.

    Args:
        directory: of the checkpoint, complete but for the card.
        architecture: name of the transformers class that was saved.
    """
    # Sizes as they are on the disk, which is why the card comes last.
    card = model_card(directory.resolve().name, architecture, checkpoint_size(directory))
    write_text(directory / "README.md", card)


def is_foreign_card(directory: Path) -> bool:
    """Return whether the README.md of a directory is somebody else's; it is then left alone."""
    path = directory / "README.md"
    # As bytes: somebody else's README may be in any encoding.
    return path.exists() and _MARK not in path.read_bytes().decode("utf-8", errors="replace")


def model_card(name: str, architecture: str, size: CheckpointSize) -> str:
    """Return the card, Markdown."""
    rows = [f"| {part} | {size.parts[part]:,} | {meaning} |" for part, meaning in _MEANINGS.items()]
    return "\n".join(
        [
            *("---", "library_name: transformers", "tags:", "- sqs", "- sqs-pyro", "---", "", _MARK, ""),
            f"# {name}",
            "",
            f"A `{architecture}` whose weights are zeros and codebook values, compressed with SQS "
            "(arXiv 2510.08999).",
            "",
            "```python",
            "import sqs_pyro  # pip install 'sqs-pyro[transformers]'",
            "",
            f'model = sqs_pyro.from_pretrained("{name}")',
            "```",
            "",
            f"After `import sqs_pyro`, `transformers.{architecture}.from_pretrained` and the Auto classes load it "
            "as well. **Without this import transformers does not know the format (`sqs`) and refuses it for the "
            "shape of a tensor.** `dequantize=True` gives a plain dense model.",
            "",
            "## Size",
            "",
            "| part | bytes | what it is |",
            "|---|---|---|",
            *rows,
            f"| **total** | **{size.total:,}** | |",
            f"| the same network in fp32 | {size.fp32_bytes:,} | {size.ratio:.2f} times as much |",
            "",
            f"{size.num_weights:,} weights are compressed, of which {size.nonzeros:,} are not zero, at "
            f"{size.bits_per_weight:.3f} bits each with masks, codebooks and tables. The total counts every file "
            "that loading the network reads; tokenizer and this page are not in it.",
            "",
        ]
    )
