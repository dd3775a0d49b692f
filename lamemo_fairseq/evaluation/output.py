"""The output of ``--output-word-probs`` and ``--output-word-stats``: whole words of the text, in its order."""

import logging
from itertools import pairwise
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

import torch
from fairseq.data import Dictionary
from torch import Tensor

from ..host.ranks import gather_objects
from .words import WordUnits

logger = logging.getLogger("fairseq_cli.eval_lm")


class Word(NamedTuple):
    """A word of the text and its log-probability in nats."""

    text: str
    log_prob: float
    pieces: int
    ends_line: bool


class TokenLog:
    """The log-probability of every token, by stream."""

    def __init__(self) -> None:
        self._streams: Dict[int, List[Tuple[Tensor, Tensor]]] = {}

    def add(self, streams: Tuple[int, ...], lengths: List[int], tokens: Tensor, log_probs: Tensor) -> None:
        """Add a segment: ``lengths[b]`` of ``tokens [R]`` and ``log_probs [R]`` belong to stream b."""
        by_stream = zip(streams, tokens.cpu().split(lengths), log_probs.cpu().split(lengths), strict=True)
        for stream, *pair in by_stream:
            self._streams.setdefault(stream, []).append((pair[0], pair[1]))

    def streams(self) -> List[Tuple[Tensor, Tensor]]:
        """Return tokens and log-probabilities ``[t]`` of each stream in order, on the first rank; nothing on others."""
        streams = {k: v for of_rank in gather_objects(self._streams) for k, v in of_rank.items()}
        return [
            (torch.cat([tokens for tokens, _ in segments]), torch.cat([log_probs for _, log_probs in segments]))
            for _, segments in sorted(streams.items())
        ]

    def whole(self) -> Tuple[Tensor, Tensor]:
        """Return tokens and log-probabilities ``[T]`` of the split in order, on the first rank; nothing on others."""
        streams = self.streams()
        if not streams:
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        return torch.cat([tokens for tokens, _ in streams]), torch.cat([log_probs for _, log_probs in streams])


def words_of(tokens: Tensor, log_probs: Tensor, units: WordUnits, dictionary: Dictionary) -> Iterator[Word]:
    """Yield the words of ``tokens [T]`` of a split from its beginning."""
    eos = dictionary.eos()
    before = torch.cat([tokens.new_tensor([eos]), tokens[:-1]])
    starts = units.first_pieces(tokens, before).nonzero().squeeze(1).tolist()
    scores = log_probs.double().tolist()
    ids = tokens.tolist()
    for start, stop in pairwise([*starts, len(ids)]):
        pieces = ids[start:stop]
        text = units.written([dictionary[i] for i in pieces])
        yield Word(text, sum(scores[start:stop]), len(pieces), pieces[-1] == eos)


def print_words(words: List[Word], probs: bool, stats: bool) -> None:
    """Log the words of each line of the text, or fairseq's `WordStat` of each word, or both."""
    if probs:
        line: List[str] = []
        number = 0
        for word in words:
            line.append(f"{word.text} [{word.log_prob:2f}]")
            if word.ends_line:
                logger.info("%d %s", number, "\t".join(line))
                line, number = [], number + 1
        if line:
            logger.info("%d %s", number, "\t".join(line))
    if stats:
        from fairseq_cli.eval_lm import WordStat

        by_word: Dict[str, Any] = {}
        for word, after in zip(words, [*words[1:], None], strict=True):
            stat = by_word.setdefault(word.text, WordStat(word.text, word.pieces > 1))
            stat.add(word.log_prob, None if after is None else after.log_prob)
        for stat in sorted(by_word.values(), key=lambda s: s.count, reverse=True):
            logger.info("%s", stat)
