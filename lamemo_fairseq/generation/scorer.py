"""Log-probabilities of texts of any length, streamed through memory.

Shapes: B texts, L tokens of the longest, k tokens at a time.
"""

from typing import Any, Dict, List, NamedTuple, Sequence

import torch
from torch import Tensor

from ..core.decoding.state import TOKENS_AT_ONCE, DecodingState
from ..core.segments import read_into
from ..data.dictionary import NO_WORD
from ..host.ensembles import mean_over_models
from .progress import counter


class ReadTexts(NamedTuple):
    """Texts that a model has read."""

    state: DecodingState
    log_probs: Tensor  # [B, l], l tokens of the longest, in float32 or wider; beyond a text's length they mean nothing


def read_texts(
    model: Any, tokens: Tensor, target: Tensor, lengths: Sequence[int], what: str, temperature: float = 1.0
) -> ReadTexts:
    """Read the first ``lengths[b]`` of ``tokens [B, L]`` of each text b, and score *target*, the word after each.

    Columns beyond *lengths* need not hold words. With a *temperature*, probabilities are those that words are drawn by.
    The terminal has a counter of *what* is read.
    """
    state = DecodingState(model.decoder, len(tokens))
    scored = [torch.zeros(len(tokens), 0, device=tokens.device)]
    with counter(max(lengths), what) as bar:
        for chunk, features in read_into(state, model.decoder, tokens.clamp(min=0), lengths, TOKENS_AT_ONCE):
            words = target[:, chunk].clamp(min=0)
            if temperature == 1:
                scores = state.decoder.output_layer(features), None
                log_probs = _of_words(model.get_normalized_probs(scores, True, {"target": words}), words)
            else:
                log_probs = _tempered(state.decoder, features, words, temperature)
            scored.append(log_probs)
            bar.update(log_probs.size(1))
    return ReadTexts(state, torch.cat(scored, dim=1))


def _tempered(decoder: Any, features: Tensor, words: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities ``[B, k]`` of *words* at a temperature, which needs the scores of all words."""
    rows = []
    for row, targets in zip(features.split(1), words.split(1), strict=True):  # they may be large: of a text at a time
        rows.append(_of_words((decoder.log_probs(row) / temperature).log_softmax(-1), targets))
    return torch.cat(rows)


def _of_words(log_probs: Tensor, words: Tensor) -> Tensor:
    return log_probs.gather(-1, words.unsqueeze(-1)).squeeze(-1)


class StreamingScorer:
    """fairseq's `SequenceScorer`, but a text's length costs no memory.

    Args:
        dictionary: the words.
    """

    def __init__(self, dictionary: Any):
        self.eos = dictionary.eos()
        self.symbols_to_strip_from_output = {self.eos}

    @torch.no_grad()
    def generate(self, models: Sequence[Any], sample: Dict[str, Any], **kwargs: Any) -> List[List[Dict[str, Any]]]:
        """Score the batch's targets; several models are averaged as fairseq averages them."""
        source, target = sample["net_input"]["src_tokens"], sample["target"]
        counts = target.ne(NO_WORD).sum(1).tolist()
        for model in models:
            model.eval()
        together = mean_over_models([read_texts(m, source, target, counts, "scored").log_probs for m in models])
        return [
            [
                {
                    "tokens": target[sequence, :count],
                    "score": together[sequence, :count].sum() / max(count, 1),
                    "attention": None,
                    "alignment": None,
                    "positional_scores": together[sequence, :count],
                }
            ]
            for sequence, count in enumerate(counts)
        ]
