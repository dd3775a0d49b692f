"""Registers the models."""

from . import language_models

__all__ = ["language_models"]
