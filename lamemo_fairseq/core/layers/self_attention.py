"""Multi-head self-attention over memory rows and current rows.

Shapes: B streams, R rows (memory, then current), Q queries, H heads, D size of a head, D' its padded size (`heads.py`),
d model width.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, List, Optional

import torch
from torch import Tensor, nn

from ..attention import Attended, Operation, causal_attention, counted_attention
from ..attention.padding import bias_for
from ..kernels import aligned
from ..kernels.module_tree import is_product
from ..kernels.padded import WideRows, newest_of, widened, with_zeros
from ..kernels.shared import shared_of
from ..names import check_spelling
from ..positions import LayerBias
from .heads import project_last, split_heads, wide_heads


@dataclass(frozen=True)
class AttentionConfig:
    """Sizes and choices that every layer's attention shares."""

    embed_dim: int
    heads: int
    head_dim: int
    dropout: float = 0.0
    span: Optional[int] = None  # keys a query sees at most (None: all)
    mem_len: int = 0
    backend: str = "auto"
    counted: bool = False  # whether positions count distances in the text
    options: object = None  # of the memory's own class of options
    memory: str = ""  # its name, for errors


class SelfAttention(nn.Module):
    """Base of a layer's attention: projections around a backend. A subclass defines `forward`, with any arguments."""

    nearest: ClassVar[int] = 0  # the smallest distance of a key that a query sees; 1 hides a token from itself

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_spelling(cls, SelfAttention)

    def __init__(self, config: AttentionConfig):
        super().__init__()
        self.config = config
        for operation in self.operations():
            operation.check(config.backend)  # an error now, not at the first batch
        width = config.heads * config.head_dim
        self.qkv_proj = nn.Linear(config.embed_dim, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, config.embed_dim, bias=False)

    def operations(self) -> List[Operation[...]]:
        """Return all operations that this attention calls by the backend's name; read before there are weights."""
        return [counted_attention if self.config.counted else causal_attention]

    def attend(self, rows: Tensor, bias: LayerBias, queries: int) -> WideRows:
        """Let the last *queries* of ``rows [B, R, d]`` attend to all rows before them: ``[B, Q, d]``."""
        q, k, v = self.project(rows, queries, keep_padding=True)
        attended = self.causal(q, k, v, bias, need_normalizer=False)
        return self.merge_heads(attended.output)

    def project(self, rows: Tensor, queries: int, keep_padding: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries of the last rows, keys and values of all: ``[B, H, Q or R, D]``, D' with *keep_padding*."""
        q, k, v = self._project(rows, queries, keep_padding)
        return (*self.prepare(q, k), v)

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return projected queries and keys ``[B, H, Q or R, D or D']``, which most classes do not change."""
        return q, k

    def own_bias(self, bias: LayerBias) -> LayerBias:
        """Return the bias that this attention uses of its layer's positions; most classes use all of it."""
        return bias

    def _project(self, rows: Tensor, queries: int, keep_padding: bool) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.config.heads
        if not is_product(self.qkv_proj):
            q, k, v = split_heads(self.qkv_proj(rows), 3, heads)
            return q[:, :, rows.size(1) - queries :], k, v
        weight = self.qkv_proj.weight
        matters = aligned.matters(rows)
        if matters and keep_padding and self.config.head_dim % 8:
            weight = wide_heads(weight, self.config.head_dim, dim=0)

        def wide(rows: Tensor) -> Tensor:  # before any cut, as a slice of `PaddedRows` is a plain tensor
            return widened(rows) if matters else rows

        if queries == rows.size(1):
            q, k, v = split_heads(aligned.linear(wide(rows), weight, shared=shared_of(rows)), 3, heads)
            return q, k, v
        width = weight.size(0) // 3
        new = newest_of(rows)
        if new.size(1) == queries and self._learns_once(rows) and not (matters and width % 8):
            fitting = with_zeros(weight, 2) if matters else weight
            q_rows, kv_rows = project_last(wide(new), wide(rows), fitting, shared_of(new))
        else:
            q_weight, kv_weight = weight.split([width, 2 * width])
            every = wide(rows)
            kv_rows = aligned.linear(every, kv_weight)
            q_rows = aligned.linear(every[:, rows.size(1) - queries :], q_weight)
        k, v = split_heads(kv_rows, 2, heads)
        return self._split_heads(q_rows), k, v

    def _learns_once(self, rows: Tensor) -> bool:
        """Return whether gradients may do without gradients of their own: plain operations have these."""
        return self.config.backend != "eager" and not torch.is_autocast_enabled(rows.device.type)

    def causal(self, q: Tensor, k: Tensor, v: Tensor, bias: LayerBias, need_normalizer: bool) -> Attended:
        """Attend causally with unrotated heads ``[B, H, Q or R, D or D']``, by the backend that the options name."""
        self._check_distances(bias, k.size(2))
        q, k = bias.rotate(q, k)
        heads = q, k, v, bias_for(q, bias.causal)
        options = self.span, self._dropout, self.scale, need_normalizer
        if bias.counted is None:
            return causal_attention(self.config.backend, *heads, *options, nearest=self.nearest)
        added = bias.counted.of_current(q, self.scale)
        return counted_attention(self.config.backend, *heads, *options, nearest=self.nearest, added=added)

    def _check_distances(self, bias: LayerBias, keys: int) -> None:
        """Refuse a bias of other distances than those of *keys* keys: each key would get the score of another one.

        Raises:
            ValueError: it is no bias of one layer, or of other distances; the message names the memory, whose `reach`
                has asked for them.
        """
        if not isinstance(bias, LayerBias):
            raise ValueError(
                f"--memory {self.config.memory}: attention got type {type(bias).__name__} as a layer's bias: pass "
                "segment.biases[n]"
            )
        table, score, rotation = bias.causal.table, bias.causal.score, bias.rotation
        known = [tensor.size(1) for tensor in (table, score) if tensor is not None]
        if rotation is not None and rotation.cos.dim() == 2:
            known.append(rotation.cos.size(0))
        if any(count != keys for count in known):
            raise ValueError(
                f"--memory {self.config.memory}: a segment attends to {keys} rows, and the memory's reach returned "
                f"{known[0]}: return the number of slots and of the segment's tokens, the same for all layers"
            )

    def merge_heads(self, heads: Tensor) -> WideRows:
        """Map heads ``[B, H, Q, D or D'] -> [B, Q, d]`` by the output projection."""
        size = self.config.head_dim
        if not is_product(self.out_proj):
            return WideRows(self.out_proj(heads[..., :size].transpose(1, 2).flatten(2)))
        weight = self.out_proj.weight
        if heads.size(-1) > size:
            weight = wide_heads(weight, size, dim=1)
        return aligned.wide_linear(heads.transpose(1, 2).flatten(2), weight)

    @property
    def span(self) -> Optional[int]:
        """The number of keys that a query sees at most (None: all)."""
        return self.config.span

    @property
    def scale(self) -> float:
        """The factor of the scores, also where heads are padded."""
        return 1 / math.sqrt(self.config.head_dim)

    @property
    def _dropout(self) -> float:
        return self.config.dropout if self.training else 0.0

    def _split_heads(self, x: Tensor) -> Tensor:
        return split_heads(x, 1, self.config.heads)[0]


class CausalSelfAttention(SelfAttention):
    """Causal attention over all rows."""

    def forward(self, rows: Tensor, bias: LayerBias, queries: int) -> tuple[WideRows, None]:
        """Return the rows ``[B, Q, d]`` of `attend`, and no second result."""
        return self.attend(rows, bias, queries), None
