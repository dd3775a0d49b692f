"""Several banded attentions over one set of projections, as one differentiable function.

Shapes: B streams, H heads, R rows, D size of a head.
"""

import math
from dataclasses import dataclass, replace
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...kernels.autograd import Context, Function
from ..padding import as_wide, bias_for
from ..types import Attended, RelativeBias
from . import launch
from .launch import Band


@dataclass(frozen=True)
class Part:
    """One attention: which queries read which keys, and how. The first part of a list reads all keys."""

    queries: slice
    keys: slice
    band: Band
    bias: RelativeBias
    first: Optional[Tensor] = None
    stored: Optional[Attended] = None  # merged with what is read
    eps: float = 0.0  # of the merge


def attend(
    q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Part], dropout: float, scale: Optional[float] = None
) -> Attended:
    """Read-outs ``[B, H, R, D]`` and normalisers ``[B, H, R]`` of the parts, whose queries together are q."""
    seed = torch.randint(1 << 31, (1,), device=q.device, dtype=torch.int32) if dropout > 0 else None
    size = q.size(-1)
    scale = 1 / math.sqrt(size) if scale is None else scale
    if q.element_size() == 2 and size % 8:  # rows of 16 bytes, for fast loads and products
        q, k, v = (F.pad(t, (0, -size % 8)) for t in (q, k, v))
        parts = [_widened(part, q) for part in parts]
    biases = [tensor for part in parts for tensor in part.bias]
    output, normalizer = _Attend.apply(parts, scale, dropout, seed, q, k, v, *biases)
    return Attended(output if output.size(-1) == size else output[..., :size], normalizer)


def _inputs(
    part: Part,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: RelativeBias,
    scale: float,
    dropout: float,
    seed: Optional[Tensor],
) -> launch.Inputs:
    rows, keys = part.queries, part.keys
    stored = None if part.stored is None else (part.stored.output, part.stored.normalizer)
    return launch.Inputs(
        q[:, :, rows],
        k[:, :, keys],
        v[:, :, keys],
        bias,
        part.band,
        part.first,
        stored,
        part.eps,
        scale,
        dropout,
        seed,
    )


class _AttendContext(Context):
    parts: List[Part]  # without their tensors
    scale: float
    dropout: float
    seed: Optional[Tensor]


class _Attend(Function):
    @staticmethod
    def forward(
        ctx: _AttendContext,
        parts: Sequence[Part],
        scale: float,
        dropout: float,
        seed: Optional[Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *biases: Optional[Tensor],
    ) -> Tuple[Tensor, Tensor]:
        (output,) = _rows_like(q, 1)
        normalizers, saved = [], []
        for part, bias in zip(parts, _grouped(biases), strict=True):
            inputs = _inputs(part, q, k, v, bias, scale, dropout, seed)
            normalizer, kept = launch.forward(inputs, output[:, :, part.queries])
            normalizers.append(normalizer)
            saved.append(kept.new)
        in_order = [
            n for _, n in sorted(zip((p.queries.start for p in parts), normalizers, strict=True), key=lambda x: x[0])
        ]
        normalizer = in_order[0] if len(parts) == 1 else torch.cat(in_order, dim=2)
        ctx.parts, ctx.scale = [_without_tensors(p) for p in parts], scale
        ctx.dropout, ctx.seed = dropout, seed
        # Tensors that take no gradient, beside those that do: all of them must not change before the backward pass.
        held = [(p.first, *(p.stored or (None, None))) for p in parts]
        ctx.save_for_backward(q, k, v, output, *biases, *saved, *(t for three in held for t in three))
        ctx.mark_non_differentiable(normalizer)
        return output, normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx: _AttendContext, grad: Tensor, _: object) -> Tuple[Optional[Tensor], ...]:
        count = len(ctx.parts)
        q, k, v, output, *rest = ctx.saved_tensors
        biases, rest = _grouped(rest[: 4 * count]), rest[4 * count :]
        news, held = rest[:count], [rest[count + 3 * n : count + 3 * n + 3] for n in range(count)]
        if q.shape == k.shape:
            dq, dk, dv = _rows_like(q, 3)
        else:
            (dq,), (dk, dv) = _rows_like(q, 1), _rows_like(k, 2)
        gradients: List[Optional[Tensor]] = []
        for n, part in enumerate(ctx.parts):
            first, stored_output, stored_normalizer = held[n]
            stored = None if stored_output is None else Attended(stored_output, stored_normalizer)
            part = Part(part.queries, part.keys, part.band, biases[n], first, stored, part.eps)
            rows, keys = part.queries, part.keys
            inputs = _inputs(part, q, k, v, biases[n], ctx.scale, ctx.dropout, ctx.seed)
            found = launch.backward(
                inputs,
                launch.Saved(output[:, :, rows], news[n]),
                grad[:, :, rows],
                dq[:, :, rows],
                dk[:, :, keys],
                dv[:, :, keys],
                add=n > 0,
            )
            gradients += [
                None if b is None or g is None else g.to(b.dtype) for b, g in zip(biases[n], found, strict=True)
            ]
        return None, None, None, None, dq, dk, dv, *gradients


def _widened(part: Part, q: Tensor) -> Part:
    stored = None if part.stored is None else part.stored._replace(output=as_wide(q, part.stored.output))
    return replace(part, bias=bias_for(q, part.bias), stored=stored)


def _rows_like(t: Tensor, count: int) -> Sequence[Tensor]:
    """Empty tensors ``[B, H, R, D]`` whose heads lie side by side, as those of projections do."""
    batch, heads, rows, size = t.shape
    return [part.transpose(1, 2) for part in t.new_empty(batch, rows, count, heads, size).unbind(2)]


def _grouped(biases: Sequence[Optional[Tensor]]) -> List[RelativeBias]:
    return [RelativeBias(*biases[n : n + 4]) for n in range(0, len(biases), 4)]


def _without_tensors(part: Part) -> Part:
    return Part(part.queries, part.keys, part.band, RelativeBias(), eps=part.eps)
