"""Compressing a network from end to end: by fine-tuning all of it (finetune), or block after block (blockwise)."""
