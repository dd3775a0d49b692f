"""Memories: a state carried from one segment to the next, and the pass of a segment through it.

Shapes: B streams, N current tokens, m <= M memory slots, d model width.
"""

import logging
from dataclasses import dataclass, field, fields
from typing import (
    Any,
    ClassVar,
    Dict,
    Generic,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Type,
    TypeVar,
    cast,
)

import torch
from torch import Tensor, nn

from ..decoding.cache import AnyCache
from ..fields import check_options
from ..layers import CausalSelfAttention, DecoderLayer, SelfAttention
from ..names import check_spelling
from ..positions import LayerBias, Positions
from ..positions.together import together
from ..registry import Registry
from .checks import check_members, check_methods, check_names, passed_layer, passed_segment, reached
from .state import MemoryState as MemoryState  # a memory finds all that it needs here
from .state import State

logger = logging.getLogger(__name__)

Options = TypeVar("Options", bound="MemoryOptions")
LayerState = Tuple[Tensor, ...]  # one layer's part of a state


@dataclass(frozen=True)
class MemoryOptions:
    """Base of a memory's own options. A host offers the options of all memories, under the fields' names."""

    @property
    def cycle(self) -> int:
        """The number of kinds of segments. They take turns, and states before different kinds have different shapes."""
        return 1

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            ValueError: with the option's name and the remedy.
        """


@dataclass(frozen=True)
class Architecture:
    """The model that a host knows a memory by."""

    name: str  # as in --arch
    class_name: str  # in models/language_models.py
    summary: str
    defaults: Mapping[str, object] = field(default_factory=dict)  # options whose default differs
    presets: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # likewise, by released setting


@dataclass(frozen=True)
class MemoryConfig(Generic[Options]):
    """Sizes and choices that a memory is built from."""

    mem_len: int
    layers: int
    heads: int
    head_dim: int
    embed_dim: int
    segment_length: int  # N
    options: Options  # of the memory's own class
    bptt_segments: int = 1  # segments k of an update, gradient flowing between them
    dropout: float = 0.0


class Passage(NamedTuple):
    """The results of a segment."""

    features: Tensor  # [B, N, d], the last layer's current rows
    state: MemoryState  # for the next segment, without gradient
    # Scalars by name, to be added to the loss of every token; in training only, and all of them in every segment.
    losses: Dict[str, Tensor] = {}


class Segment(NamedTuple):
    """The values that all layers use of the segment that they read."""

    tokens: int  # n
    biases: List[LayerBias]  # of each layer, as wide as padded heads
    lengths: Optional[Tensor] = None  # [B], tokens that are not padding; None if none is


class LayerPassage(NamedTuple):
    """The results of one layer's pass over a segment."""

    rows: Tensor  # that come out of the layer
    state: LayerState  # for the layer's next segment
    aside: Tuple[Tensor, ...] = ()  # for the memory's losses


