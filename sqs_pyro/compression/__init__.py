"""Compressing a network from end to end: by fine-tuning all of it (finetune), or block after block (blockwise)."""

from sqs_pyro.compression.blockwise.call import compress_transformer
from sqs_pyro.compression.finetune.call import CompressionResult, compress

__all__ = ["CompressionResult", "compress", "compress_transformer"]
