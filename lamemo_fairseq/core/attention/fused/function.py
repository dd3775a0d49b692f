"""Several banded attentions over one set of projections, as one differentiable function.

Shapes: B streams, H heads, R rows, D size of a head.
"""

import math
from collections import defaultdict
from dataclasses import replace
from typing import Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...kernels.autograd import Context, Function
from ...kernels.rows import draw_seed, heads_like
from ..bands import BandedAttention, grouped
from ..padding import as_wide, bias_for
from ..types import Attended, RelativeBias
from . import launch


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attentions: Sequence[BandedAttention],
    dropout: float,
    scale: Optional[float] = None,
) -> Attended:
    """Return read-outs ``[B, H, R, D]`` and normalisers ``[B, H, R]`` of *attentions*, whose queries together are q."""
    seeds = draw_seed(q, dropout, len(attentions))
    size = q.size(-1)
    scale = 1 / math.sqrt(size) if scale is None else scale
    if q.element_size() == 2 and size % 8:  # rows of 16 bytes, for fast loads and products
        q, k, v = (F.pad(t, (0, -size % 8)) for t in (q, k, v))
        attentions = [_widened(attention, q) for attention in attentions]
    biases = [tensor for attention in attentions for tensor in attention.bias]
    output, normalizer = _Attend.apply(attentions, scale, dropout, seeds, q, k, v, *biases)
    return Attended(output if output.size(-1) == size else output[..., :size], normalizer)


def _inputs(
    attention: BandedAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: RelativeBias,
    scale: float,
    dropout: float,
    seed: Optional[Tensor],
) -> launch.Inputs:
    queries, keys = attention.queries, attention.keys
    stored = None if attention.stored is None else (attention.stored.output, attention.stored.normalizer)
    return launch.Inputs(
        q[:, :, queries],
        k[:, :, keys],
        v[:, :, keys],
        bias,
        attention.band,
        attention.first,
        stored,
        attention.eps,
        scale,
        dropout,
        seed,
    )


class _AttendContext(Context):
    attentions: List[BandedAttention]  # without their tensors
    scale: float
    dropout: float
    seeds: List[Optional[Tensor]]  # by attention
    first_use: List[int]  # of its content and position bias, by attention


class _Attend(Function):
    @staticmethod
    def forward(
        ctx: _AttendContext,
        attentions: Sequence[BandedAttention],
        scale: float,
        dropout: float,
        seeds: Optional[Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *biases: Optional[Tensor],
    ) -> Tuple[Tensor, Tensor]:
        (output,) = heads_like(q)
        normalizers, saved = [], []
        # A pair's number in its attention seeds its mask: with one seed, those of two attentions would be alike.
        own = [None] * len(attentions) if seeds is None else list(seeds.split(1))
        for attention, bias, seed in zip(attentions, grouped(biases), own, strict=True):
            inputs = _inputs(attention, q, k, v, bias, scale, dropout, seed)
            normalizer, saved_one = launch.forward(inputs, output[:, :, attention.queries])
            normalizers.append(normalizer)
            saved.append(saved_one.new)
        in_order = [
            n
            for _, n in sorted(zip((p.queries.start for p in attentions), normalizers, strict=True), key=lambda x: x[0])
        ]
        normalizer = in_order[0] if len(attentions) == 1 else torch.cat(in_order, dim=2)
        ctx.attentions, ctx.scale = [_without_tensors(p) for p in attentions], scale
        ctx.dropout, ctx.seeds, ctx.first_use = dropout, own, _first_use(grouped(biases))
        # Tensors without gradient are saved too: none of them may change before the backward pass.
        constants = [(p.first, *(p.stored or (None, None))) for p in attentions]
        ctx.save_for_backward(q, k, v, output, *biases, *saved, *(t for three in constants for t in three))
        ctx.mark_non_differentiable(normalizer)
        return output, normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx: _AttendContext, grad: Tensor, _: object) -> Tuple[Optional[Tensor], ...]:
        count = len(ctx.attentions)
        q, k, v, output, *rest = ctx.saved_tensors
        biases, rest = grouped(rest[: 4 * count]), rest[4 * count :]
        news, constants = rest[:count], [rest[count + 3 * n : count + 3 * n + 3] for n in range(count)]
        if q.shape == k.shape:
            dq, dk, dv = heads_like(q, 3)
        else:
            (dq,), (dk, dv) = heads_like(q), heads_like(k, 2)
        gradients: List[Optional[Tensor]] = []
        parts: Dict[int, List[Tensor]] = defaultdict(list)  # of content and position bias, by their first attention
        for n, attention in enumerate(ctx.attentions):
            first, stored_output, stored_normalizer = constants[n]
            stored = None if stored_output is None else Attended(stored_output, stored_normalizer)
            queries, keys = attention.queries, attention.keys
            whole = BandedAttention(queries, keys, attention.band, biases[n], first, stored, attention.eps)
            inputs = _inputs(whole, q, k, v, biases[n], ctx.scale, ctx.dropout, ctx.seeds[n])
            of_vectors, bias_gradients = launch.backward(
                inputs,
                launch.Saved(output[:, :, queries], news[n]),
                grad[:, :, queries],
                dq[:, :, queries],
                dk[:, :, keys],
                dv[:, :, keys],
                add=n > 0,
            )
            parts[ctx.first_use[n]].append(of_vectors)
            gradients += [
                None if b is None or g is None else g.to(b.dtype)
                for b, g in zip(biases[n], bias_gradients, strict=True)
            ]
        for n, summed in parts.items():
            gradients[4 * n : 4 * n + 2] = _vector_gradients(summed, biases[n])
        return None, None, None, None, dq, dk, dv, *gradients


def _first_use(biases: Sequence[RelativeBias]) -> List[int]:
    """Return for each attention the first one with the same content and position bias, the very tensors."""
    return [next(n for n, first in enumerate(biases) if _same_vectors(first, own)) for own in biases]


def _same_vectors(one: RelativeBias, other: RelativeBias) -> bool:
    alike = one.content is other.content and one.position is other.position
    return alike and (one.table is None) == (other.table is None)


def _vector_gradients(parts: List[Tensor], bias: RelativeBias) -> List[Optional[Tensor]]:
    """Return the gradients of a content and a position bias, None for those that have no effect."""
    dtypes = [None if t is None else t.dtype for t in (bias.content, bias.position if bias.table is not None else None)]
    known = {dtype for dtype in dtypes if dtype is not None}
    if not known:
        return [None, None]
    both = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).sum((0, 2))
    if len(known) == 1:
        both = both.to(known.pop())  # one copy, not two
    return [None if dtype is None else one.to(dtype) for one, dtype in zip(both.unbind(1), dtypes, strict=True)]


def _widened(attention: BandedAttention, q: Tensor) -> BandedAttention:
    stored = None if attention.stored is None else attention.stored._replace(output=as_wide(q, attention.stored.output))
    return replace(attention, bias=bias_for(q, attention.bias), stored=stored)


def _without_tensors(attention: BandedAttention) -> BandedAttention:
    return BandedAttention(attention.queries, attention.keys, attention.band, RelativeBias(), eps=attention.eps)
