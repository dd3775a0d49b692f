"""Registers the models."""

from .. import needs_fairseq  # noqa: F401
from . import language_models, presets

__all__ = ["language_models", "presets"]
