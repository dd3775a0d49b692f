"""A binarized split as one sequence of tokens, cut into contiguous streams."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .binarized import check_ids


class TokenSequence:
    """The lines of a fairseq dataset, read as one long sequence.

    Args:
        lines: any indexed dataset of 1-d integer tensors with ``sizes``.
        num_words: size of the dictionary; ids beyond it are an error when they are read.
        name: what to call the data in an error.
    """

    def __init__(self, lines, num_words: int, name: str):
        self.lines = lines
        self.num_words = num_words
        self.name = name
        self.ends: NDArray[np.int64] = np.cumsum(lines.sizes, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens ``start .. stop-1``, int64."""
        if start >= stop:
            return np.empty(0, dtype=np.int64)
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
        tokens = np.concatenate([np.asarray(self.lines[i], dtype=np.int64) for i in range(first, last + 1)])
        skipped = int(self.ends[first - 1]) if first > 0 else 0
        tokens = tokens[start - skipped : stop - skipped]
        check_ids(tokens, self.name, self.num_words)
        return tokens


@dataclass(frozen=True)
class StreamLayout:
    """How *num_tokens* tokens are cut into streams, and these into segments.

    Streams are contiguous and differ by one token at most; every token is in exactly one.
    """

    num_tokens: int
    num_streams: int
    segment_length: int

    @property
    def num_segments(self) -> int:
        """Segments of the longest stream."""
        longest = -(-self.num_tokens // self.num_streams)
        return -(-longest // self.segment_length)

    def bounds(self, stream: int) -> tuple[int, int]:
        """The tokens ``start .. stop-1`` of a stream."""
        short, longer = divmod(self.num_tokens, self.num_streams)
        start = stream * short + min(stream, longer)
        return start, start + short + (stream < longer)

    def check(self, name: str, training: bool) -> None:
        """Refuse streams that hold too little.

        Raises:
            ValueError: a stream is shorter than a segment in training, or empty in evaluation.
        """
        needed = self.num_streams * (self.segment_length if training else 1)
        if self.num_tokens < needed:
            what = f"a segment of {self.segment_length}" if training else "one token"
            fitting = self.num_tokens // (self.segment_length if training else 1)
            advice = f"at most {fitting} streams fit" if fitting else "even one stream does not fit"
            raise ValueError(
                f"{name} has {self.num_tokens:,} tokens, too few for {self.num_streams} streams (--batch-size times "
                f"ranks) of {what} each: {advice}; lower --batch-size or --tokens-per-sample, or use more text"
            )
