"""Self-attention over ``[cache; read; x; write]``: tokens between two blocks of memory tokens.

Shapes: B streams, R = m + K + N + K rows, m <= M cached rows, K memory tokens a block, N current tokens, P keys,
H heads, D size of a head, D' its padded size, d model width.
"""

from types import ModuleType
from typing import List

from torch import Tensor

from ...attention import Operation
from ...attention.padding import bias_for
from ...kernels.padded import WideRows
from ...layers import SelfAttention
from ...layers.self_attention import AttentionConfig
from ...positions import LayerBias
from . import eager
from .eager import Blocks


def _fused() -> ModuleType:
    from . import fused

    return fused


blocks_attention = Operation("attention of memory tokens", eager.blocks_attention, _fused)


class TokenSelfAttention(SelfAttention):
    """Causal attention for the current rows; memory tokens also attend to those of their block on their right."""

    def __init__(self, config: AttentionConfig):
        if config.span is not None:
            raise ValueError(
                "--same-length would hide the memory tokens from the last tokens of a segment: leave it "
                "out, or pass --memory recurrent instead of token"
            )
        super().__init__(config)

    def operations(self) -> List[Operation[...]]:
        return [blocks_attention]

    def forward(self, rows: Tensor, bias: LayerBias, blocks: Blocks) -> tuple[WideRows, None]:
        """Attend within one layer (Bulatov et al. 2022, section 3.2).

        Args:
            rows: ``[B, R, d]``.
            bias: of R causal distances, and of the distances ``0 .. K-1`` to the right.

        Returns:
            The rows ``[B, K + N + K, d]`` of read block, tokens and write block; without the first in the last layer.
        """
        assert bias.ahead is not None
        queries = rows.size(1) - (blocks.begin if blocks.last else blocks.cached)
        q, k, v = self.project(rows, queries, keep_padding=True)
        q, k = bias.rotate(q, k)
        biases = bias.causal, bias.ahead
        attended = blocks_attention(self.config.backend, q, k, v, *biases, blocks, self._dropout, self.scale)
        return self.merge_heads(attended.output), None

    def block(self, q: Tensor, k: Tensor, v: Tensor, bias: LayerBias) -> Tensor:
        """Let a block of memory tokens ``[B, H, K, D]`` attend to the P keys before and in it: as *q*.

        *bias* is of at least P causal distances, and of the distances ``0 .. K-1`` to the right.
        """
        assert bias.ahead is not None
        q, k = bias.rotate(q, k)
        biases = bias_for(q, bias.causal), bias_for(q, bias.ahead)
        return eager.block_attention(q, k, v, *biases, self._dropout, self.scale)
