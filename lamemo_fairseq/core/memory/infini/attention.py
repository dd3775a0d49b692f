"""Self-attention within a segment, and beside it a matrix of associations that earlier segments have written.

Shapes: B streams, k segments, N tokens of a segment, H heads, D size of a head, D' its padded size, d model width.
"""

from typing import List, NamedTuple, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention.padding import as_wide
from ...kernels.padded import WideRows
from ...layers import AttentionConfig, SelfAttention
from ...positions import LayerBias
from . import fused
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
        self.delta = config.options.memory_update_rule == "delta"
        self.gate_unit = config.options.memory_gate_lr_scale
        self.memory_gate = nn.Parameter(torch.zeros(config.heads))  # beta / unit

    def forward(self, rows: Tensor, bias: LayerBias, past: Associations) -> tuple[WideRows, Associations]:
        """Attend within each segment of ``rows [B k, N, d]``, read *past*, and only then write the segment.

        *past* is of B streams. Every segment reads the associations after the segment before it.

        Returns:
            ``[B k, N, d]``, and the associations after the last segments.
        """
        q, k, v = self.project(rows, rows.size(1), keep_padding=True)
        local = self.causal(q, k, v, bias, need_normalizer=False).output
        before, after = self._histories(past, k, v)
        return self.merge_heads(self.combine(q, local, before)), after

    def combine(self, q: Tensor, local: Tensor, past: Associations) -> Tensor:
        """Mix read-outs: ``sigmoid(beta) A_mem + (1 - sigmoid(beta)) A_dot`` (equation 10).

        A stream without an earlier segment takes *local* as it is.

        Args:
            q: ``[B, H, N, D or D']``, not rotated.
            local: ``[B, H, N, D or D']``, of the attention within the segment.

        Returns:
            As *local*.
        """
        if fused.takes(q, past.matrix):
            gate = (self.memory_gate.to(past.matrix.dtype) * self.gate_unit).sigmoid() * past.written
            return fused.mixed(q, local, past.matrix, past.normalizer, gate, EPS)
        with torch.autocast(q.device.type, enabled=False):
            wide = past._replace(matrix=as_wide(local, past.matrix))
            read_out = _read(self._features(q, past), wide)
            gate = (self.memory_gate.to(read_out.dtype) * self.gate_unit).sigmoid() * past.written
            mixed = torch.lerp(local.to(read_out.dtype), read_out, gate[:, :, None, None])
            return mixed.to(local.dtype)

    def write(self, past: Associations, k: Tensor, v: Tensor) -> Associations:
        """Return the associations after a segment with keys and values ``[B, H, N, D or D']``, k not rotated.

        ``M + sigma(K)^T V``, ``z + sum sigma(K)`` (equation 8). With the delta rule,
        the values that the keys read from M are first subtracted from V, for all rows at once (equation 9). An empty M
        reads as zeros.
        """
        return self._histories(past, k, v)[1]

    def _histories(self, past: Associations, k: Tensor, v: Tensor) -> Tuple[Associations, Associations]:
        """Write the segments ``[B k, H, N, D or D']`` of k and v in turn, after *past* of B streams.

        Returns:
            The associations before each segment, of B k entries, and those after the last ones.
        """
        by_segment, written = (len(past.written), -1), [past]
        if self.delta:
            with torch.autocast(k.device.type, enabled=False):
                segments = (t.unflatten(0, by_segment).unbind(1) for t in self._key_values(past, k, v))
                for key, value in zip(*segments, strict=True):
                    new = value - _read(key, written[-1])
                    written.append(_added(written[-1], key.transpose(-1, -2) @ new, key.sum(-2)))
        else:
            for added in zip(*(t.unflatten(0, by_segment).unbind(1) for t in self._sums(past, k, v)), strict=True):
                written.append(_added(written[-1], *added))
        return _interleaved(written[:-1]), written[-1]

    def _sums(self, past: Associations, k: Tensor, v: Tensor) -> Tuple[Tensor, Tensor]:
        """Return ``sigma(K)^T V`` and ``sum sigma(K)`` of each segment, as precise as *past*."""
        if fused.takes(k, past.matrix):
            return fused.segment_sums(k, v, self.config.head_dim)
        with torch.autocast(k.device.type, enabled=False):
            keys, values = self._key_values(past, k, v)
            return keys.transpose(-1, -2) @ values, keys.sum(-2)

    def _key_values(self, past: Associations, k: Tensor, v: Tensor) -> Tuple[Tensor, Tensor]:
        return self._features(k, past), v[..., : self.config.head_dim].to(past.matrix.dtype)

    def _features(self, heads: Tensor, past: Associations) -> Tensor:
        """Return ``sigma(x) = ELU(x) + 1`` of heads ``[B, H, N, D or D']``: ``[B, H, N, D]`` in the dtype of *past*."""
        return F.elu(heads[..., : self.config.head_dim].to(past.matrix.dtype)) + 1


def _added(past: Associations, matrix: Tensor, normalizer: Tensor) -> Associations:
    return Associations(past.matrix + matrix, past.normalizer + normalizer, torch.ones_like(past.written))


def _interleaved(segments: List[Associations]) -> Associations:
    """Return the associations of k segments as one batch ``[B k, ..]``, the segments of a stream one after another."""
    if len(segments) == 1:
        return segments[0]
    return Associations(*(torch.stack(tensors, dim=1).flatten(0, 1) for tensors in zip(*segments, strict=True)))


def _read(features: Tensor, past: Associations) -> Tensor:
    """Return ``sigma(Q) M / (sigma(Q) z)`` of ``sigma(Q) [B, H, N, D]`` (equation 7): ``[B, H, N, D or D']``."""
    return features @ past.matrix / (features @ past.normalizer.unsqueeze(-1) + EPS)
