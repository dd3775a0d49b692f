"""Attention within a strict window, and in a recurrent layer to its states besides.

Queries and keys have length 1; ``score = |a_h| (q . k + bias)``, with a_h learned for each head. A token
sees the M tokens before it, and not itself: the residual carries its own row.

Shapes: B streams, N current tokens, m <= M tokens before them, H heads, D size of a head, D' its padded size, S states,
d model width.
"""

from types import ModuleType
from typing import Callable, ClassVar, List, NamedTuple, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention import Operation, RelativeBias
from ...attention.padding import as_wide
from ...kernels.padded import WideRows
from ...kernels.unit import unit
from ...layers import AttentionConfig, SelfAttention
from ...layers.heads import mapped_to_heads
from ...positions import LayerBias
from ..unread import no_contribution
from . import eager
from .options import BlockRecurrentOptions


def _fused() -> ModuleType:
    from . import fused

    return fused


unmasked_attention = Operation("attention to states", eager.unmasked_attention, _fused)


class KeyValues(NamedTuple):
    """Keys, of length 1, and values."""

    keys: Tensor  # [B, H, m, D or D']
    values: Tensor

    def followed_by(self, k: Tensor, v: Tensor) -> "KeyValues":
        """Return these keys and values with new ones ``[B, H, N, D or D']`` after them, as wide as the new ones."""
        pairs = ((self.keys, k), (self.values, v))
        return KeyValues(*(torch.cat([as_wide(new, old.to(new)), new], dim=2) for old, new in pairs))

    def last(self, count: int, size: int) -> "KeyValues":
        """Return the last *count* keys and values, with heads of *size* numbers. They may have a gradient."""
        return KeyValues(*(t[:, :, max(0, t.size(2) - count) :, :size] for t in self))


# From the keys and values of all tokens to those of the states before each window, and the states after the last one.
PassWindows = Callable[[KeyValues], Tuple[List[Tuple[slice, KeyValues]], Tensor]]


class StrictSelfAttention(SelfAttention):
    """Base of both classes of attention: every token attends to the M tokens before it."""

    nearest: ClassVar[int] = 1

    def __init__(self, config: AttentionConfig):
        if config.span is not None:
            raise ValueError(
                "--same-length lets every token see --mem-len tokens, as with --memory block-recurrent it does anyway: "
                "leave it out"
            )
        super().__init__(config)
        assert isinstance(config.options, BlockRecurrentOptions)
        self.first_scale = config.options.recurrent_scale
        self.head_scale = nn.Parameter(torch.full((config.heads,), self.first_scale))  # a

    @property
    def span(self) -> int:
        return self.config.mem_len

    def prepare(self, q: Tensor, k: Tensor) -> Tuple[Tensor, Tensor]:
        """Normalise queries and keys, and multiply queries by ``|a_h| / scale``: attention undoes the scale."""
        return unit(q, length_of(self.head_scale, self.scale)), unit(k)

    def own_bias(self, bias: LayerBias) -> LayerBias:
        """Multiply biases of queries as the queries are, and biases of scores by ``|a_h|``."""
        content, position, table, score = bias.causal
        factor = self.head_scale.abs().unsqueeze(1)
        content, position = (None if t is None else t * (factor / self.scale) for t in (content, position))
        return bias._replace(
            causal=RelativeBias(content, position, table, None if score is None else score * factor.to(score.dtype))
        )

    def read_window(self, rows: Tensor, bias: LayerBias, past: KeyValues) -> Tuple[Tensor, KeyValues]:
        """Let each of ``rows [B, N, d]`` attend to the tokens before it.

        Args:
            bias: of the m + N distances of *past* and current tokens.
            past: ``[B, H, m, D]``, of the tokens before.

        Returns:
            The read-outs ``[B, H, N, D or D']``, and the keys and values ``[B, H, m + N, D or D']`` of all tokens.
        """
        q, k, v = self.project(rows, rows.size(1), keep_padding=True)
        seen = past.followed_by(k, v)
        return self._before(q, seen, self.own_bias(bias)), seen

    def _before(self, q: Tensor, seen: KeyValues, bias: LayerBias) -> Tensor:
        """Let the last N of all tokens attend to the M before each. The first token of a text reads zeros."""
        keys, values = seen
        blind = int(keys.size(2) == q.size(2))
        if keys.size(2) == blind:
            return 0.0 * (q + keys + values) + no_contribution([self.head_scale, *bias.causal])
        attended = self.causal(q[:, :, blind:], keys, values, bias, need_normalizer=False)
        return F.pad(attended.output, (0, 0, blind, 0))


