"""Self-attention that also refreshes the memory slots by looking ahead.

Shapes: B streams, R = m + N rows, m memory slots, N current tokens, H heads, D size of a head, d model width.
"""

from functools import partial
from types import ModuleType
from typing import List, Optional

import torch
from torch import Tensor

from ...attention import Attended, Operation, blocked
from ...attention.padding import as_wide, bias_for
from ...kernels.padded import WideRows
from ...layers import SelfAttention
from ...positions import LayerBias
from ..base import last_rows
from . import banded, eager
from .windows import LookaheadWindow, check_ahead, check_memory


def _fused() -> ModuleType:
    from . import fused

    return fused


lookahead_attention = Operation(
    "look-ahead attention",
    eager.lookahead_attention,
    _fused,
    partial(banded.lookahead_attention, blocked.attend),
    check_ahead,
)
memory_attention = Operation(
    "attention with look-ahead",
    eager.memory_attention,
    _fused,
    partial(banded.memory_attention, blocked.attend),
    check_memory,
)
# This variant adds further scores for each pair.
counted_memory_attention = Operation("look-ahead by distances counted in the text", eager.memory_attention)


class LookaheadSelfAttention(SelfAttention):
    """Causal attention for the current rows, look-ahead attention and interpolation for the slots."""

    def operations(self) -> List[Operation[...]]:
        ahead = counted_memory_attention if self.config.counted else memory_attention
        return [*super().operations(), ahead]

    def forward(
        self, rows: Tensor, bias: LayerBias, window: Optional[LookaheadWindow], stored: Optional[Attended], current: int
    ) -> tuple[WideRows, Optional[Attended]]:
        """Attend causally, and let the slots look ahead (LaMemo, equations 5 to 9).

        Args:
            rows: ``[B, R, d]``, the slots' rows first.
            window: the keys of the look-ahead; None in segments without, as there are no slots yet or it is not due.
            stored: the slots' read-outs and normalisers so far; None in layers whose slots never look ahead.
            current: N.

        Returns:
            Rows ``[B, R, d]`` (``[B, N, d]`` without a window), and the next segment's stored values. These are
            read-outs ``[B, H, min(R, M), D]`` and normalisers, without gradient; None if *stored* is None.
        """
        if stored is None:
            return self.attend(rows, bias, current), None
        q, k, v = self.project(rows, current if window is None else rows.size(1), keep_padding=True)
        if window is None:
            attended = self.causal(q, k, v, bias, need_normalizer=True)
        else:
            padded = Attended(as_wide(q, stored.output), stored.normalizer)
            attended = self.refresh(q, k, v, bias, window, padded)
        output = attended.output[..., : self.config.head_dim]
        carried = Attended(*(last_rows(t, self.config.mem_len, dim=2) for t in (output, attended.normalizer)))
        kept = min(self.config.mem_len, rows.size(1)) - carried.output.size(2)
        if kept > 0:  # of slots that have not looked ahead
            pairs = zip(stored, carried, strict=True)
            carried = Attended(*(torch.cat([last_rows(old, kept, dim=2).to(new), new], dim=2) for old, new in pairs))
        return self.merge_heads(attended.output), carried

    def refresh(
        self, q: Tensor, k: Tensor, v: Tensor, bias: LayerBias, window: LookaheadWindow, stored: Attended
    ) -> Attended:
        """Let the slots look ahead, and the current rows attend to everything before them.

        Args:
            q, k, v: ``[B, H, R, D or D']``, the slots first.
            stored: as for `forward`, as wide as *q*.

        Returns:
            Read-outs ``[B, H, R, D or D']`` and normalisers ``[B, H, R]``.
        """
        assert bias.ahead is not None
        biases = bias_for(q, bias.causal), bias_for(q, bias.ahead)
        q, k = bias.rotate(q, k)
        heads = q, k, v, biases, window, stored
        options = self.config.span, self._dropout, self.scale
        if bias.counted is None:
            return memory_attention(self.config.backend, *heads, *options)
        slots = stored.output.size(2)
        current = bias.counted.of_current(q[:, :, slots:], self.scale)
        ahead = bias.counted.of_slots(q[:, :, :slots], slice(window.first, slots + 1), self.scale)
        return counted_memory_attention(self.config.backend, *heads, *options, (current, ahead))
