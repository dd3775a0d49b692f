"""Attention of the layer with the store: to its segment, and to stored keys and values without gradient.

Queries and keys have length 1 and no positions; ``score = a_h q . k``, with ``a_h = exp(s_h)`` learned for each head.

Shapes: B streams, R rows, N current tokens, Q queries, H heads, D size of a head, D' its padded size, m <= S stored
rows, k retrieved rows.
"""

from types import ModuleType
from typing import ClassVar, Dict, List, NamedTuple, Optional, Type

import torch
from torch import Tensor, nn

from ...attention import Attended, Operation, RelativeBias
from ...attention.padding import as_wide
from ...kernels.padded import WideRows
from ...kernels.rows import fusable
from ...kernels.unit import unit
from ...layers import AttentionConfig, SelfAttention
from ...positions import LayerBias
from ..unread import with_unread
from . import eager
from .options import DENSE, TOP_K, MemorizingOptions
from .search import in_blocks

NO_POSITIONS = LayerBias(RelativeBias(), None)


def _fused() -> ModuleType:
    from . import fused

    return fused


def _retrieval() -> ModuleType:
    from . import retrieval

    return retrieval


store_attention = Operation("attention to a store", eager.store_attention, _fused)
retrieved_attention = Operation("attention to retrieved rows", eager.retrieved_attention, _retrieval)


class Store(NamedTuple):
    """Keys and values of earlier segments, the oldest first."""

    keys: Tensor  # [B, H, m, D or D']
    values: Tensor  # [B, H, m, D or D']
    hidden: Optional[Tensor] = None  # [B, m], True for rows that must not be read; None if all may be

    def of(self, streams: slice) -> "Store":
        """Return the store of some streams."""
        return Store(self.keys[streams], self.values[streams], None if self.hidden is None else self.hidden[streams])


def appended(stored: Tensor, new: Tensor, size: int) -> Tensor:
    """Return the last *size* of stored rows ``[B, H, m, D or D']`` and new rows after them, as wide as the new ones."""
    left = min(stored.size(2), max(0, size - new.size(2)))
    if fusable(new) and left > 0 and stored.size(3) == new.size(3) and stored.dtype == new.dtype:
        made: Tensor = _retrieval().appended(stored, new, left, min(size, left + new.size(2)))
        return made
    rows = (as_wide(new, stored[:, :, stored.size(2) - left :]), new[:, :, max(0, new.size(2) - size) :])
    return torch.cat(rows, dim=2)


