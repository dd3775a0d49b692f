"""Checkpoints in other formats: the released code's, and folders for the core alone."""
