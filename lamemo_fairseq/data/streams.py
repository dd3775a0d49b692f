"""A binarized split as one sequence of tokens, cut into contiguous streams."""

import hashlib
import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from fairseq.data import ConcatDataset
from fairseq.data.indexed_dataset import MMapIndexedDataset
from numpy.typing import NDArray

from .storage import check_ids

logger = logging.getLogger(__name__)

# Below this many segments a stream, the empty memory at its start shows in the losses.
ENOUGH_SEGMENTS = 64
# Parts of a text, spread evenly, and tokens of each, that its fingerprint is of: the whole may be billions.
_PARTS, _PART = 128, 64


class TokenSequence:
    """The lines of a fairseq dataset, read as one long sequence.

    Args:
        lines: any indexed dataset of 1-d integer tensors with ``sizes``.
        num_words: size of the dictionary; ids beyond it are an error when they are read.
        name: of the data, for errors.
    """

    def __init__(self, lines, num_words: int, name: str):
        self.lines = lines
        self.num_words = num_words
        self.name = name
        self.sizes: NDArray[np.int64] = np.asarray(lines.sizes, dtype=np.int64)
        self.ends: NDArray[np.int64] = np.cumsum(self.sizes, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Read tokens ``start .. stop-1``, int64."""
        tokens = self._read(start, stop)
        check_ids(tokens, self.name, self.num_words)
        return tokens

    @cached_property
    def fingerprint(self) -> str:
        """A few letters that tell one text from another of the same length, by its lines and some of its tokens."""
        digest = hashlib.sha256(self.sizes.tobytes())
        for part in range(_PARTS):
            start = part * len(self) // _PARTS
            digest.update(self._read(start, min(start + _PART, len(self))).tobytes())
        return digest.hexdigest()[:8]

    def _read(self, start: int, stop: int) -> NDArray[np.int64]:
        if start >= stop:
            return np.empty(0, dtype=np.int64)
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
        spans = []
        for i in range(first, last + 1):
            begin = int(self.ends[i - 1]) if i > 0 else 0
            spans.append(part_of_line(self.lines, i, max(start - begin, 0), min(stop, int(self.ends[i])) - begin))
        return np.concatenate(spans)


def part_of_line(lines: Any, index: int, start: int, stop: int) -> NDArray[np.int64]:
    """Read tokens ``start .. stop-1`` of a line, int64, without loading the rest of it where the format allows that."""
    if isinstance(lines, ConcatDataset):
        number, index = lines._get_dataset_and_sample_index(index)
        return part_of_line(lines.datasets[number], index, start, stop)
    if not isinstance(lines, MMapIndexedDataset):
        part = getattr(lines, "part", None)
        return part(index, start, stop) if part else np.asarray(lines[index][start:stop], dtype=np.int64)
    address, _ = lines._index[index]
    dtype = np.dtype(lines._index.dtype)
    stored = np.frombuffer(lines._bin_buffer, dtype, count=stop - start, offset=int(address) + start * dtype.itemsize)
    return stored.astype(np.int64)


@dataclass(frozen=True)
class Layout:
    """A cut of *num_tokens* tokens into streams, and of streams into segments."""

    num_tokens: int
    num_streams: int
    segment_length: int

    @property
    def num_segments(self) -> int:
        """Segments of the longest stream."""
        raise NotImplementedError

    def summary(self) -> str:
        """Return a few words for the log."""
        raise NotImplementedError

    def warn_of_empty_memories(self, split: str, enough: int, ranks: int, option: str = "--batch-size") -> None:
        """Warn that streams of less than *enough* segments hardly use the memory, and how many streams would.

        Args:
            option: sets the number of streams of a rank.
        """

    def check(self, name: str, training: bool, option: str = "--batch-size") -> None:
        """Refuse streams that hold too little.

        Args:
            option: sets the number of streams of a rank.

        Raises:
            ValueError: a stream is shorter than a segment in training, or empty in evaluation.
        """


@dataclass(frozen=True)
class StreamLayout(Layout):
    """A cut into contiguous streams that differ by one token at most; every token is in exactly one."""

    @property
    def num_segments(self) -> int:
        longest = -(-self.num_tokens // self.num_streams)
        return -(-longest // self.segment_length)

    def summary(self) -> str:
        tokens = self.num_tokens // self.num_streams
        return f"{self.num_streams} streams of {tokens:,} tokens, {self.num_segments:,} segments each"

    def bounds(self, stream: int) -> tuple[int, int]:
        """Return the bounds of a stream's tokens ``start .. stop-1``."""
        short, longer = divmod(self.num_tokens, self.num_streams)
        start = stream * short + min(stream, longer)
        return start, start + short + (stream < longer)

    def warn_of_empty_memories(self, split: str, enough: int, ranks: int, option: str = "--batch-size") -> None:
        if self.num_streams == 1 or self.num_segments >= enough:
            return
        fitting = max(1, self.num_tokens // (enough * self.segment_length * ranks))
        logger.warning(
            "%s is short for %d streams: each begins with an empty memory and ends after %s, so that many tokens lack "
            "context and the loss comes out higher; pass %s %d for fewer, longer streams",
            split,
            self.num_streams,
            "one segment" if self.num_segments == 1 else f"{self.num_segments} segments",
            option,
            fitting,
        )

    def check(self, name: str, training: bool, option: str = "--batch-size") -> None:
        needed = self.num_streams * (self.segment_length if training else 1)
        if self.num_tokens < needed:
            what = f"a segment of {self.segment_length}" if training else "one token"
            fitting = self.num_tokens // (self.segment_length if training else 1)
            advice = f"at most {fitting} streams fit" if fitting else "even one stream does not fit"
            options = f"{option} or --tokens-per-sample" if training else option
            raise ValueError(
                f"{name} has {self.num_tokens:,} tokens, too few for {self.num_streams} streams ({option} times ranks) "
                f"of {what} each: {advice}; pass a smaller {options}, or use more text"
            )