class WindowSelfAttention(StrictSelfAttention):
    """Attention within the window alone."""

    def forward(self, rows: Tensor, bias: LayerBias, past: KeyValues) -> Tuple[WideRows, KeyValues]:
        """Attend as `read_window` does: ``[B, N, d]``, and all keys and values."""
        read_out, seen = self.read_window(rows, bias, past)
        return self.merge_heads(read_out), seen


class RecurrentSelfAttention(StrictSelfAttention):
    """Every token attends to the M tokens before it and, by other queries, to the states from before the window.

    The output projection takes both read-outs, those of tokens first.
    """

    def __init__(self, config: AttentionConfig):
        super().__init__(config)
        width = config.heads * config.head_dim
        self.state_query = nn.Linear(config.embed_dim, width, bias=False)
        self.state_scale = nn.Parameter(torch.full((config.heads,), self.first_scale))
        self.out_proj = nn.Linear(2 * width, config.embed_dim, bias=False)

    def operations(self) -> List[Operation[...]]:
        return [*super().operations(), unmasked_attention]

    def forward(
        self, rows: Tensor, bias: LayerBias, past: KeyValues, pass_windows: PassWindows
    ) -> Tuple[WideRows, Tuple[KeyValues, Tensor]]:
        """Attend as `read_window` does, and to the states from before each window.

        Returns:
            ``[B, N, d]``; all keys and values, and the states after the last window.
        """
        read_out, seen = self.read_window(rows, bias, past)
        windows, states = pass_windows(seen)
        q, factor = self._state_queries(rows, wide=True), length_of(self.state_scale, self.scale)
        cross = torch.cat([self._cross(q[:, :, window], factor, before) for window, before in windows], dim=2)
        return self.merge_heads(torch.cat([read_out, as_wide(read_out, cross)], dim=1)), (seen, states)

    def join(self, read_out: Tensor, rows: Tensor, states: KeyValues) -> Tensor:
        """Return the input of the output projection: ``[B, 2 H, N, D or D']``.

        Args:
            read_out: ``[B, H, N, D or D']``, of the window.
            rows: ``[B, N, d]``.
            states: ``[B, H, S, D]``.
        """
        factor = length_of(self.state_scale, self.scale)
        cross = self._cross(self._state_queries(rows, wide=False), factor, states)
        return torch.cat([read_out, as_wide(read_out, cross)], dim=1)

    def _state_queries(self, rows: Tensor, wide: bool) -> Tensor:
        return mapped_to_heads(self.state_query, rows, 1, self.config.heads, self.config.head_dim, wide)[0]

    def _cross(self, q: Tensor, factor: Tensor, states: KeyValues) -> Tensor:
        return read(self.config.backend, q, factor, states, self.scale)


def length_of(head_scale: Tensor, scale: float) -> Tensor:
    """Return the lengths ``|a_h| / scale`` of queries, for ``a [H]``: ``[H]``, in float32 or wider."""
    return head_scale.to(torch.promote_types(head_scale.dtype, torch.float32)).abs() / scale


def read(backend: str, q: Tensor, factor: Tensor, seen: KeyValues, scale: float) -> Tensor:
    """Let queries ``[B, H, Q, D or D']`` attend to all of *seen*: ``[B, H, Q, D or D']``, as wide as *seen*.

    There are no positions. Queries get the lengths *factor* ``[H]`` that `length_of` returns for the *scale*.
    """
    queries = as_wide(seen.keys, unit(q, factor))
    return unmasked_attention(backend, queries, seen.keys.to(q.dtype), seen.values.to(q.dtype), scale).output
