"""Log-probabilities of texts of any length, streamed through memory.

Shapes: B sequences, L tokens of the longest, k tokens at a time.
"""

from typing import Any, Dict, Iterator, List, Sequence

import torch
from torch import Tensor

from ..core.decoding.state import TOKENS_AT_ONCE, DecodingState
from ..core.segments import read_into
from ..data.dictionary import NO_WORD
from ..host.ensembles import mean_over_models
from .progress import counter


def stream_log_probs(
    model: Any, state: DecodingState, tokens: Tensor, target: Tensor, lengths: Sequence[int], temperature: float = 1.0
) -> Iterator[Tensor]:
    """Read the first ``lengths[b]`` of ``tokens [B, L]`` of each sequence b into *state*.

    Columns beyond *lengths* need not hold words. With a *temperature*, probabilities are those that words are drawn by.

    Yields:
        Log-probabilities ``[B, k]`` of *target*, in float32 or wider; those beyond a sequence's length mean nothing.
    """
    for chunk, features in read_into(state, model.decoder, tokens.clamp(min=0), lengths, TOKENS_AT_ONCE):
        words = target[:, chunk].clamp(min=0)
        if temperature != 1:
            yield _tempered(state.decoder, features, words, temperature)
            continue
        probs = model.get_normalized_probs((state.decoder.output_layer(features), None), True, {"target": words})
        yield probs.gather(-1, words.unsqueeze(-1)).squeeze(-1)


def _tempered(decoder: Any, features: Tensor, words: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities ``[B, k]`` of *words* at a temperature, which needs the scores of all words."""
    rows = []
    for row, targets in zip(features.split(1), words.split(1), strict=True):  # they may be large: of a text at a time
        log_probs = (decoder.log_probs(row) / temperature).log_softmax(-1)
        rows.append(log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1))
    return torch.cat(rows)


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
        logs = []
        for model in models:
            model.eval()
            state = DecodingState(model.decoder, len(source))
            with counter(max(counts), "scored") as bar:
                log_probs = [target.new_zeros(len(target), 0, dtype=torch.float32)]
                for chunk in stream_log_probs(model, state, source, target, counts):
                    log_probs.append(chunk)
                    bar.update(chunk.size(1))
            logs.append(torch.cat(log_probs[1:] or log_probs, dim=1))
        together = mean_over_models(logs)
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