class Memory(nn.Module, Generic[State, Options]):
    """Base of all memories; a decoder has one.

    A subclass defines `pass_layer` if layer l needs only the output of layer l - 1 and its own state after the last
    segment. Any other defines `pass_segment`.
    """

    architecture: ClassVar[Architecture]
    options: ClassVar[Type[MemoryOptions]] = MemoryOptions
    attention: ClassVar[Type[SelfAttention]] = CausalSelfAttention
    state: ClassVar[Type[MemoryState]] = MemoryState
    cache: ClassVar[Type[AnyCache]]  # of token-by-token decoding; every registered class names its own
    looks_ahead: ClassVar[bool] = False
    remembers: ClassVar[bool] = True
    has_slots: ClassVar[bool] = True  # rows before a segment's tokens, which --mem-len counts
    slots_are_tokens: ClassVar[bool] = False  # the m rows before a segment's tokens are those of the m tokens before
    smallest_mem_len: ClassVar[int] = 1  # the smallest --mem-len that makes sense
    has_losses: ClassVar[bool] = False  # passages have losses
    carries_gradient: ClassVar[bool] = False  # gradient may flow from segment to segment of an update
    segments_at_once: ClassVar[int] = 1  # whole ones of those that `pass_segment` takes, if gradient is recorded
    fills_caches: ClassVar[bool] = False  # `fill_cache` is there, so that long prompts are read in whole segments
    layout: ClassVar[Tuple[str, ...]] = ()  # own options that a saved state depends on

    def __init__(self, config: MemoryConfig[Options]):
        super().__init__()
        self.config = config
        self._told = False

    @property
    def slots(self) -> int:
        """The number of rows that come before a segment's tokens, at most."""
        return self.config.mem_len

    @property
    def first_ahead(self) -> int:
        """The first layer, counted from 0, whose slots attend to their right; with `looks_ahead`."""
        return 0

    @property
    def score_scale(self) -> float:
        """The factor of scores and their biases in attention before training."""
        return 1.0

    @property
    def period(self) -> int:
        """The number of tokens from one change of the memory to the next."""
        return self.config.segment_length // self.config.bptt_segments

    def attention_of(self, layer: int) -> Type[SelfAttention]:
        """Return the class of the attention of a layer, counted from 0; all layers have the same, unless overridden."""
        return self.attention

    @classmethod
    def is_layered(cls) -> bool:
        """Tell whether `pass_layer` is all there is to a segment."""
        return cls.pass_layer is not Memory.pass_layer and cls.pass_segment is Memory.pass_segment

    def reset_parameters(self) -> None:
        """Initialise parameters that differ from the default: weights N(0, .02), biases 0."""

    def initial_state(self, x: Tensor) -> State:
        """Return the state before the first segment, for streams embedded like ``x [B, N, d]``."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        state: State,
        layers: Sequence[DecoderLayer],
        positions: Positions,
        lengths: Optional[Tensor] = None,
    ) -> Passage:
        """Pass the embeddings ``x [B, N, d]`` of an update through the layers.

        A memory that carries gradient reads its ``bptt_segments`` segments in turn, or `segments_at_once`. Any other
        reads *x* as one.

        Args:
            lengths: ``[B]`` tokens that are not padding, which is on the right; None if none is.

        Returns:
            The features ``[B, N, d]``, the state after them without gradient, and the means of the segments' losses.
        """
        if not self.carries_gradient:
            return passed_segment(self, self.pass_segment(x, state, layers, positions, lengths))
        passages: List[Passage] = []
        limit = self.segments_at_once if torch.is_grad_enabled() else 1
        at_once = self.period * max(1, min(limit, x.size(1) // self.period))
        for start in range(0, x.size(1), at_once):
            segment = x[:, start : start + at_once]
            left = None if lengths is None else (lengths - start).clamp(0, segment.size(1))
            passages.append(passed_segment(self, self.pass_segment(segment, state, layers, positions, left)))
            state = cast(State, passages[-1].state)
        features = torch.cat([passage.features for passage in passages], dim=1)
        return Passage(features, state.map(constant), _means(passages))

    def pass_segment(
        self,
        x: Tensor,
        state: State,
        layers: Sequence[DecoderLayer],
        positions: Positions,
        lengths: Optional[Tensor] = None,
    ) -> Passage:
        """Pass a segment ``x [B, n, d]``, or `segments_at_once`, through the layers; its state may have a gradient."""
        segment = self.segment(x, state, positions, lengths)
        after: List[LayerState] = []
        asides: List[Tuple[Tensor, ...]] = []
        for n, (layer, before) in enumerate(zip(layers, self.layer_states(state), strict=True)):
            x, of_layer, aside = passed_layer(self, self.pass_layer(n, layer, x, before, segment), x, before)
            after.append(of_layer)
            asides.append(aside)
        losses = self.losses_of(asides, state, lengths) if self.training else {}
        return Passage(x, self.joined(after, state), losses)

    def segment(self, x: Tensor, state: State, positions: Positions, lengths: Optional[Tensor] = None) -> Segment:
        """Return the values that all layers use of ``x [B, n, d]``; they depend on shapes, positions and *lengths*."""
        rows, ahead = reached(self, self.reach(state, x.size(1)), for_positions=True)
        return Segment(x.size(1), together(positions(rows, ahead, x), x), lengths)

    def reach(self, state: State, current: int) -> Tuple[int, Optional[range]]:
        """Return arguments of `Positions`: the number of rows, *current* ones included, and the distances ahead."""
        return current, None

    def rows_held(self, state: State) -> Dict[str, Tuple[int, int]]:
        """Return how many rows a state has, and how many it may have, by the option that says so."""
        return {"--mem-len": (reached(self, self.reach(state, 1))[0] - 1, self.slots)}

    def pass_layer(
        self, n: int, layer: DecoderLayer, rows: Tensor, before: LayerState, segment: Segment
    ) -> LayerPassage:
        """Pass a segment through layer *n*, counted from 0.

        Args:
            rows: the segment's embeddings ``[B, n, d]`` in layer 0, else the output of the layer below.
            before: the layer's part of the state, as `layer_states` returns it.
        """
        raise NotImplementedError

    def layer_states(self, state: State) -> List[LayerState]:
        """Return each layer's part of a state: its entry of every tuple, and the tensors that all layers share."""
        parts: List[List[Tensor]] = [[] for _ in range(self.config.layers)]
        for value in state.own().values():
            for part, tensor in zip(parts, value if isinstance(value, tuple) else [value] * len(parts), strict=True):
                part.append(tensor)
        return [tuple(part) for part in parts]

    def joined(self, parts: Sequence[LayerState], like: State) -> State:
        """Return the state with `layer_states` *parts*; a tensor that all layers share is taken from the last.

        *like* is another state, which tells such tensors from tuples.
        """
        columns = zip(like.own().items(), zip(*parts, strict=True), strict=True)
        values: Dict[str, Any] = {k: of if isinstance(value, tuple) else of[-1] for (k, value), of in columns}
        return type(like)(**values)

    def fill_cache(self, cache: AnyCache, parts: Sequence[LayerState], layers: Sequence[DecoderLayer]) -> None:
        """Fill a new cache's slots from a full memory, whose `layer_states` are *parts*; with `fills_caches`."""
        raise NotImplementedError

    def losses_of(
        self, asides: Sequence[Tuple[Tensor, ...]], before: State, lengths: Optional[Tensor]
    ) -> Dict[str, Tensor]:
        """Return the losses of a segment in training, from the tensors that `pass_layer` put aside in each layer."""
        return {}

    def tell_untrained(self, untrained: str) -> None:
        """Warn once, with ``--bptt-segments 1``, that *untrained* is not trained."""
        if self.config.bptt_segments == 1 and not self._told:
            logger.warning("--bptt-segments 1 trains nothing that %s: pass 2 or more", untrained)
            self._told = True


