"""Token-by-token decoding over a cache of each memory."""
