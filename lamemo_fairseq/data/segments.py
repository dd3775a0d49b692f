"""Segments of streams, looked up by name: which epoch, which cut into streams, which segment, which stream."""

from functools import cached_property, lru_cache
from typing import Any, Dict, List, NamedTuple, Optional

import numpy as np
import torch
from fairseq.data import FairseqDataset, data_utils
from numpy.typing import NDArray

from ..core.memory.position import SegmentPosition
from .streams import ENOUGH_SEGMENTS, Layout, StreamLayout, TokenSequence

ROLL = "--roll with its --seed"  # of the rotation of the streams, in checkpoints
TEXT = "the text of the split"  # by its fingerprint, in checkpoints


class SegmentKey(NamedTuple):
    """Names one segment of one stream. A key names epoch and cut too, so that the dataset has no state."""

    epoch: int
    num_streams: int
    segment: int
    stream: int


class Segment(NamedTuple):
    """The tokens that a key names."""

    key: SegmentKey
    source: NDArray[np.int64]  # [n], the token before each target
    target: NDArray[np.int64]  # [n], n <= N
    begins: bool = False  # its stream begins anew with it, from an empty memory
    ended: bool = False  # its stream has no more tokens


class SegmentDataset(FairseqDataset):
    """A split as segments of streams.

    Args:
        tokens: the split.
        split: its name.
        segment_length: N.
        eos: id of the end-of-sentence token, after which the first token of the split is predicted.
        roll_seed: rotate every stream by a random offset in each epoch, drawn with this seed (None: do not).
    """

    def __init__(self, tokens: TokenSequence, split: str, segment_length: int, eos: int, roll_seed: int | None = None):
        super().__init__()
        self.tokens = tokens
        self.split = split
        self.segment_length = segment_length
        self.eos = eos
        self.roll_seed = roll_seed

    @cached_property
    def in_order(self) -> "SegmentDataset":
        """A split whose streams are rotated, read without copies."""
        return SegmentDataset(self.tokens, self.split, self.segment_length, self.eos)

    def __len__(self) -> int:
        """Return the number of segments of the split read as a single stream."""
        return self.layout(1).num_segments

    def options(self) -> Dict[str, Any]:
        """Return the values that fix the order of tokens, besides the cut into streams, by the names of options."""
        return {ROLL: self.roll_seed, "--documents": "none", TEXT: self.tokens.fingerprint}

    def layout(self, num_streams: int) -> Layout:
        return StreamLayout(len(self.tokens), num_streams, self.segment_length)

    def __getitem__(self, key: SegmentKey) -> Segment:
        start, stop = StreamLayout(len(self.tokens), key.num_streams, self.segment_length).bounds(key.stream)
        offset = 0 if self.roll_seed is None else roll_offset(self.roll_seed, key.epoch, key.stream, stop - start)
        low = key.segment * self.segment_length
        high = min(low + self.segment_length, stop - start)
        # Each token is read along with the one before it, which is its context.
        inputs = self._read(start, stop, offset, low - 1, high)
        return Segment(key, inputs[:-1], inputs[1:])

    def collater(self, samples: List[Segment]) -> Dict[str, Any]:
        """Collate segments with the same number to a batch.

        Short segments are padded on the right with any word, here ``</s>``. ``src_lengths`` alone says which words are
        tokens.
        """
        if not samples:
            return {}
        sources, targets = (
            # A rank whose streams are all one token shorter may end on a column of padding.
            data_utils.collate_tokens([torch.from_numpy(getattr(s, name)) for s in samples], self.eos, pad_to_length=1)
            for name in ("source", "target")
        )
        lengths = torch.tensor([len(s.target) for s in samples])
        key = samples[0].key
        position = SegmentPosition(
            split=self.split,
            epoch=key.epoch,
            num_streams=key.num_streams,
            segment_length=self.segment_length,
            streams=tuple(s.key.stream for s in samples),
            index=key.segment,
            ragged=int(lengths.min()) < sources.size(1),
            last=key.segment == self.layout(key.num_streams).num_segments - 1,
            cleared=tuple(row for row, s in enumerate(samples) if s.begins),
            ended=tuple(row for row, s in enumerate(samples) if s.ended),
        )
        return {
            "id": torch.tensor([s.key.segment * s.key.num_streams + s.key.stream for s in samples]),
            "nsentences": int((lengths > 0).sum()),
            "ntokens": int(lengths.sum()),
            "net_input": {"src_tokens": sources, "src_lengths": lengths, "position": position},
            "target": targets,
        }

    def _read(self, start: int, stop: int, offset: int, low: int, high: int) -> NDArray[np.int64]:
        """Read tokens ``low .. high-1`` of the stream ``start .. stop-1`` rotated left by *offset*; low may be -1."""
        length = stop - start
        if high <= low + 1:
            return np.empty(1, dtype=np.int64)
        spans = []
        if low < 0:
            before = start + offset - 1
            spans.append(self.tokens.read(before, before + 1) if before >= 0 else np.array([self.eos]))
            low = 0
        seam = length - offset  # the stream's own first token stands here
        spans.append(self.tokens.read(start + offset + low, start + offset + min(high, seam)))
        spans.append(self.tokens.read(start + max(low - seam, 0), start + high - seam))
        return np.concatenate(spans)


def without_padding(batch: Dict[str, Any]) -> Dict[str, Any]:
    """Return the same batch, marked so that the model shows a criterion no padding.

    Criterions recognise padding by the id of a word, which a text may hold.
    """
    inputs = batch["net_input"]
    return {**batch, "net_input": {**inputs, "real_only": True}} if inputs["position"].ragged else batch


@lru_cache(maxsize=4096)
def roll_offset(seed: int, epoch: int, stream: int, length: int) -> int:
    """Return the rotation of a stream of *length* tokens in an epoch: the same on every rank and after a resume."""
    return int(np.random.default_rng((seed, epoch, stream)).integers(length))


def streams_of_a_rank(
    dataset: SegmentDataset, max_tokens: Optional[int], max_sentences: Optional[int], evaluating_ranks: int
) -> int:
    """Return how many streams a rank reads. With *evaluating_ranks*, ``max_tokens`` leaves each stream its context.

    Raises:
        ValueError: neither size holds a segment.
    """
    if max_sentences:
        return max_sentences
    streams = (max_tokens or 0) // dataset.segment_length
    if streams <= 0:
        raise ValueError(
            f"how many streams to read side by side is not known: pass --batch-size (--max-tokens {max_tokens} "
            f"holds no segment of {dataset.segment_length} tokens)"
        )
    if evaluating_ranks:
        streams = max(1, min(streams, len(dataset) // (ENOUGH_SEGMENTS * evaluating_ranks)))
    return streams
