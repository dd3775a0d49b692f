"""Registers the models."""

from . import language_models, presets

__all__ = ["language_models", "presets"]
