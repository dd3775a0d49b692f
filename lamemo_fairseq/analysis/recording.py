"""Record attention weights by an attention backend with a listener. Only the analysis registers and selects it.

Its output is that of `eager`. The weights are the result of `eager` with one-hot values, so that no formula is written
twice. Attention that is not causal, such as that to states, is not shown.

Shapes: B streams, H heads, Q queries, K keys, m memory slots.
"""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Iterator, Optional, Protocol, Tuple

import torch
from torch import Tensor

from ..core.attention import BACKENDS, Attended, RelativeBias, causal_attention, counted_attention, eager
from ..core.memory.lookahead import LookaheadWindow, counted_memory_attention, memory_attention
from ..core.memory.lookahead import eager as lookahead
from ..core.memory.memorizing import eager as store
from ..core.memory.memorizing.attention import store_attention
from ..core.memory.token import eager as memory_tokens
from ..core.memory.token.attention import blocks_attention


class Listener(Protocol):
    """A listener that receives attention, layer by layer and segment by segment."""

    def causal(self, layer: int, weights: Tensor) -> None:
        """Receive ``weights [B, H, Q, K]`` to slots and tokens; those of a query add up to 1.

        Queries are the current tokens, and memory tokens if they stand behind those.
        """

    def lookahead(self, layer: int, weights: Tensor, alpha: Tensor, window: LookaheadWindow) -> None:
        """Receive weights ``[B, H, m, K]`` of slots to the *window*, and ``alpha [B, H, m]``, the share they keep."""


class Recording:
    """The backend; `record` gives it a decoder and a listener."""

    def __init__(self) -> None:
        self.listener: Optional[Listener] = None
        self.layer = 0

    def causal_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: RelativeBias,
        span: Optional[int] = None,
        dropout: float = 0.0,
        scale: Optional[float] = None,
        need_normalizer: bool = True,
        nearest: int = 0,
        added: Optional[Tensor] = None,
    ) -> Attended:
        self._tell_causal(q, k, bias, span, scale, nearest, added)
        return eager.causal_attention(q, k, v, bias, span, dropout, scale, need_normalizer, nearest, added)

    def memory_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        biases: Tuple[RelativeBias, RelativeBias],
        window: LookaheadWindow,
        stored: Attended,
        span: Optional[int] = None,
        dropout: float = 0.0,
        scale: Optional[float] = None,
        added: Tuple[Optional[Tensor], Optional[Tensor]] = (None, None),
    ) -> Attended:
        slots = stored.output.size(2)
        causal, ahead = biases
        keys = k[:, :, window.first : slots + 1]
        self._tell_lookahead(q[:, :, :slots], keys, ahead, window, stored, scale, added[1])
        self._tell_causal(q[:, :, slots:], k, causal, span, scale, 0, added[0])
        return lookahead.memory_attention(q, k, v, biases, window, stored, span, dropout, scale, added)

    def _tell_causal(
        self,
        q: Tensor,
        k: Tensor,
        bias: RelativeBias,
        span: Optional[int],
        scale: Optional[float],
        nearest: int,
        added: Optional[Tensor],
    ) -> None:
        if self.listener is not None:
            read = eager.causal_attention(q, k, _one_hot(k), bias, span, 0.0, scale, False, nearest, added)
            self.listener.causal(self.layer, read.output)

    def _tell_lookahead(
        self,
        q: Tensor,
        k: Tensor,
        bias: RelativeBias,
        window: LookaheadWindow,
        stored: Attended,
        scale: Optional[float],
        added: Optional[Tensor],
    ) -> None:
        if self.listener is None:
            return
        nothing = Attended(q.new_zeros(*q.shape[:3], k.size(2)), torch.full_like(stored.normalizer, -torch.inf))
        new = lookahead.lookahead_attention(q, k, _one_hot(k), bias, window, nothing, scale=scale, added=added)
        # The share of the former content, read out by interpolating one with zero.
        one = stored.normalizer.new_ones(*stored.normalizer.shape, 1)
        alpha = lookahead.merge(Attended(one, stored.normalizer), Attended(0 * one, new.normalizer)).output.squeeze(-1)
        self.listener.lookahead(self.layer, new.output, alpha, window)


def _one_hot(k: Tensor) -> Tensor:
    """Return values ``[B, H, K, K]`` that identify the key that they belong to."""
    return torch.eye(k.size(2), dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)


_RECORDING = Recording()
BACKENDS.register("recording")(lambda operation, q: "recording" if operation.has("recording") else "eager")
for _operation in (causal_attention, counted_attention):
    _operation.register("recording", _RECORDING.causal_attention)
blocks_attention.register("recording", partial(memory_tokens.blocks_attention, attend=_RECORDING.causal_attention))
store_attention.register("recording", partial(store.store_attention, attend=_RECORDING.causal_attention))
for _look_ahead in (memory_attention, counted_memory_attention):
    _look_ahead.register("recording", _RECORDING.memory_attention)


@contextmanager
def record(decoder: Any, listener: Listener) -> Iterator[None]:
    """Give *listener* the attention of a decoder in this context; afterwards the decoder is as before."""
    attentions = [layer.self_attn for layer in decoder.layers]
    configs = [attention.config for attention in attentions]

    def enter(layer: int) -> Any:
        def hook(*_: Any) -> None:
            _RECORDING.layer = layer

        return hook

    hooks = [a.register_forward_pre_hook(enter(layer)) for layer, a in enumerate(attentions)]
    try:
        _RECORDING.listener = listener
        for attention in attentions:
            attention.config = replace(attention.config, backend="recording")
        yield
    finally:
        _RECORDING.listener = None
        for hook in hooks:
            hook.remove()
        for attention, config in zip(attentions, configs, strict=True):
            attention.config = config
