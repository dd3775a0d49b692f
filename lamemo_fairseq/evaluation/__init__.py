"""The report of fairseq-eval-lm on a split: losses per token or per word, and those of single words."""

from .. import needs_fairseq  # noqa: F401
from .evaluate import use_for_eval_lm

__all__ = ["use_for_eval_lm"]
