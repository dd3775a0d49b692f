"""Consecutive segments of streams, read in order with their memory carried along.

Shapes: B streams, N tokens of a segment, L layers, d model width.
"""

from collections import deque
from typing import Deque, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .decoding.state import DecodingState
from .diagonal import Network, read_diagonally
from .memory import MemoryState
from .memory.groups import GroupedState, advance


class Piece(NamedTuple):
    """The next segment of B streams."""

    tokens: Tensor  # [B, N]
    lengths: Optional[Tensor] = None  # [B], tokens that are not padding; None if none is
    cleared: Sequence[int] = ()  # streams that begin anew
    ended: Sequence[int] = ()  # streams without further tokens

    @property
    def goes_on(self) -> bool:
        """Return whether all streams go on, without padding."""
        return self.lengths is None and not self.cleared and not self.ended


class SegmentReader:
    """Reads the segments of B streams in order, and carries their memory along.

    A memory fills up first, segment by segment. Once a segment leaves its shapes as they were, and as many whole
    segments follow as there are layers, layers read on the anti-diagonal.

    Args:
        model: the model.
        state: the memory before the first segment; None for an empty one.
    """

    def __init__(self, model: Network, state: Optional[MemoryState] = None):
        self.model = model
        self.state = state  # after all segments, once `features` has yielded the last one

    def features(self, segments: Iterable[Piece]) -> Iterator[Tensor]:
        """Yield the features ``[B, N, d]`` of each segment, in order; up to L segments are asked for in advance."""
        source, ahead = iter(segments), deque[Piece]()
        steady: Optional[torch.Size] = None  # the shape of the last tokens, if they left the memory's shapes alone
        while _fill(ahead, source, 1):
            piece = ahead[0]
            self.state = advance(self.state, len(piece.tokens), piece.cleared, piece.ended)
            if piece.tokens.shape == steady and self._diagonal(ahead, source):
                yield from self._read_diagonally(ahead, source)
                steady = None
                continue
            ahead.popleft()
            before = _shapes(self.state)
            features, self.state, _ = self.model.read(piece.tokens, self.state, piece.lengths)
            steady = piece.tokens.shape if piece.goes_on and before == _shapes(self.state) is not None else None
            yield features

    def _diagonal(self, ahead: Deque[Piece], source: Iterator[Piece]) -> bool:
        """Tell whether enough segments follow, all like the first of those *ahead*."""
        first, depth = ahead[0], len(self.model.layers)
        if not first.goes_on or not self.model.diagonals.serves(self.model, first.tokens):
            return False
        return _fill(ahead, source, depth) and all(_alike(first, piece) for piece in list(ahead)[:depth])

    def _read_diagonally(self, ahead: Deque[Piece], source: Iterator[Piece]) -> Iterator[Tensor]:
        model, state, first = self.model, self.state, ahead[0]
        assert state is not None
        length = first.tokens.size(1)
        period = model.memory.period if model.memory.carries_gradient else length

        def embedded() -> Iterator[Tensor]:
            while _fill(ahead, source, 1) and _alike(first, ahead[0]):
                yield from model.embed(ahead.popleft().tokens).split(period, dim=1)

        x = model.embed(first.tokens)[:, :period]
        passes: List[Tensor] = []
        with model.diagonals.step(model, first.tokens, x, state) as step:
            reading = read_diagonally(step, model.memory.layer_states(state), embedded())
            while True:
                try:
                    passes.append(next(reading))
                except StopIteration as end:
                    self.state = model.memory.joined(end.value, state)
                    return
                if sum(rows.size(1) for rows in passes) == length:
                    yield passes[0] if len(passes) == 1 else torch.cat(passes, dim=1)
                    passes = []


def read_into(
    state: DecodingState, model: Network, tokens: Tensor, counts: Sequence[int], at_once: Optional[int] = None
) -> Iterator[Tuple[slice, Tensor]]:
    """Read ``tokens [B, T]`` into a cache, of sequence b the first ``counts[b]``.

    Whole segments come first where layers read on the anti-diagonal. The features then are those of segments, which
    differ from those over a cache by rounding.

    Args:
        at_once: tokens that are yielded at a time, at most; None for as many as there are.

    Yields:
        Slices of the T tokens, and their features ``[B, t, d]``; those beyond a sequence's count mean nothing.
    """
    start, total = 0, max(counts)
    for features in _whole_segments(state, model, tokens, min(counts)):
        for part in features.split(at_once or features.size(1), dim=1):
            yield slice(start, start + part.size(1)), part
            start += part.size(1)
    while start < total:
        now = slice(start, min(start + (at_once or total), total))
        yield now, state.read(tokens[:, now], [min(max(n - start, 0), now.stop - start) for n in counts])
        start = now.stop


def _whole_segments(state: DecodingState, model: Network, tokens: Tensor, count: int) -> Iterator[Tensor]:
    """Yield the features of whole segments of the first *count* tokens, if they are enough for the anti-diagonal."""
    memory, length = model.memory, model.segment_length
    whole = count // length
    filling = -(-memory.slots // length) + 1
    if whole < filling + len(model.layers) or state.has_read or not memory.fills_caches:
        return
    if not model.diagonals.serves(model, tokens[:, :length]):
        return
    reader = SegmentReader(model)
    yield from reader.features(Piece(segment) for segment in tokens[:, : whole * length].split(length, dim=1))
    assert reader.state is not None
    state.begin_after(memory.layer_states(reader.state))


def _fill(ahead: Deque[Piece], source: Iterator[Piece], count: int) -> bool:
    """Ask for segments until there are *count*; tell whether there are."""
    while len(ahead) < count:
        piece = next(source, None)
        if piece is None:
            return False
        ahead.append(piece)
    return True


def _alike(first: Piece, other: Piece) -> bool:
    return other.goes_on and other.tokens.shape == first.tokens.shape


def _shapes(state: Optional[MemoryState]) -> Optional[List[torch.Size]]:
    return None if state is None or isinstance(state, GroupedState) else [t.shape for t in state.tensors()]
