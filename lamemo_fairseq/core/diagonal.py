"""Segments and layers on the anti-diagonal: in evaluation every layer reads another segment at the same time.

Of segment s, layer l needs what layer l - 1 made of it, and its own memory after segment s - 1. So the cells (s, l) of
one anti-diagonal s + l = t do not depend on each other (Sivtsov et al. 2025, arXiv 2506.05229). In step t, layer l
reads segment t - l. A step is the same operations as those of one segment, on the same shapes, and gives the same bits;
`DiagonalGraph` records them side by side, one stream of the device for each layer. One text of a small model leaves
most of a GPU idle otherwise.

The first L - 1 steps fill this pipeline, and L - 1 more empty it. Memory does not grow with the number of segments.

Shapes: B streams, N tokens of a segment, n <= N of one pass through the layers, R rows, L layers, d model width.
"""

import logging
from contextlib import contextmanager
from functools import cache
from typing import (
    Callable,
    Generator,
    Iterator,
    List,
    Optional,
    Protocol,
    Sequence,
    Tuple,
    cast,
)

import torch
from torch import Tensor, nn

from .graphs import SegmentGraphs, SegmentSignature, recorded_to, warmed_up
from .kernels.copies import copy_all
from .kernels.module_tree import tree_of
from .kernels.padded import PaddedRows, cut, empty_rows, widened
from .layers import DecoderLayer
from .memory import Memory, MemoryOptions, MemoryState, Passage
from .memory.base import LayerState, Segment
from .positions import PositionEncoding

logger = logging.getLogger(__name__)


class Network(Protocol):
    """The attributes that reading uses of a model: `decoder.py` has one."""

    training: bool
    segment_length: int
    graphs: Optional[SegmentGraphs]
    diagonals: "Diagonals"
    positions: PositionEncoding
    layers: nn.ModuleList

    @property
    def memory(self) -> Memory[MemoryState, MemoryOptions]: ...
    def embed(self, tokens: Tensor, lengths: Optional[Tensor] = None) -> Tensor: ...
    def read(
        self, tokens: Tensor, state: Optional[MemoryState] = None, lengths: Optional[Tensor] = None
    ) -> Passage: ...


class Step(Protocol):
    """One anti-diagonal: L layers, each with the rows that it reads next and its part of the memory."""

    def enter(self, n: int, state: LayerState) -> None:
        """Give layer *n*, which reads its first segment in the next step, its part of the memory."""

    def run(self, x: Optional[Tensor], layers: range) -> None:
        """Let *layers* read; the embeddings ``x [B, n, d]`` are those that layer 0 reads, if it is among them."""

    def state(self, n: int) -> LayerState:
        """Return the part of the memory that layer *n* has made, which no later step changes."""

    def features(self) -> Tensor:
        """Return the rows ``[B, n, d]`` that came out of the last layer, which no later step changes."""


def read_diagonally(
    step: Step, parts: Sequence[LayerState], segments: Iterator[Tensor]
) -> Generator[Tensor, None, List[LayerState]]:
    """Read embedded *segments* ``[B, n, d]``, with the memory's *parts* before the first.

    Yields:
        The features ``[B, n, d]`` of each segment, in order.

    Returns:
        The memory's parts after the last segment.
    """
    after: List[LayerState] = []  # of layers that have read the last segment
    t, total = 0, None
    while True:
        x = next(segments, None) if total is None else None
        if x is None:
            total = t if total is None else total
            if total == 0:
                return list(parts)
            after.append(step.state(t - total))
            if len(after) == len(parts):
                return after
        if t < len(parts):
            step.enter(t, parts[t])
        step.run(x, range(len(after), min(t + 1, len(parts))))
        if t >= len(parts) - 1:
            yield step.features()
        t += 1


class EagerStep:
    """A step whose layers run one after the other."""

    def __init__(self, model: Network, segment: Segment):
        self.memory, self.layers, self.segment = model.memory, _layers(model), segment
        self.rows: List[Tensor] = [torch.empty(0)] * (len(self.layers) + 1)  # that a layer reads; features at last
        self.states: List[LayerState] = [()] * len(self.layers)

    def enter(self, n: int, state: LayerState) -> None:
        self.states[n] = state

    def run(self, x: Optional[Tensor], layers: range) -> None:
        if x is not None:
            self.rows[0] = x
        for n in reversed(layers):  # so that a layer's rows are read before they are replaced
            self.rows[n + 1], self.states[n], _ = self.memory.pass_layer(
                n, self.layers[n], self.rows[n], self.states[n], self.segment
            )

    def state(self, n: int) -> LayerState:
        return self.states[n]

    def features(self) -> Tensor:
        return self.rows[-1]


