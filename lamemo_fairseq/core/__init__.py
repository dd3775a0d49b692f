"""Memories for language models, with their layers, kernels and exact state."""
