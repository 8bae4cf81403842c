"""Compress while training: variational inference of all weights at once, then a hard network that settles."""
