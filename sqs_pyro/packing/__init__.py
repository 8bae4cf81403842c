"""What a compressed weight is: codes, masks, codebooks, file format, honest size."""

from sqs_pyro.packing.coded import CodedTensor

__all__ = ["CodedTensor"]
