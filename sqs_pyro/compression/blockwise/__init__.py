"""Compress a transformer block after block, from the curvature of each block's outputs."""
