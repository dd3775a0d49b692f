"""Launch kernels on tensors: one banded attention forward, and its gradients.

Shapes: B streams, H heads, Q queries, K keys, D size of a head, U distances, C queries of a chunk,
W columns of position scores.
"""

from typing import Dict, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..types import RelativeBias
from . import kernels
from .tiles import Tile, tiles_for

UNBOUNDED = 1 << 30


class Band(NamedTuple):
    """The pairs that see each other, and the entries of the table that hold their distance.

    Query i sees key j if ``low <= j - i <= high``; the pair's entry of the table is ``shift + j - i``.
    """

    low: int
    high: int
    shift: int

    @property
    def limits(self) -> Tuple[int, int]:
        return max(self.low, -UNBOUNDED), min(self.high, UNBOUNDED)


class Saved(NamedTuple):
    """The tensors of a forward pass that its backward pass needs besides the inputs."""

    output: Tensor  # [B, H, Q, D], merged
    new: Tensor  # [B, H, Q], normaliser of the keys alone


class Inputs(NamedTuple):
    """One banded attention."""

    q: Tensor  # [B, H, Q, D]
    k: Tensor  # [B, H, K, D]
    v: Tensor
    bias: RelativeBias
    band: Band
    first: Optional[Tensor]  # [B], the first key that is visible to a stream
    stored: Optional[Tuple[Tensor, Tensor]]  # the queries' earlier read-out and normaliser: [B, H, Q, D] and [B, H, Q]
    eps: float  # of the merge with it
    scale: float
    dropout: float
    seed: Optional[Tensor]  # one integer on the device


