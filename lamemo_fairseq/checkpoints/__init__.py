"""Checkpoints in other formats: the released code's, and folders for the core alone."""

from .. import needs_fairseq  # noqa: F401
