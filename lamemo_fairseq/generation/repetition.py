"""Words that would repeat an n-gram of a text.

fairseq's own block compares with the end of its buffer, which is padding, so that it blocks nothing
(facebookresearch/fairseq#5206). It also ignores prompts.

Shapes: R texts, T words of the longest, V words of the dictionary.
"""

from typing import Sequence

import torch
from torch import Tensor

from ..data.dictionary import NO_WORD


def aligned_right(texts: Tensor, lengths: Sequence[int]) -> Tensor:
    """Move the first ``lengths[r]`` words of each of ``texts [R, T]`` to its end, `NO_WORD` before them."""
    moved = torch.full_like(texts, NO_WORD)
    for text, length in enumerate(lengths):
        if length > 0:
            moved[text, -length:] = texts[text, :length]
    return moved


def repeating_words(texts: Tensor, size: int, words: int) -> Tensor:
    """Return ``[R, V]``, True for words that would end an n-gram that the text already has.

    Args:
        texts: ``[R, T]``, aligned on the right.
        size: n; with 1, no word may come again.
        words: V.
    """
    context = size - 1
    starts = texts.size(1) - context
    if starts <= 0:
        return torch.zeros(len(texts), words, dtype=torch.bool, device=texts.device)
    following = texts[:, context:]
    repeated = following.ge(0)
    for k in range(context):
        word = texts[:, starts + k, None]
        repeated = repeated & texts[:, k : k + starts].eq(word) & word.ge(0)
    counts = texts.new_zeros(len(texts), words)
    return counts.scatter_add_(1, following.clamp(min=0), repeated.to(counts)).gt(0)
