"""Streams and segments of a binarized split."""

from .. import needs_fairseq  # noqa: F401