class Layout(NamedTuple):
    """The layout of position scores: queries in chunks, so that a query has entries only for distances of its chunk.

    A chunk's queries are in 8 classes, the last one's of 8 neighbours first. Class n's scores are n - 7 columns further
    left than distances alone would have them, so that the score of key 0 is in a column that is a multiple of 8.
    """

    chunk: int  # C, a multiple of 8
    chunks: int
    width: int  # W, a multiple of 8
    shift: int  # column of key 0 for query 0, without chunks

    @classmethod
    def of(cls, x: Inputs) -> "Layout":
        queries, keys = x.q.size(2), x.k.size(2)
        chunked = queries >= 2 * keys
        chunk = min(_round_up(keys, 64), _round_up(queries, 8)) if chunked else _round_up(queries, 8)
        shift = _round_up(x.band.shift, 8)
        chunks = -(-queries // chunk)
        if chunks > 1:
            return cls(chunk, chunks, chunk + _round_up(keys, 8), shift)
        shift = min(shift, chunk)
        return cls(chunk, 1, shift + _round_up(min(keys, x.band.high + 8), 8), shift)

    def starts(self, shift: int) -> Tuple[int, ...]:
        """Return the table's entry in column 0 of the first class of each chunk; it may be negative."""
        firsts = (shift - c * self.chunk for c in range(self.chunks))
        columns = (min(self.shift - c * self.chunk, self.chunk) for c in range(self.chunks))
        return tuple(first - column - 7 for first, column in zip(firsts, columns, strict=True))


def forward(x: Inputs, out: Tensor) -> Tuple[Tensor, Saved]:
    """Attend, and write the read-outs into ``out [B, H, Q, D]``; return the normalisers ``[B, H, Q]`` as well."""
    x, layout = _contiguous(x), Layout.of(x)
    batch, heads, queries, size = x.q.shape
    scores = _position_scores(x, layout).scores if _has_positions(x.bias) else None
    merged = x.q.new_empty(batch, heads, queries, dtype=torch.float32)
    new = merged if x.stored is None else torch.empty_like(merged)
    stored_output, stored_normalizer = (None, None) if x.stored is None else x.stored
    tile = tiles_for(size, x.q.dtype).forward
    kernels.forward_kernel[(triton.cdiv(queries, tile.queries), batch * heads)](
        x.q, x.k, x.v, x.bias.content, scores, x.first, x.seed, stored_output, stored_normalizer, out, merged, new,
        *_strides(x.q), *_strides(x.k), *_strides(x.v), *_score_strides(scores),
        *_strides(stored_output), *_strides(out),
        **_geometry(x, layout), scale=x.scale, dropout=x.dropout, eps=x.eps, **_block_sizes(x, tile),
        CONTENT=x.bias.content is not None, POSITION=scores is not None, FIRST=x.first is not None,
        STORED=x.stored is not None, DROPOUT=x.dropout > 0, CHUNKED=layout.chunks > 1,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return merged, Saved(out, new)


def backward(x: Inputs, saved: Saved, grad: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, add: bool) -> RelativeBias:
    """Compute the gradients of one banded attention.

    Args:
        grad: gradient of the read-outs ``[B, H, Q, D]``.
        dq: written.
        dk, dv: written, or with *add* added to.

    Returns:
        The gradients of the bias, None for its fields that are None; in float32 but for the table.
    """
    x, layout = _contiguous(x), Layout.of(x)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    batch, heads, queries, size = x.q.shape
    keys, table = x.k.size(2), x.bias.table
    all_tiles = tiles_for(size, x.q.dtype)
    rows = saved.new.new_empty(*saved.new.shape, 2)
    stored_output, stored_normalizer = (None, None) if x.stored is None else x.stored
    kernels.delta_kernel[(triton.cdiv(queries, 32), batch * heads)](
        saved.output, grad, stored_output, stored_normalizer, saved.new, rows,
        *_strides(saved.output), *_strides(grad), *_strides(stored_output),
        heads, queries, x.eps,
        D=size, BLOCK_D=_block(size), BLOCK_Q=32, STORED=x.stored is not None,
    )  # fmt: skip

    # The buffer of position scores becomes the one of score gradients, pair by pair.
    made = _position_scores(x, layout)
    scores = made.scores
    geometry = _geometry(x, layout)
    _clear_unseen(x, layout, scores)
    tile = all_tiles.key
    with_content = x.q if x.bias.content is None else (x.q + x.bias.content.unsqueeze(1)).to(x.q.dtype)
    kernels.key_kernel[(triton.cdiv(keys, tile.keys), batch * heads)](
        with_content, x.k, x.v, scores, x.first, x.seed, grad, rows, dk, dv,
        *_strides(with_content), *_strides(x.k), *_strides(x.v), *_score_strides(scores), *_strides(grad),
        *_strides(dk), *_strides(dv),
        **geometry, scale=x.scale, dropout=x.dropout, **_block_sizes(x, tile),
        POSITION=_has_positions(x.bias), FIRST=x.first is not None, ADD=add,
        DROPOUT=x.dropout > 0, CHUNKED=layout.chunks > 1, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip

    by_position = d_table = None
    if table is not None:
        by_position, d_table = _position_gradients(x, layout, made)
    tile = all_tiles.query
    blocks = triton.cdiv(queries, tile.queries)
    sums = x.q.new_empty(batch, heads, blocks, 2, size, dtype=torch.float32)
    kernels.query_kernel[(blocks, batch * heads)](
        x.k, scores, x.first, by_position, dq, sums,
        *_strides(x.k), *_score_strides(scores), *_class_strides(by_position), *_strides(dq),
        **geometry, scale=x.scale, blocks=blocks, **_block_sizes(x, tile),
        POSITION=table is not None, FIRST=x.first is not None, CHUNKED=layout.chunks > 1,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    d_content, d_position = sums.sum((0, 2)).unbind(1)
    learned = x.bias.score is not None and x.bias.score.requires_grad
    d_score = _learned_gradients(x, layout, scores) if learned else None
    return RelativeBias(d_content, None if table is None else d_position, d_table, d_score)


def _clear_unseen(x: Inputs, layout: Layout, scores: Tensor) -> None:
    """Set the entries ``[chunks, H, 8, B, C / 8, W]`` that no visible pair owns to 0."""
    batch, heads, queries, _ = x.q.shape
    low, high = x.band.limits
    padded = layout.chunks * layout.chunk
    kernels.clear_kernel[(triton.cdiv(padded, 64), triton.cdiv(layout.width, 64), batch * heads)](
        scores, x.first, *_score_strides(scores),
        heads, queries, x.k.size(2), low, high, layout.chunk, padded, layout.shift // 8,
        BLOCK_Q=64, BLOCK_W=64, FIRST=x.first is not None, CHUNKED=layout.chunks > 1,
    )  # fmt: skip


class PositionScores(NamedTuple):
    """Unscaled position scores, and their inputs; without a table and scores, a buffer for gradients."""

    scores: Tensor  # [chunks, H, 8, B, C / 8, W]
    queries: Optional[Tensor] = None  # [chunks, H, 8, B, C / 8, D], None without a table
    tables: Sequence[Tensor] = ()  # of each chunk [H * 8, W, D]


def _has_positions(bias: RelativeBias) -> bool:
    return bias.table is not None or bias.score is not None


def _position_scores(x: Inputs, layout: Layout) -> PositionScores:
    scores, learned = _score_buffer(x, layout), x.bias.score
    if learned is not None:
        learned_by_chunk = [t.unsqueeze(1) for t in _by_class(learned.to(x.q.dtype), layout, x.band.shift)]
    if x.bias.table is None:
        if learned is not None:
            for c, by_distance in enumerate(learned_by_chunk):
                _by_batch(scores[c]).copy_(by_distance)
        return PositionScores(scores)
    position_q, tables = _position_queries(x, layout), _by_class(x.bias.table.to(x.q.dtype), layout, x.band.shift)
    for c, table in enumerate(tables):
        by_distance, flat_q, flat = table.transpose(1, 2), _by_batch(position_q[c]), _by_batch(scores[c])
        if learned is None:
            torch.bmm(flat_q, by_distance, out=flat)
        else:
            torch.baddbmm(learned_by_chunk[c], flat_q, by_distance, out=flat)
    return PositionScores(scores, position_q, tables)


def _by_batch(by_class: Tensor) -> Tensor:
    """View ``[H, 8, B, C / 8, ..]`` as ``[H * 8, B * C / 8, ..]``."""
    return by_class.flatten(2, 3).flatten(0, 1)


def _by_class(by_distance: Tensor, layout: Layout, shift: int) -> Sequence[Tensor]:
    """Copy ``[H, U, ..]`` for the columns of each class: for each chunk ``[H * 8, W, ..]``, with zeros beyond U."""
    starts = layout.starts(shift)
    front = max(0, -min(starts))
    behind = max(0, max(starts) + 7 + layout.width - by_distance.size(1))
    padded = F.pad(by_distance, (*(0, 0) * (by_distance.dim() - 2), front, behind))
    windows = padded.unfold(1, layout.width, 1).movedim(-1, 2)  # [H, .., W, ..]
    return [windows[:, front + start :][:, :8].flatten(0, 1) for start in starts]


def _sum_classes(by_class: Tensor, layout: Layout, shift: int, count: int) -> Tensor:
    """Return the gradient in float32 ``[H, U, ..]`` of what `_by_class` copied, from ``[chunks, H, 8, W, ..]``."""
    width, rest = layout.width + 7, (0, 0) * (by_class.dim() - 4)
    # Class n moves n columns to the right: rows are 8 columns longer, then start one column earlier each.
    wide = F.pad(by_class, (*rest, 0, 8)).flatten(2, 3)[:, :, : 8 * width]
    moved = wide.unflatten(2, (8, width)).sum(2, dtype=torch.float32)  # [chunks, H, W + 7, ..]
    starts = layout.starts(shift)
    first, *others = (F.pad(m, (*rest, s, count - width - s)) for m, s in zip(moved, starts, strict=True))
    for other in others:
        first += other
    return first


def _position_queries(x: Inputs, layout: Layout) -> Tensor:
    """Return ``[chunks, H, 8, B, C / 8, D]``: one product serves a class's streams; padding queries are 0."""
    batch, heads, queries, size = x.q.shape
    made = x.q.new_empty(layout.chunks, heads, 8, batch, layout.chunk // 8, size)
    padded = layout.chunks * layout.chunk
    kernels.position_query_kernel[(triton.cdiv(padded, 64), batch * heads)](
        x.q, x.bias.position, made, *_strides(x.q),
        heads, batch, queries, layout.chunk, padded,
        D=size, BLOCK_D=_block(size), BLOCK_Q=64, POSITION=x.bias.position is not None,
    )  # fmt: skip
    return made


def _learned_gradients(x: Inputs, layout: Layout, scores: Tensor) -> Tensor:
    """Return gradients of learned scores ``[H, U]``, float32, from score gradients ``[chunks, H, 8, B, C / 8, W]``."""
    assert x.bias.score is not None
    by_class = scores.sum((3, 4), dtype=torch.float32)
    return _sum_classes(by_class, layout, x.band.shift, x.bias.score.size(1)) * x.scale


def _position_gradients(x: Inputs, layout: Layout, made: PositionScores) -> Tuple[Tensor, Tensor]:
    """Return the queries' unscaled gradients, and the table's, from score gradients ``[chunks, H, 8, B, C / 8, W]``."""
    scores, position_q, tables = made
    assert position_q is not None and x.bias.table is not None
    _, heads, _, size = x.q.shape
    by_position = torch.empty_like(position_q)
    by_class = x.q.new_empty(layout.chunks, heads * 8, layout.width, size)
    for c, table in enumerate(tables):
        flat = _by_batch(scores[c])
        torch.bmm(flat, table, out=_by_batch(by_position[c]))
        torch.bmm(flat.transpose(1, 2), _by_batch(position_q[c]), out=by_class[c])
    by_class = by_class.unflatten(1, (heads, 8))
    return by_position, _sum_classes(by_class, layout, x.band.shift, x.bias.table.size(1)) * x.scale


def _score_buffer(x: Inputs, layout: Layout) -> Tensor:
    batch, heads = x.q.shape[:2]
    return x.q.new_empty(layout.chunks, heads, 8, batch, layout.chunk // 8, layout.width)


def _geometry(x: Inputs, layout: Layout) -> Dict[str, int]:
    low, high = x.band.limits
    sizes = {"H": x.q.size(1), "Q": x.q.size(2), "K": x.k.size(2)}
    return {**sizes, "low": low, "high": high, "C": layout.chunk, "shift": layout.shift // 8}


def _block_sizes(x: Inputs, tile: Tile) -> Dict[str, Union[int, str]]:
    precision = "ieee" if x.q.dtype == torch.float32 else "tf32"  # other dtypes ignore it
    size = x.q.size(-1)
    return {"D": size, "BLOCK_D": _block(size), "BLOCK_Q": tile[0], "BLOCK_K": tile[1], "PRECISION": precision}


def _contiguous(x: Inputs) -> Inputs:
    """Return the inputs with the strides that the kernels assume."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (x.q, x.k, x.v))
    biases = {"content": x.bias.content, "position": x.bias.position}
    bias = x.bias._replace(**{name: t.contiguous() for name, t in biases.items() if t is not None})
    stored = x.stored
    if stored is not None:
        stored = (stored[0] if stored[0].stride(-1) == 1 else stored[0].contiguous(), stored[1].float().contiguous())
    return x._replace(q=q, k=k, v=v, bias=bias, stored=stored)


def _block(size: int) -> int:
    width: int = triton.next_power_of_2(size)
    return max(16, width)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _strides(t: Optional[Tensor]) -> Tuple[int, ...]:
    return (0, 0, 0) if t is None else t.stride()[:3]


def _score_strides(t: Optional[Tensor]) -> Tuple[int, ...]:
    """Return the strides of position scores in vectors of 8 elements."""
    return tuple(stride // 8 for stride in _class_strides(t))


def _class_strides(t: Optional[Tensor]) -> Tuple[int, ...]:
    return (0, 0, 0, 0, 0) if t is None else t.stride()[:5]
