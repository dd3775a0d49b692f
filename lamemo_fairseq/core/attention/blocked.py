"""Attention block by block in plain PyTorch, for CPUs: what `eager.py` computes, in fewer passes over memory.

The scores of some heads and queries at a time stay in the processor's cache, and keys that none of these queries sees
have no scores. Position scores are a product with the table. Read in rows that are one entry shorter, they have a
column for each key, and the product of the contents is added to them.

Shapes: B streams, H heads, R rows, Q queries, K keys, D size of a head, U distances; E entries, of which each is a
stream's head.
"""

import math
from dataclasses import dataclass
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.autograd import Context, Function
from ..kernels.rows import heads_like
from .bands import UNBOUNDED, Band, BandedAttention, causal_band, grouped
from .operation import Operation
from .types import Attended, RelativeBias

QUERIES = 128  # of a tile
SCORES = 1 << 17  # of a tile and thread, at most: half a megabyte


def why_not(q: Tensor, operation: Optional[Operation[...]] = None) -> Optional[str]:
    """Return why blocks cannot take queries ``q [B, H, Q, D]`` of an operation; None if they can."""
    if operation is not None and not operation.has("blocked"):
        return operation.lacks("blocked")
    if q.device.type != "cpu":
        return f"it is for CPUs, and this is {q.device}"
    if q.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return "it has float32 and float64 alone"
    return None


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: RelativeBias,
    span: Optional[int] = None,
    dropout: float = 0.0,
    scale: Optional[float] = None,
    need_normalizer: bool = True,
    nearest: int = 0,
) -> Attended:
    """Attend as `eager.causal_attention` does."""
    band = causal_band(slice(0, q.size(2)), q.size(2), k.size(2), bias, span, nearest)
    return attend(q, k, v, [band], dropout, scale)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attentions: Sequence[BandedAttention],
    dropout: float,
    scale: Optional[float] = None,
) -> Attended:
    """Return read-outs ``[B, H, R, D]`` and normalisers ``[B, H, R]`` of *attentions*, whose queries together are q."""
    scale = 1 / math.sqrt(q.size(-1)) if scale is None else scale
    # Dropout is drawn in this order, as in eager attention.
    attentions = sorted(attentions, key=lambda attention: int(attention.queries.start))
    biases = [tensor for attention in attentions for tensor in attention.bias]
    output, normalizer = _Attend.apply(attentions, scale, dropout, torch.is_grad_enabled(), q, k, v, *biases)
    return Attended(output, normalizer)


class _Tile(NamedTuple):
    """The pairs of some entries, queries and keys."""

    entries: slice
    queries: slice
    keys: slice
    columns: slice  # of the table
    first: int  # of the columns, the first query's and first key's; each query begins one earlier
    hidden: List[Tuple[slice, Tensor]]  # some of the keys, and [Q, K], True for pairs that do not see each other

    def by_key(self, by_distance: Tensor) -> Tensor:
        """Return a view ``[E, Q, K]`` of scores ``[E, Q, U]``; pairs without an entry have any, and are hidden."""
        entries, queries, width = by_distance.shape
        shape, start = (entries, queries, self.keys.stop - self.keys.start), by_distance.storage_offset() + self.first
        return by_distance.as_strided(shape, (queries * width, width - 1, 1), start)

    def by_distance(self, by_key: Tensor) -> Tensor:
        """Return scores ``[E, Q, K]`` as a view ``[E, Q, U]`` of larger rows, zero where no pair is."""
        entries, queries, keys = by_key.shape
        width = keys + queries  # no two pairs share an element
        rows = by_key.new_zeros(entries, queries, width)
        rows.as_strided(by_key.shape, (queries * width, width - 1, 1), queries - 1).copy_(by_key)
        before = queries - 1 - self.first
        return rows[..., before : before + self.columns.stop - self.columns.start]

    def of_queries(self, t: Tensor) -> Tensor:
        return t[self.entries, self.queries]

    def of_keys(self, t: Tensor) -> Tensor:
        return t[self.entries, self.keys]

    def of_heads(self, t: Tensor) -> Tensor:
        """Return the tile's part ``[E, U, ..]`` of ``t [H, U, ..]``."""
        part, streams = t[:, self.columns], self._size // len(t)
        return part.repeat(streams, *[1] * (t.dim() - 1)) if streams > 1 else part[self._heads(t)]

    def add_to_heads(self, t: Tensor, gradient: Tensor) -> None:
        """Add ``[E, U, ..]`` to the tile's part of ``t [H, U, ..]``."""
        part = t[:, self.columns]
        if len(gradient) > len(t):
            part.add_(gradient.unflatten(0, (-1, len(t))).sum(0))
        else:
            part[self._heads(t)].add_(gradient)

    def _heads(self, t: Tensor) -> slice:
        start = self.entries.start % len(t)
        return slice(start, start + self._size)

    @property
    def _size(self) -> int:
        return int(self.entries.stop - self.entries.start)


