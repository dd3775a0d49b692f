"""fairseq's ``--sampling`` by the fast sampler: the same distribution and scores, without its generator's loop.

Shapes: B prompts, K continuations of each, R = B K texts, n new words at most, V words.
"""

import math
from typing import Any, Dict, List, Optional

import torch
from fairseq import search
from torch import Tensor

from ..core.decoding.drawing import Adjustment, Draw
from ..core.decoding.sampler import Continuation, Sampler
from ..core.decoding.state import DecodingState
from ..core.memory import DivergenceError

# On a GPU, asking whether all texts have ended makes the host wait; so it asks only once in this many words.
WORDS_BETWEEN_QUESTIONS = 32


def no_word_left(new_words: int) -> DivergenceError:
    """Return the error on a text that no word can follow, after so many *new_words*."""
    return DivergenceError(
        f"no word has a probability after {new_words} new ones: the weights have diverged, or do not fit into this "
        "precision"
    )


def is_plain_sampling(generator: Any) -> bool:
    """Tell whether fairseq's *generator* is asked to sample from one model, and for nothing else."""
    return (
        type(generator.search) is search.Sampling
        and len(generator.model.models) == 1
        and generator.no_repeat_ngram_size == 0
    )


class FairseqAdjustment(Adjustment):
    """fairseq's changes of log-probabilities before a draw: temperature, penalties, forbidden words.

    Args:
        generator: fairseq's.
        like: a tensor of the log-probabilities' dtype and device.
    """

    def __init__(self, generator: Any, like: Tensor):
        self.eos: int = generator.eos
        added = like.new_zeros(generator.vocab_size)
        added[generator.unk] = -generator.unk_penalty
        added[generator.pad] = -math.inf
        if generator.token_indices_to_suppress is not None:
            added[generator.token_indices_to_suppress] = -math.inf
        super().__init__(generator.temperature, added)
        self.added: Tensor = added
        self._end = added[self.eos].clone()

    def copy_(self, other: Adjustment) -> None:
        super().copy_(other)
        if isinstance(other, FairseqAdjustment):
            self._end.copy_(other._end)

    def forbid_end(self) -> None:
        self.added[self.eos] = -math.inf

    def allow_end(self) -> None:
        self.added[self.eos].copy_(self._end)

    def force_end(self) -> None:
        self.added.fill_(-math.inf)
        self.allow_end()


def sampled_continuations(
    generator: Any, state: DecodingState, last: Tensor, limit: int, bar: Any
) -> List[List[Dict[str, Tensor]]]:
    """Draw continuations as fairseq's *generator* would.

    Texts that have ended go on in the batch, and words after the end are cut off. Without graphs, the batch shrinks
    once half of its texts have ended.

    Args:
        generator: fairseq's, for which `is_plain_sampling` holds.
        state: the prompts but for their last words; changed in place.
        last: ``[B]`` those last words.
        limit: n.
        bar: counts the words of a text.

    Returns:
        K hypotheses a prompt, in fairseq's format: new words with the end-of-sentence token, and their
        log-probabilities. Temperature and penalties change these; the choice of top words does not.

    Raises:
        DivergenceError: no word has a probability.
    """
    beam = generator.beam_size
    repeated = torch.arange(len(last), device=last.device).repeat_interleave(beam)
    state.reorder(repeated)
    top_p = generator.search.sampling_topp
    if top_p == 1 and generator.unk_penalty < 0:
        # Probabilities add up to more than 1, where fairseq leaves the others out. To `Draw`, 1 means all words.
        top_p = math.nextafter(1, 0)
    # fairseq reads only one of the two options.
    tops = {"top_p": top_p} if top_p > 0 else {"top_k": max(0, generator.search.sampling_topk)}
    exact = torch.promote_types(state.cache.layers[0].keys.dtype, torch.float32)
    sampler = Sampler.take(state, Draw(**tops), FairseqAdjustment(generator, last.new_empty(0, dtype=exact)))
    texts = NewTexts(last[repeated], limit, generator.eos, exact)
    adjustment: Any = sampler.adjust
    between = WORDS_BETWEEN_QUESTIONS if sampler.graphs else 1
    phases = (
        (adjustment.forbid_end, generator.min_len),
        (adjustment.allow_end, limit),
        (adjustment.force_end, limit + 1),
    )
    for begin, until in phases:
        begin()
        while texts.count < until and len(texts.running) > 0:
            count = min(between, until - texts.count)
            texts.add(sampler.go_on(texts.last, count))
            bar.update(count)
            left = texts.drop_ended(shrink=not sampler.graphs)
            if left is not None and len(left) > 0:
                sampler.keep(left)
    sampler.give_back()
    hypotheses = texts.hypotheses()
    return [hypotheses[start : start + beam] for start in range(0, len(hypotheses), beam)]


class NewTexts:
    """The words drawn so far, and the texts that still go on.

    Args:
        last: ``[R]`` the prompts' last words.
        limit: n.
        eos: the end-of-sentence token.
        dtype: of log-probabilities.
    """

    def __init__(self, last: Tensor, limit: int, eos: int, dtype: torch.dtype):
        self.last, self.eos = last, eos
        self.count = 0
        self.words = last.new_full((len(last), limit + 1), eos)
        self.log_probs = torch.zeros_like(self.words, dtype=dtype)
        self.running = torch.arange(len(last), device=last.device)
        self._ended = torch.zeros_like(last, dtype=torch.bool)
        self._not_finite = self._ended.sum()

    def add(self, drawn: Continuation) -> None:
        """Add words of the running texts."""
        new = slice(self.count, self.count + drawn.words.size(1))
        self.words[self.running, new], self.log_probs[self.running, new] = drawn
        self.count, self.last = new.stop, drawn.words[:, -1]
        self._ended |= drawn.words.eq(self.eos).any(1)
        self._not_finite = drawn.log_probs.isfinite().logical_not().sum()

    def drop_ended(self, shrink: bool) -> Optional[Tensor]:
        """Drop texts that have ended, once all have, or half of them where the batch may *shrink*.

        Returns:
            The indices of texts that are left, None if all are.

        Raises:
            DivergenceError: no word had a probability.
        """
        at_an_end, broken = torch.stack([self._ended.sum(), self._not_finite]).tolist()
        if broken:
            raise no_word_left(self.count)
        if at_an_end < len(self.running) and not (shrink and at_an_end * 2 >= len(self.running)):
            return None
        left = self._ended.logical_not().nonzero().squeeze(1)
        self.running, self.last, self._ended = self.running[left], self.last[left], self._ended[left]
        return left

    def hypotheses(self) -> List[Dict[str, Tensor]]:
        """Return each text up to its end."""
        lengths = (self.words.eq(self.eos).int().argmax(1) + 1).tolist()
        return [
            _hypothesis(self.words[sequence, :n], self.log_probs[sequence, :n]) for sequence, n in enumerate(lengths)
        ]


def _hypothesis(words: Tensor, log_probs: Tensor) -> Dict[str, Tensor]:
    return {
        "tokens": words,
        "score": log_probs.sum(),
        "attention": torch.empty(0),
        "alignment": torch.empty(0),
        "positional_scores": log_probs,
    }