class DiagonalGraph:
    """A step as a CUDA graph, each layer in a stream of the device for itself.

    All layers run in every step. A layer without a segment computes what nobody reads: `enter` gives it its memory when
    its first segment comes, and `state` is asked for right after its last one.
    """

    def __init__(self, model: Network, x: Tensor, parts: Sequence[LayerState], segment: Callable[[Tensor], Segment]):
        memory, layers = model.memory, _layers(model)
        self.states = [tuple(t.clone() for t in part) for part in parts]
        self.rows = [x.clone()]
        self.segment = segment(x)
        for n, layer in enumerate(layers):
            self.rows.append(_like(memory.pass_layer(n, layer, self.rows[n], self.states[n], self.segment).rows))
        self.streams = [_stream_of(n, x.device) for n in range(len(layers))]
        self.in_use = False
        self.positions, self.graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.memory = warmed_up(
            lambda: self._run(memory, layers, segment(x)), lambda: self._record(memory, layers, segment)
        )

    def _record(
        self,
        memory: Memory[MemoryState, MemoryOptions],
        layers: Sequence[DecoderLayer],
        segment: Callable[[Tensor], Segment],
    ) -> None:
        with recorded_to(self.positions):
            self.rows[0].zero_()  # absolute positions compute nothing, and PyTorch warns of a graph without operations
            self.segment = segment(self.rows[0])  # its tensors are those that every step reads
        with recorded_to(self.graph, shared=self.positions):
            self._run(memory, layers, self.segment)

    def _run(
        self, memory: Memory[MemoryState, MemoryOptions], layers: Sequence[DecoderLayer], segment: Segment
    ) -> None:
        """Run all layers side by side, then hand each one's rows to the next.

        What one stream makes and another reads is alive until both have met again, so that no memory is given to
        another tensor too early.
        """
        main = torch.cuda.current_stream()
        made: List[Tensor] = []
        for n, (layer, stream) in enumerate(zip(layers, self.streams, strict=True)):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                out, after, _ = memory.pass_layer(n, layer, self.rows[n], self.states[n], segment)
                copy_all(self.states[n], after)
            made.append(out)
        for stream in self.streams:
            main.wait_stream(stream)
        copy_all([_stored(rows) for rows in self.rows[1:]], [_stored(rows) for rows in made])

    def begin(self) -> None:
        """Compute the positions of a reading: parameters may have changed in place since the last one."""
        self.positions.replay()

    def enter(self, n: int, state: LayerState) -> None:
        copy_all(self.states[n], state)

    def run(self, x: Optional[Tensor], layers: range) -> None:
        if x is not None:
            self.rows[0].copy_(x)
        self.graph.replay()

    def state(self, n: int) -> LayerState:
        return tuple(t.clone() for t in self.states[n])

    def features(self) -> Tensor:
        return self.rows[-1].clone()


@cache
def _stream_of(n: int, device: torch.device) -> torch.cuda.Stream:
    """Return the stream of layer *n*: the same for every recording, as cuBLAS has a workspace for each stream."""
    return torch.cuda.Stream()


def _stored(rows: Tensor) -> Tensor:
    """Return rows with the zeros in storage behind them, which lie without gaps."""
    return widened(rows) if isinstance(rows, PaddedRows) else rows


def _like(rows: Tensor) -> Tensor:
    """Return rows of zeros that lie in storage as *rows* do."""
    if isinstance(rows, PaddedRows):
        return cut(empty_rows(rows, rows.size(-1)).zero_(), rows.size(-1))
    return torch.zeros_like(rows)


class Diagonals:
    """The choice of segments that a model reads on the anti-diagonal, and the recorded step.

    Args:
        order: ``plain``; ``diagonal``; or ``auto``, which takes the anti-diagonal for one stream where it is recorded.
    """

    def __init__(self, order: str):
        self.order = order
        self.graph: Optional[DiagonalGraph] = None
        self._signature: Optional[SegmentSignature] = None

    def __reduce__(self) -> Tuple[object, ...]:
        return (Diagonals, (self.order,))  # a copied or stored model records anew

    def serves(self, model: Network, tokens: Tensor) -> bool:
        """Tell whether segments like ``tokens [B, N]`` are read on the anti-diagonal, if there are enough of them."""
        if self.order == "plain" or model.training or torch.is_grad_enabled():
            return False
        memory = model.memory
        if model.positions.reads_words or not memory.is_layered() or memory.config.options.cycle > 1:
            return False
        if memory.carries_gradient and tokens.size(1) % memory.period:
            return False
        return self.order == "diagonal" or (len(tokens) == 1 and self.records(model, tokens))

    def records(self, model: Network, tokens: Tensor) -> bool:
        """Tell whether a step is recorded as a graph: as for `SegmentGraphs`."""
        return model.graphs is not None and model.graphs.takes(_module(model), tokens)

    @contextmanager
    def step(self, model: Network, tokens: Tensor, x: Tensor, state: MemoryState) -> Iterator[Step]:
        """Give a step that begins to read segments like ``tokens [B, N]``, with memories like *state*.

        Parameters must not change in this context. The step's rows are like ``x [B, n, d]``.
        """
        if not self.records(model, tokens) or (self.graph is not None and self.graph.in_use):
            yield EagerStep(model, model.memory.segment(x, state, model.positions))
            return
        graph = self._recorded(model, tokens, x, state)
        graph.in_use = True
        try:
            graph.begin()
            yield graph
        finally:
            graph.in_use = False

    def _recorded(self, model: Network, tokens: Tensor, x: Tensor, state: MemoryState) -> DiagonalGraph:
        """Return the graph of a step, recorded anew if the last one is of other segments or another model."""
        signature = SegmentSignature(
            x.shape, [t.shape for t in state.tensors()], tree_of(_module(model)).signature(), []
        )
        if self.graph is None or signature != self._signature:
            self.graph, self._signature = None, None  # frees the old one's memory first
            self.graph = DiagonalGraph(model, x, model.memory.layer_states(state), _without_tensors(model, state))
            self._signature = signature
            logger.info(
                "recorded a CUDA graph for %s segments of %s tokens in %s layers at a time, which keeps %.2f GiB to "
                "itself",
                tokens.size(0),
                x.size(1),
                len(model.layers),
                self.graph.memory / 2**30,
            )
        return self.graph


def _without_tensors(model: Network, state: MemoryState) -> Callable[[Tensor], Segment]:
    """Return the function that tells layers of segments; it keeps shapes of *state* alone."""
    like = state.map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"))
    return lambda x: model.memory.segment(x, like, model.positions)


def _layers(model: Network) -> Sequence[DecoderLayer]:
    return cast(Sequence[DecoderLayer], model.layers)


def _module(model: Network) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model