class StoreSelfAttention(SelfAttention):
    """Base of both retrievals."""

    reads_slots: ClassVar[bool]  # whether the segment attends to Transformer-XL's slots, besides the store

    def __init__(self, config: AttentionConfig):
        super().__init__(config)
        assert isinstance(config.options, MemorizingOptions)
        self.options = config.options
        self.log_scale = nn.Parameter(torch.zeros(config.heads))  # s

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise queries and keys, and multiply queries by ``a_h / scale``: attention undoes the scale."""
        exact = torch.promote_types(q.dtype, torch.float32)
        return unit(q, self.log_scale.to(exact).exp() / self.scale), unit(k)

    def own_bias(self, bias: LayerBias) -> LayerBias:
        return NO_POSITIONS

    def forward(self, rows: Tensor, current: int, store: Store) -> tuple[WideRows, Store]:
        """Let the last *current* of ``rows [B, R, d]`` attend to all rows before them, and to a store.

        Returns:
            ``[B, N, d]``, and the current keys and values for the store, without gradient.
        """
        q, k, v = self.project(rows, current, keep_padding=True)
        new = Store(*(t[:, :, -current:].detach() for t in (k, v)))
        return self.merge_heads(self.read(q, k, v, store)), new

    def read(self, q: Tensor, k: Tensor, v: Tensor, store: Store) -> Tensor:
        """Return the read-out of the rows and the store for queries ``[B, H, N, D or D']``, in the shape of *q*."""
        raise NotImplementedError

    def combine(self, q: Tensor, attended: Attended, store: Store) -> Tensor:
        """Mix the read-outs of queries ``[B, H, Q, D or D']`` from their segment with those from the store."""
        width = min(q.size(-1), store.keys.size(-1))  # zeros behind the heads of one alone have no use
        store = store._replace(keys=store.keys[..., :width], values=store.values[..., :width])
        read = self.retrieve(q[..., :width], store)
        share = self.share(attended, read, store).to(q.dtype)
        return torch.lerp(attended.output, as_wide(q, read.output), share)

    def retrieve(self, q: Tensor, store: Store) -> Attended:
        """Read the store alone, with queries ``[B, H, Q, D]``."""
        raise NotImplementedError

    def share(self, attended: Attended, read: Attended, store: Store) -> Tensor:
        """Return the weight of the store's read-out, 0 for streams whose store is empty: ``[.., H, Q or 1, 1]``."""
        raise NotImplementedError


class TopKSelfAttention(StoreSelfAttention):
    """Every query and head reads the k stored rows with the largest scores; ``y = g y_store + (1 - g) y_local``."""

    reads_slots: ClassVar[bool] = True

    def __init__(self, config: AttentionConfig):
        super().__init__(config)
        self.gate = nn.Parameter(torch.zeros(config.heads))  # b, g = sigmoid(b)

    def operations(self) -> List[Operation[...]]:
        return [*super().operations(), retrieved_attention]

    def read(self, q: Tensor, k: Tensor, v: Tensor, store: Store) -> Tensor:
        local = self.causal(q, k, v, NO_POSITIONS, need_normalizer=False)
        if store.keys.size(2) == 0:  # nothing has used the gate
            return with_unread(local.output, [self.gate])
        return self.combine(q, local, store)

    def retrieve(self, q: Tensor, store: Store) -> Attended:
        count = min(self.options.top, store.keys.size(2))
        return retrieved_attention(self.config.backend, q, *store, count, self.scale)

    def share(self, attended: Attended, read: Attended, store: Store) -> Tensor:
        gate = self.gate.to(read.normalizer.dtype).sigmoid()[:, None, None]
        return gate if store.hidden is None else gate * (~store.hidden).any(1)[:, None, None, None]


class DenseSelfAttention(StoreSelfAttention):
    """One softmax over all stored rows and the segment's."""

    reads_slots: ClassVar[bool] = False  # the slots' rows are in the store

    def __init__(self, config: AttentionConfig):
        if config.span is not None:
            raise ValueError(
                "--same-length lets a token see a fixed number of rows, which would hide the store: leave it out, or "
                f"--retrieval {TOP_K} instead of {DENSE}"
            )
        super().__init__(config)

    def operations(self) -> List[Operation[...]]:
        return [store_attention]

    def read(self, q: Tensor, k: Tensor, v: Tensor, store: Store) -> Tensor:
        stored = store.keys, store.values
        return store_attention(self.config.backend, q, k, v, *stored, self._dropout, self.scale).output

    def retrieve(self, q: Tensor, store: Store) -> Attended:
        return in_blocks(q, store.keys.size(2), lambda some, streams: self._retrieve(some, store.of(streams)))

    def _retrieve(self, q: Tensor, store: Store) -> Attended:
        hidden = None if store.hidden is None else store.hidden[:, None, None]
        weights, normalizer = eager.weights_of(q @ store.keys.transpose(-1, -2), hidden, self.scale)
        return Attended(weights.to(store.values.dtype) @ store.values, normalizer)

    def share(self, attended: Attended, read: Attended, store: Store) -> Tensor:
        return (read.normalizer - attended.normalizer).sigmoid().unsqueeze(-1)


RETRIEVALS: Dict[str, Type[StoreSelfAttention]] = {TOP_K: TopKSelfAttention, DENSE: DenseSelfAttention}
