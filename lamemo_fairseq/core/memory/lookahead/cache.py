"""What decoding keeps of look-ahead memory, and the refresh of the slots once a segment.

Shapes: B rows, b of them, N tokens of a segment, m <= M memory slots, H heads, D size of a head, d model width.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Dict, List, Optional, Sequence

import torch
from torch import Tensor

from ...attention import BACKENDS, Attended
from ...decoding.cache import Network, Record, SegmentCache, put, take


@dataclass
class LookaheadCache(SegmentCache):
    """Besides keys and values, the fields of `LookaheadState` for slots and tokens alike."""

    embeddings: List[Tensor] = field(default_factory=list)  # one: [B, M + N, d]
    outputs: List[Tensor] = field(default_factory=list)  # a layer but the last: [B, H, M + N, D]
    normalizers: List[Tensor] = field(default_factory=list)  # a layer but the last: [B, H, M + N]

    columns: ClassVar[Dict[str, int]] = {"embeddings": 1, "outputs": 2, "normalizers": 2}
    replayable: ClassVar[bool] = True

    @classmethod
    def empty(cls, memory: Any, rows: int, like: Tensor) -> "LookaheadCache":
        base = SegmentCache.empty(memory, rows, like)
        refreshed, width = memory.config.layers - 1, memory.slots + memory.period
        exact = torch.promote_types(like.dtype, torch.float32)
        return cls(
            **vars(base),
            embeddings=[like.new_zeros(rows, width, like.size(-1))],
            outputs=[torch.zeros_like(base.keys[0]) for _ in range(refreshed)],
            normalizers=[base.keys[0].new_zeros(base.keys[0].shape[:-1], dtype=exact) for _ in range(refreshed)],
        )

    def open(self, rows: Optional[Tensor], slots: int, first: Tensor, network: Network) -> None:
        """Refresh the slots: they depend on the memory and on the segment's first token alone."""
        # The first token decides the refresh however long the segment will be, so it is taken to be whole.
        memory, layers = network.memory, network.layers
        window, mem_len = memory.window(slots, memory.period), memory.slots
        biases = network.positions(slots + 1, window.distances(slots), first)

        def held(buffer: Tensor, dim: int) -> Tensor:
            return take(buffer, rows).narrow(dim, mem_len - slots, slots)

        def hold(buffer: Tensor, new: Tensor) -> None:
            put(buffer.narrow(2, mem_len - slots, slots), rows, new)

        x = torch.cat([held(self.embeddings[0], 1), first], dim=1)
        refreshed_layers: Sequence[Any] = layers[:-1]
        for i, (layer, bias) in enumerate(zip(refreshed_layers, biases, strict=False)):
            attn = layer.self_attn
            stored = Attended(held(self.outputs[i], 2), held(self.normalizers[i], 2))

            def refresh(normed: Tensor, attn=attn, bias=bias, stored=stored, i=i) -> tuple[Tensor, None]:
                q, k, v = attn.project(normed, slots + 1)
                current = attn.causal(q[:, :, slots:], k, v, bias, need_normalizer=False)
                ahead = slice(window.first, slots + 1)
                q, rotated = bias.rotate(q, k)
                refreshed = BACKENDS[attn.config.backend].lookahead_attention(
                    q[:, :, :slots], rotated[:, :, ahead], v[:, :, ahead], bias.ahead, window, stored
                )
                for buffer, new in (
                    (self.keys[i], k[:, :, :slots]),
                    (self.values[i], v[:, :, :slots]),
                    (self.outputs[i], refreshed.output),
                    (self.normalizers[i], refreshed.normalizer),
                ):
                    hold(buffer, new)
                return attn.merge_heads(torch.cat([refreshed.output, current.output], dim=2)), None

            x, _ = layer.around(x, refresh)
        last: Any = layers[-1]
        _, k, v = last.self_attn.project(last.attention_input(x[:, :slots]), 0)
        hold(self.keys[-1], k)
        hold(self.values[-1], v)

    def kept_embeddings(self) -> Optional[Tensor]:
        return self.embeddings[0]

    def record(self, layer: int) -> Record:
        return Record(self.outputs[layer], self.normalizers[layer]) if layer < len(self.outputs) else Record()
