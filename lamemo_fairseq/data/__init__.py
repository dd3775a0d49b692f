"""Streams and segments of a binarized split."""
