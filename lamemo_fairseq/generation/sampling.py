"""fairseq's ``--sampling`` by the fast sampler: the same distribution and scores, without its generator's loop.

Shapes: B prompts, K continuations of each, R = B K rows, n new words at most, V words.
"""

import math
from typing import Any, Dict, List

import torch
from fairseq import search
from torch import Tensor

from ..core.decoding.drawing import Adjustment, Draw
from ..core.decoding.sampler import Sampler
from ..core.decoding.state import DecodingState
from ..core.memory import DivergenceError

# On a GPU, asking whether all texts have ended makes the host wait; so it asks once in so many words.
WORDS_BETWEEN_QUESTIONS = 32


def is_plain_sampling(generator: Any) -> bool:
    """Whether what fairseq's *generator* was asked for is sampling from one model, and nothing besides."""
    return (
        type(generator.search) is search.Sampling
        and len(generator.model.models) == 1
        and generator.no_repeat_ngram_size == 0
    )


class FairseqAdjustment(Adjustment):
    """What fairseq does to log-probabilities before it draws: temperature, penalties, forbidden words.

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

    Rows whose text has ended go on in the batch, and what they draw then is cut off; without graphs, the batch shrinks
    once half of its rows have ended.

    Args:
        generator: fairseq's, for which `is_plain_sampling` holds.
        state: the prompts but for their last words; changed in place.
        last: ``[B]`` those last words.
        limit: n.
        bar: counts the words of a row.

    Returns:
        K hypotheses a prompt, in fairseq's format: new words with the end-of-sentence token, and their
        log-probabilities after temperature and penalties, but of all words rather than of the top ones only.

    Raises:
        DivergenceError: no word has a probability.
    """
    beam, eos = generator.beam_size, generator.eos
    rows = torch.arange(len(last), device=last.device).repeat_interleave(beam)
    state.reorder(rows)
    last = last[rows]
    top_p = generator.search.sampling_topp
    # fairseq looks at one of them only.
    tops = {"top_p": top_p} if top_p > 0 else {"top_k": max(0, generator.search.sampling_topk)}
    exact = torch.promote_types(state.cache.layers[0].keys.dtype, torch.float32)
    wanted = FairseqAdjustment(generator, last.new_empty(0, dtype=exact))
    sampler = Sampler.take(state, Draw(**tops), wanted)
    adjustment: Any = sampler.adjust

    words = last.new_full((len(rows), limit + 1), eos)
    log_probs = torch.zeros_like(words, dtype=exact)
    running, ended = torch.arange(len(rows), device=last.device), torch.zeros_like(rows, dtype=torch.bool)
    between = WORDS_BETWEEN_QUESTIONS if sampler.graphs else 1
    phases = (
        (adjustment.forbid_end, generator.min_len),
        (adjustment.allow_end, limit),
        (adjustment.force_end, limit + 1),
    )
    done = 0
    for begin, until in phases:
        begin()
        while done < until and len(running) > 0:
            count = min(between, until - done)
            found = sampler.go_on(last, count)
            words[running, done : done + count], log_probs[running, done : done + count] = found
            done, last = done + count, found.words[:, -1]
            bar.update(count)
            ended |= found.words.eq(eos).any(1)
            at_an_end, broken = torch.stack([ended.sum(), found.log_probs.isfinite().logical_not().sum()]).tolist()
            if broken:
                raise DivergenceError(
                    f"no word has a probability after {done} new ones: the weights have diverged, or do not fit into "
                    "this precision"
                )
            if at_an_end == len(running) or (at_an_end * 2 >= len(running) and not sampler.graphs):
                left = ended.logical_not().nonzero().squeeze(1)
                running, last, ended = running[left], last[left], ended[left]
                if len(left) > 0:
                    sampler.keep(left)
    sampler.give_back()
    lengths = (words.eq(eos).int().argmax(1) + 1).tolist()
    hypotheses = [_hypothesis(words[row, :n], log_probs[row, :n]) for row, n in enumerate(lengths)]
    return [hypotheses[start : start + beam] for start in range(0, len(hypotheses), beam)]


def _hypothesis(words: Tensor, log_probs: Tensor) -> Dict[str, Tensor]:
    return {
        "tokens": words,
        "score": log_probs.sum(),
        "attention": torch.empty(0),
        "alignment": torch.empty(0),
        "positional_scores": log_probs,
    }
