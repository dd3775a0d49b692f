"""A layer's associative memory: a matrix that is read before the layer, and written after it by the delta rule.

Shapes: B streams, R rows, m memory tokens, d model width, e width of a key, F = 6 e its features.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

from ...kernels import aligned
from ...kernels.module_tree import is_plain
from ...kernels.padded import of_weight
from ...kernels.shared import as_residual
from . import delta, recall
from .features import dpfp
from .options import AssociativeOptions

EPSILON = 1e-5  # as in the authors' code


class Associations(NamedTuple):
    """The contents of a layer's memory, in float32 or wider."""

    matrix: Tensor  # [B, F, d], the paper's A transposed
    normalizer: Tensor  # [B, F], the paper's z


class Association(nn.Module):
    """The maps of a layer's memory: ``W_Q``, ``W_K``, ``W_V``, ``w_beta`` and its bias (section 3.1)."""

    def __init__(self, embed_dim: int, options: AssociativeOptions):
        super().__init__()
        self.decay, self.value_unit = options.associative_decay, options.associative_value_lr_scale
        self.query = nn.Linear(embed_dim, options.associative_dim, bias=False)
        self.key = nn.Linear(embed_dim, options.associative_dim, bias=False)
        # Not an `nn.Linear`, whose weights a decoder draws: zeros let a new model read nothing.
        self.value = nn.Parameter(torch.zeros(embed_dim, embed_dim))  # W_V / unit
        self.gate = nn.Linear(embed_dim, 1)

    def read(self, rows: Tensor, past: Associations) -> Tensor:
        """Return ``h + A phi(W_Q h) / (z . phi(W_Q h) + 1e-5)`` of ``rows [B, R, d]``, in their dtype.

        An empty memory leaves the rows as they are, to the last bit.
        """
        if recall.takes(rows, past.matrix):
            residual, shared = as_residual(rows)
            return recall.by_kernels(residual, aligned.mapped(self.query, rows), *past, EPSILON, shared)
        features = dpfp(aligned.mapped(self.query, rows))
        with torch.autocast(rows.device.type, enabled=False):
            read_out = _recalled(features, past) / _overlap(features, past)
        return rows + read_out.to(rows.dtype)

    def write(self, rows: Tensor, past: Optional[Associations]) -> Associations:
        """Write the ``rows [B, m, d]`` of all memory tokens together: each one reads the memory as it was before.

        ``A += sum_i beta_i (c_i v_i - A phi(k_i) / b_i) phi(k_i)^T`` and ``z += sum_i gamma_i phi(k_i)``. The share
        gamma_i of the key that z does not have is without gradient.

        In the paper ``c_i = 1`` and ``b_i = n_i = z . phi(k_i) + 1e-5``. If keys overlap with one another more than
        with z, they then subtract more than A has. A changes its sign and grows in every segment. Here
        ``b_i = max(n_i, sum_j beta_j phi(k_j) . phi(k_i))``, with which no write enlarges what A has. The share c_i
        of a value is what z has of its bound after the write, at most 1. So a known key reads v_i in the end.

        With a decay below 1, which is not in the paper, A and z are multiplied by it first. What z has of keys from
        earlier weights then fades, and makes room for the keys of later ones.

        Args:
            past: None before the first segment, whose keys are all new.
        """
        maps = self.key, self.gate
        if past is not None and delta.takes(rows, past.matrix) and all(is_plain(m, nn.Linear) for m in maps):
            # One product in place of three.
            weights = self.key.weight, self.value, self.gate.weight
            mapped = aligned.wide_linear(rows, of_weight(self.value, "maps", lambda: torch.cat(weights)))
            return Associations(*delta.by_kernels(mapped, self.gate.bias, *past, EPSILON, self.decay, self.value_unit))
        features = dpfp(aligned.mapped(self.key, rows))
        values = aligned.linear(rows, self.value).to(features.dtype) * self.value_unit
        strength = aligned.mapped(self.gate, rows).to(features.dtype).sigmoid()
        with torch.autocast(rows.device.type, enabled=False):
            if past is None:
                return Associations(features.transpose(1, 2) @ (strength * values), features.sum(1))
            if self.decay < 1:
                past = Associations(self.decay * past.matrix, self.decay * past.normalizer)
            overlap, alike = _overlap(features, past), features @ features.transpose(1, 2)
            size = features.detach().square().sum(-1, keepdim=True) + EPSILON
            unmet = (1 - overlap.detach() / size).clamp(0, 1)
            bound = torch.maximum(overlap, alike @ strength)
            written = ((overlap + alike @ unmet) / bound).clamp(max=1)
            change = strength * (written * values - _recalled(features, past) / bound)
            return Associations(
                past.matrix + features.transpose(1, 2) @ change, past.normalizer + (unmet * features).sum(1)
            )


def _recalled(features: Tensor, past: Associations) -> Tensor:
    """Return ``A phi`` of ``features [B, R, F]``: ``[B, R, d]``."""
    return features @ past.matrix


def _overlap(features: Tensor, past: Associations) -> Tensor:
    """Return ``z . phi + 1e-5`` of ``features [B, R, F]``: ``[B, R, 1]``."""
    return features @ past.normalizer.unsqueeze(-1) + EPSILON
