"""Self-attention within a segment, and beside it a matrix of associations that earlier segments have written.

Shapes: B streams, N current tokens, H heads, D size of a head, D' its padded size, d model width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention.padding import as_wide
from ...kernels.padded import WideRows
from ...layers import AttentionConfig, SelfAttention
from ...positions import LayerBias
from .options import InfiniOptions

EPS = 1e-6  # of the read-out's denominator


class Associations(NamedTuple):
    """The memory of a layer's heads: all earlier segments, summed."""

    matrix: Tensor  # [B, H, D, D], from keys to values, float32 or wider
    normalizer: Tensor  # [B, H, D], the sum of all keys, likewise
    written: Tensor  # [B, 1] bool, whether there is an earlier segment


class InfiniSelfAttention(SelfAttention):
    """Causal attention within the segment, mixed head by head with the values that queries read from the associations.

    Both use the same queries, keys and values. The associations have no positions.
    """

    def __init__(self, config: AttentionConfig):
        super().__init__(config)
        assert isinstance(config.options, InfiniOptions)
        self.delta = str(config.options.memory_update_rule) == "delta"
        self.memory_gate = nn.Parameter(torch.zeros(config.heads))  # beta

    def forward(self, rows: Tensor, bias: LayerBias, past: Associations) -> tuple[WideRows, Associations]:
        """Attend within ``rows [B, N, d]``, read *past*, and only then write the segment.

        Returns:
            ``[B, N, d]``, and the associations after the segment.
        """
        q, k, v = self.project(rows, rows.size(1), keep_padding=True)
        local = self.causal(q, k, v, bias, need_normalizer=False).output
        return self.merge_heads(self.combine(q, local, past)), self.write(past, k, v)

    def combine(self, q: Tensor, local: Tensor, past: Associations) -> Tensor:
        """Mix read-outs: ``sigmoid(beta) A_mem + (1 - sigmoid(beta)) A_dot`` (equation 10).

        A stream without an earlier segment takes *local* as it is.

        Args:
            q: ``[B, H, N, D or D']``, not rotated.
            local: ``[B, H, N, D or D']``, of the attention within the segment.

        Returns:
            As *local*.
        """
        with torch.autocast(q.device.type, enabled=False):
            wide = past._replace(matrix=as_wide(local, past.matrix))
            read_out = _read(self._features(q, past), wide)
            gate = self.memory_gate.to(read_out.dtype).sigmoid() * past.written
            mixed = torch.lerp(local.to(read_out.dtype), read_out, gate[:, :, None, None])
            return mixed.to(local.dtype)

    def write(self, past: Associations, k: Tensor, v: Tensor) -> Associations:
        """Return the associations after a segment with keys and values ``[B, H, N, D or D']``, k not rotated.

        ``M + sigma(K)^T V``, ``z + sum sigma(K)`` (equation 8). With the delta rule,
        the values that the keys read from M are first subtracted from V, for all rows at once (equation 9). An empty M
        reads as zeros.
        """
        with torch.autocast(k.device.type, enabled=False):
            keys, values = self._features(k, past), v[..., : self.config.head_dim].to(past.matrix.dtype)
            if self.delta:
                values = values - _read(keys, past)
            matrix = past.matrix + keys.transpose(-1, -2) @ values
            return Associations(matrix, past.normalizer + keys.sum(-2), torch.ones_like(past.written))

    def _features(self, heads: Tensor, past: Associations) -> Tensor:
        """Return ``sigma(x) = ELU(x) + 1`` of heads ``[B, H, N, D or D']``: ``[B, H, N, D]`` in the dtype of *past*."""
        return F.elu(heads[..., : self.config.head_dim].to(past.matrix.dtype)) + 1


def _read(features: Tensor, past: Associations) -> Tensor:
    """Return ``sigma(Q) M / (sigma(Q) z)`` of ``sigma(Q) [B, H, N, D]`` (equation 7): ``[B, H, N, D or D']``."""
    return features @ past.matrix / (features @ past.normalizer.unsqueeze(-1) + EPS)