def constant(tensor: Tensor) -> Tensor:
    """Return *tensor* without gradient. A view is copied, as it would keep all of its storage alive."""
    return tensor.detach().clone() if tensor._is_view() else tensor.detach()


def _means(passages: Sequence[Passage]) -> Dict[str, Tensor]:
    """Return the mean of each loss over tokens, of which the last segment may have fewer."""
    weights = [passage.features.size(1) for passage in passages]
    losses: Dict[str, Tensor] = {}
    for passage, weight in zip(passages, weights, strict=True):
        for name, loss in passage.losses.items():
            share = loss * (weight / sum(weights))
            losses[name] = losses[name] + share if name in losses else share
    return losses


def last_rows(rows: Tensor, count: int, dim: int = 1) -> Tensor:
    """Return a copy of the last *count* rows without gradient; a view would keep all of them alive."""
    count = min(count, rows.size(dim))
    return rows.detach().narrow(dim, rows.size(dim) - count, count).clone()


def last_of_both(past: Tensor, new: Tensor, count: int) -> Tensor:
    """Return `last_rows` of ``past [B, m, d]`` and ``new [B, N, d]`` behind, without joining what is not kept."""
    return last_rows(new if new.size(1) >= count else torch.cat([past, new.detach()], dim=1), count)


def _check(memory: Type[Memory[Any, Any]]) -> None:
    """Refuse a class that lacks something, whose options would be lost, or whose names are another's.

    Raises:
        ValueError: with the remedy.
    """
    check_spelling(memory, Memory)
    check_options(memory.options, MemoryOptions)
    check_spelling(memory.options, MemoryOptions, [f.name for f in fields(memory.options)])
    if "cache" not in vars(memory):
        raise ValueError(
            f"{memory.__name__} names no cache for decoding: write cache = FrozenCache if a slot has the keys and "
            "values that it had as a token, else a SegmentCache of its own (docs/extending.md)"
        )
    check_names(memory, {name: MEMORIES[name] for name in MEMORIES.names()})
    check_members(memory.options, MemoryOptions)
    check_methods(memory, Memory)


MEMORIES: Registry[Type[Memory[Any, Any]]] = Registry(
    "memory", _check, own="one of your own goes into lamemo_fairseq/core/memory"
)
