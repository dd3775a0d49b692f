"""What fairseq-eval-lm reports of a split: figures per token or per word, and the words' own."""

from .evaluate import use_for_eval_lm

__all__ = ["use_for_eval_lm"]