@dataclass(frozen=True)
class _Inputs:
    """Queries and biases of one attention; scaled, but for the table."""

    content: Tensor  # [E, Q, D], with the content bias
    position: Optional[Tensor]  # [E, Q, D], with the position bias; None without a table
    table: Optional[Tensor]  # [H, U, D]
    score: Optional[Tensor]  # [H, U]
    first: Optional[Tensor]  # [E, 1, 1], the first key that is visible
    band: Band
    keys: int
    heads: int

    @classmethod
    def of(cls, attention: BandedAttention, bias: RelativeBias, scale: float, q: Tensor) -> "_Inputs":
        """Take the queries ``[B, H, R, D]`` of all attentions."""
        q, heads, first = q[:, :, attention.queries], q.size(1), attention.first
        return cls(
            _scaled(q, bias.content, scale),
            None if bias.table is None else _scaled(q, bias.position, scale),
            bias.table,
            None if bias.score is None else bias.score * scale,
            None if first is None else first.repeat_interleave(heads).view(-1, 1, 1),
            attention.band,
            attention.keys.stop - attention.keys.start,
            heads,
        )

    def tiles(self, threads: int) -> Iterator[_Tile]:
        """Yield tiles that cover all pairs, as large as fits into the caches of *threads*."""
        entries, queries, _ = self.content.shape
        distances = next((t.size(1) for t in (self.table, self.score) if t is not None), UNBOUNDED)
        for start in range(0, queries, QUERIES):
            stop = min(start + QUERIES, queries)
            first, last = max(0, start + self.band.low), min(self.keys, stop + self.band.high)
            count, rows = last - first, stop - start
            most = min(entries, _whole(SCORES * threads // (rows * count), self.heads))
            column = self.band.shift + first - (stop - 1)  # of the last query and the first key
            columns = slice(max(0, column), min(distances, column + count + rows - 1))
            hidden = _hidden(self.band, start, first, rows, count)
            shared = column + rows - 1 - columns.start
            for entry in range(0, entries, most):
                some = slice(entry, min(entry + most, entries))
                yield _Tile(some, slice(start, stop), slice(first, last), columns, shared, hidden)

    def weights(self, k: Tensor, tile: _Tile) -> Tuple[Tensor, Tensor]:
        """Return the softmax ``[E, Q, K]`` over keys ``k [E, K, D]``, and its normalisers ``[E, Q]``."""
        content, k = tile.of_queries(self.content), tile.of_keys(k).transpose(1, 2)
        by_distance = self._by_distance(tile)
        scores = torch.bmm(content, k) if by_distance is None else torch.baddbmm(tile.by_key(by_distance), content, k)
        for keys, hidden in tile.hidden:
            scores[..., keys].masked_fill_(hidden, -math.inf)
        if self.first is not None:
            scores.masked_fill_(torch.arange(tile.keys.start, tile.keys.stop) < self.first[tile.entries], -math.inf)
        weights = scores.softmax(-1)
        # The largest weight is exp(largest score - logsumexp), at least 1 / K.
        return weights, scores.amax(-1) - weights.amax(-1).log()

    def _by_distance(self, tile: _Tile) -> Optional[Tensor]:
        """Return position scores ``[E, Q, U]``; None without any."""
        score = None if self.score is None else tile.of_heads(self.score).unsqueeze(1)
        if self.table is None or self.position is None:
            queries = tile.queries.stop - tile.queries.start
            return None if score is None else score.expand(-1, queries, -1).contiguous()
        position, table = tile.of_queries(self.position), tile.of_heads(self.table).transpose(1, 2)
        return torch.bmm(position, table) if score is None else torch.baddbmm(score, position, table)


def _scaled(q: Tensor, bias: Optional[Tensor], scale: float) -> Tensor:
    """Return ``(q + bias) scale`` of ``q [B, H, Q, D]`` as ``[E, Q, D]``."""
    scaled = q.new_empty(q.shape)
    torch.mul(q, scale, out=scaled) if bias is None else torch.add(q, bias.unsqueeze(1), out=scaled).mul_(scale)
    return scaled.flatten(0, 1)


def _whole(most: int, heads: int) -> int:
    """Return at most *most* entries (at least one): whole streams, or a divisor of the heads."""
    if most >= heads:
        return most - most % heads
    return next(count for count in range(max(1, most), 0, -1) if heads % count == 0)


def _hidden(band: Band, query: int, key: int, queries: int, keys: int) -> List[Tuple[slice, Tensor]]:
    """Return the keys that some of the queries from *query* on do not see, of *keys* from *key* on, and such pairs."""
    pairs = torch.ones(queries, keys, dtype=torch.bool)
    after, before = query + band.high + 1 - key, query + queries - 1 + band.low - key
    hidden = []
    if after < keys:
        hidden.append((slice(after, keys), pairs[:, after:].triu()))
    if before > 0:
        hidden.append((slice(0, before), pairs[:, :before].tril(before - queries)))
    return hidden


@dataclass
class _Gradients:
    """Gradients of one attention's `_Inputs`, keys and values, to be added up tile by tile."""

    content: Tensor  # [E, Q, D]
    position: Optional[Tensor]  # [E, Q, D]
    k: Tensor  # [E, K, D]
    v: Tensor  # [E, K, D]
    table: Optional[Tensor]  # [H, U, D]
    score: Optional[Tensor]  # [H, U]

    @classmethod
    def zeros(cls, x: _Inputs, dk: Tensor, dv: Tensor, wanted: Sequence[bool]) -> "_Gradients":
        """Return zeros; the last two only if the bias's fields are *wanted*."""
        position = None if x.position is None else torch.empty_like(x.position)
        table = None if x.table is None or not wanted[2] else x.table.new_zeros(x.table.shape)
        score = None if x.score is None or not wanted[3] else torch.zeros_like(x.score)
        return cls(torch.empty_like(x.content), position, dk, dv, table, score)

    def unscaled(self, scale: float, wanted: Sequence[bool], dq: Tensor) -> List[Optional[Tensor]]:
        """Write the gradient of the queries ``[B, H, Q, D]``, and return the *wanted* ones of the bias."""
        content = self.content.view(dq.shape).mul_(scale)
        position = None if self.position is None else self.position.view(dq.shape).mul_(scale)
        dq.copy_(content if position is None else content + position)
        return [
            content.sum((0, 2)) if wanted[0] else None,
            position.sum((0, 2)) if wanted[1] and position is not None else None,
            self.table,
            None if self.score is None else self.score.mul_(scale),
        ]

    def add(
        self, x: _Inputs, tile: _Tile, k: Tensor, v: Tensor, saved: Sequence[Tensor], grad: Tensor, delta: Tensor
    ) -> None:
        """Add a tile's share.

        Args:
            saved: the weights ``[E, Q, K]`` and, with dropout, their factors.
            grad: the gradient of the read-outs, ``[E, Q, D]``.
            delta: the sums of products of weights and their gradients, ``[E, Q, 1]``.
        """
        weights, *factors = saved
        grad = tile.of_queries(grad)
        by_key = torch.bmm(grad, tile.of_keys(v).transpose(1, 2))
        for factor in factors:
            by_key.mul_(factor)
        dropped = weights * factors[0] if factors else weights
        tile.of_keys(self.v).add_(torch.bmm(dropped.transpose(1, 2), grad))
        by_key.sub_(tile.of_queries(delta)).mul_(weights)
        tile.of_queries(self.content).copy_(torch.bmm(by_key, tile.of_keys(k)))
        tile.of_keys(self.k).add_(torch.bmm(by_key.transpose(1, 2), tile.of_queries(x.content)))
        if x.table is None and self.score is None:
            return
        by_distance = tile.by_distance(by_key)
        if self.position is not None and x.position is not None and x.table is not None:
            tile.of_queries(self.position).copy_(torch.bmm(by_distance, tile.of_heads(x.table)))
            if self.table is not None:
                tile.add_to_heads(self.table, torch.bmm(by_distance.transpose(1, 2), tile.of_queries(x.position)))
        if self.score is not None:
            tile.add_to_heads(self.score, by_distance.sum(1))


class _AttendContext(Context):
    attentions: Sequence[BandedAttention]
    scale: float
    threads: int  # that the tiles are made for
    saved_of_a_tile: int


class _Attend(Function):
    @staticmethod
    def forward(
        ctx: _AttendContext,
        attentions: Sequence[BandedAttention],
        scale: float,
        dropout: float,
        save: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *biases: Optional[Tensor],
    ) -> Tuple[Tensor, Tensor]:
        (output,) = heads_like(q)
        normalizer = q.new_empty(q.shape[:-1])
        threads, save = torch.get_num_threads(), save and any(ctx.needs_input_grad)
        k_flat, v_flat = _flat(k), _flat(v)
        news, saved = [], []
        for attention, bias in zip(attentions, grouped(biases), strict=True):
            x = _Inputs.of(attention, bias, scale, q)
            read_out, new = torch.empty_like(x.content), x.content.new_empty(x.content.shape[:-1])
            factors = _dropout(x, dropout) if dropout > 0 else None
            for tile in x.tiles(threads):
                weights, tile.of_queries(new)[:] = x.weights(k_flat[:, attention.keys], tile)
                if save:
                    saved.append(weights)
                if factors is not None:
                    factor = tile.of_queries(factors)[..., tile.keys]
                    weights = weights * factor
                    if save:
                        saved.append(factor)
                tile.of_queries(read_out)[:] = torch.bmm(weights, tile.of_keys(v_flat[:, attention.keys]))
            news.append(new.view(q.size(0), q.size(1), -1))
            _merge(attention, Attended(read_out.view(*news[-1].shape, -1), news[-1]), output, normalizer)
        ctx.attentions, ctx.scale, ctx.threads, ctx.saved_of_a_tile = attentions, scale, threads, 1 + (dropout > 0)
        if save:
            ctx.save_for_backward(q, k, v, output, *biases, *news, *saved)
        ctx.mark_non_differentiable(normalizer)
        return output, normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx: _AttendContext, grad: Tensor, _: object) -> Tuple[Optional[Tensor], ...]:
        count = len(ctx.attentions)
        q, k, v, output, *rest = ctx.saved_tensors
        biases, news, saved = grouped(rest[: 4 * count]), rest[4 * count : 5 * count], iter(rest[5 * count :])
        k_flat, v_flat = _flat(k), _flat(v)
        dk_flat, dv_flat = torch.zeros_like(k_flat), torch.zeros_like(v_flat)
        if q.shape == k.shape:
            dq, dk, dv = heads_like(q, 3)
        else:
            (dq,), (dk, dv) = heads_like(q), heads_like(k, 2)
        gradients: List[Optional[Tensor]] = []
        for n, attention in enumerate(ctx.attentions):
            x, keys = _Inputs.of(attention, biases[n], ctx.scale, q), attention.keys
            new_grad, delta = _before_merge(attention, news[n], output, grad)
            wanted = ctx.needs_input_grad[7 + 4 * n : 11 + 4 * n]  # of the bias
            of = _Gradients.zeros(x, dk_flat[:, keys], dv_flat[:, keys], wanted)
            for tile in x.tiles(ctx.threads):
                own = [next(saved) for _ in range(ctx.saved_of_a_tile)]
                of.add(x, tile, k_flat[:, keys], v_flat[:, keys], own, new_grad, delta)
            gradients += of.unscaled(ctx.scale, wanted, dq[:, :, attention.queries])
        dk.copy_(dk_flat.view(k.shape))
        dv.copy_(dv_flat.view(v.shape))
        return None, None, None, None, dq, dk, dv, *gradients


def _flat(heads: Tensor) -> Tensor:
    """Return ``[B, H, R, D]`` as ``[E, R, D]``, contiguous."""
    return heads.contiguous().flatten(0, 1)


def _dropout(x: _Inputs, chance: float) -> Tensor:
    """Return factors ``[E, Q, K]``, the random numbers of which are those of `eager.py`."""
    factors = x.content.new_empty(*x.content.shape[:-1], x.keys)
    return factors.bernoulli_(1 - chance).div_(1 - chance)


def _merge(attention: BandedAttention, new: Attended, output: Tensor, normalizer: Tensor) -> None:
    """Write read-outs and normalisers of one attention among all, merged with those that are stored."""
    into, stored = output[:, :, attention.queries], attention.stored
    if stored is None:
        into.copy_(new.output)
        normalizer[:, :, attention.queries] = new.normalizer
        return
    share, _ = _shares(stored.normalizer, new.normalizer, attention.eps)
    torch.lerp(new.output, stored.output, share.unsqueeze(-1), out=into)
    normalizer[:, :, attention.queries] = torch.logaddexp(stored.normalizer, new.normalizer)


def _shares(stored: Tensor, new: Tensor, eps: float) -> Tuple[Tensor, Tensor]:
    """Return the share ``alpha [B, H, Q]`` of what is stored, and ``-d alpha / d new`` over ``alpha (1 - alpha)``."""
    top = torch.maximum(stored, new)
    of_stored, of_new = (stored - top).exp(), (new - top).exp()
    slope = torch.where(new >= stored, torch.ones_like(new), of_new / (of_new + eps))
    return of_stored / (of_stored + of_new + eps), slope


def _before_merge(attention: BandedAttention, new: Tensor, output: Tensor, grad: Tensor) -> Tuple[Tensor, Tensor]:
    """Return the gradient ``[E, Q, D]`` of one attention's own read-outs, and its ``delta [E, Q, 1]``.

    delta is the product of read-out and gradient, less the gradient of the normaliser, summed over D.
    """
    grad, output = grad[:, :, attention.queries], output[:, :, attention.queries]
    delta = (grad * output).sum(-1)
    if attention.stored is not None:
        stored = (grad * attention.stored.output).sum(-1)
        share, slope = _shares(attention.stored.normalizer, new, attention.eps)
        # The new read-out, times its share, is the merged one less the stored one's part.
        delta = delta - share * stored + share * slope * (stored - delta)
        grad = grad * (1 - share).unsqueeze(-1)
    return _flat(grad), delta.flatten(0, 1).unsqueeze(-1)
