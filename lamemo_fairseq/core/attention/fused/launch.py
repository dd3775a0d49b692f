"""Launch kernels on tensors: one banded attention forward, and its gradients.

Shapes: B streams, H heads, Q queries, K keys, D size of a head, U distances, C queries of a chunk,
W columns of position scores.
"""

from typing import Dict, NamedTuple, Optional, Tuple, Union

import torch
import triton
from torch import Tensor

from ...kernels.rows import by_rows
from ...kernels.shared_kernels import block_of
from ..bands import Band
from ..types import RelativeBias
from . import kernels, position_kernels
from .tiles import Tile, tiles_for


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
    Position scores are ``[chunks, H, 8, C / 8, B, W]``.
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
            return cls(chunk, chunks, chunk - 8 + _round_up(keys, 8), shift)
        shift = min(shift, chunk - 8)
        return cls(chunk, 1, shift + max(8, _round_up(min(keys, x.band.high + 8), 8)), shift)


def forward(x: Inputs, out: Tensor, tile: Optional[Tile] = None) -> Tuple[Tensor, Saved]:
    """Attend, and write the read-outs into ``out [B, H, Q, D]``; return the normalisers ``[B, H, Q]`` as well.

    Args:
        tile: another one than that for rows with positions.
    """
    x, layout = _contiguous(x), Layout.of(x)
    batch, heads, queries, size = x.q.shape
    scores = _position_scores(x, layout) if _has_positions(x.bias) else None
    merged = x.q.new_empty(batch, heads, queries, dtype=torch.float32)
    new = merged if x.stored is None else torch.empty_like(merged)
    stored_output, stored_normalizer = (None, None) if x.stored is None else x.stored
    tile = tile or tiles_for(size, x.q.dtype).forward
    if x.dropout:  # its random numbers would not fit
        tile = tile._replace(registers=None)
    kernels.forward_kernel[(triton.cdiv(queries, tile.queries), batch * heads)](
        x.q, x.k, x.v, x.bias.content, scores, x.first, x.seed, stored_output, stored_normalizer, out, merged, new,
        *_strides(x.q), *_strides(x.k), *_strides(x.v), *_score_strides(scores),
        *_strides(stored_output), *_strides(out),
        **_geometry(x, layout), scale=x.scale, dropout=x.dropout, eps=x.eps, **_block_sizes(x, tile),
        CONTENT=x.bias.content is not None, POSITION=scores is not None, FIRST=x.first is not None,
        STORED=x.stored is not None, DROPOUT=x.dropout > 0, CHUNKED=layout.chunks > 1,
        **tile.options(),
    )  # fmt: skip
    return merged, Saved(out, new)


def backward(
    x: Inputs, saved: Saved, grad: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, add: bool
) -> Tuple[Tensor, RelativeBias]:
    """Compute the gradients of one banded attention.

    Args:
        grad: gradient of the read-outs ``[B, H, Q, D]``.
        dq: written.
        dk, dv: written, or with *add* added to.

    Returns:
        Parts ``[B, H, P, 2, D]`` of the gradients of content and position bias, float32, whose sum over streams and
        parts these are; and the gradients of the bias's other fields, None for those that are None.
    """
    learned = x.bias.score is not None and x.bias.score.requires_grad  # a contiguous copy does not tell
    x, layout = _contiguous(x), Layout.of(x)
    grad = by_rows(grad)
    batch, heads, _, size = x.q.shape
    keys, table = x.k.size(2), x.bias.table
    all_tiles = tiles_for(size, x.q.dtype)
    rows = _rows(x, layout, saved, grad)
    # The buffer of position scores becomes the one of score gradients, pair by pair.
    scores = _position_scores(x, layout)
    geometry = _geometry(x, layout)
    tile = all_tiles.key
    kernels.key_kernel[(triton.cdiv(keys, tile.keys), batch * heads)](
        rows.queries, x.k, x.v, scores, x.first, x.seed, grad, rows.numbers, dk, dv,
        *_strides(rows.queries), *_strides(x.k), *_strides(x.v), *_score_strides(scores), *_strides(grad),
        *_strides(dk), *_strides(dv),
        **geometry, scale=x.scale, dropout=x.dropout, **_block_sizes(x, tile),
        POSITION=_has_positions(x.bias), FIRST=x.first is not None, ADD=add,
        DROPOUT=x.dropout > 0, CHUNKED=layout.chunks > 1, **tile.options(),
    )  # fmt: skip

    d_table, d_score = _table_gradients(x, layout, scores, rows.by_class, learned)
    tile = all_tiles.query
    tile = tile._replace(queries=min(tile.queries, block_of(layout.chunk // 8)))
    blocks = 8 * layout.chunks * triton.cdiv(layout.chunk // 8, tile.queries)
    sums = x.q.new_empty(batch, heads, blocks, 2, size, dtype=torch.float32)
    kernels.query_kernel[(blocks, batch * heads)](
        x.k, _table(x), scores, x.first, dq, sums,
        *_strides(x.k), *_table_strides(x), *_score_strides(scores), *_strides(dq),
        **geometry, U=_distances(x.bias), entry=x.band.shift, scale=x.scale, **_block_sizes(x, tile),
        TABLE=table is not None, FIRST=x.first is not None, **tile.options(),
    )  # fmt: skip
    return sums, RelativeBias(table=d_table, score=d_score)


class Rows(NamedTuple):
    """The inputs of the backward pass, by query."""

    numbers: Tensor  # [B, H, Q, 2], float32: the logarithm of the normaliser, in base 2, and delta
    queries: Tensor  # [B, H, Q, D], with the content bias
    by_class: Optional[Tensor]  # [chunks, H, 8, C / 8, B, D], with the position bias; None without a table


def _rows(x: Inputs, layout: Layout, saved: Saved, grad: Tensor) -> Rows:
    batch, heads, queries, size = x.q.shape
    numbers = saved.new.new_empty(*saved.new.shape, 2)
    with_content, by_class = x.q, None
    if x.bias.content is not None:
        with_content = x.q.new_empty(x.q.shape)
    if x.bias.table is not None:
        by_class = x.q.new_empty(layout.chunks, heads, 8, layout.chunk // 8, batch, size)
    stored_output, stored_normalizer = (None, None) if x.stored is None else x.stored
    kernels.row_kernel[(triton.cdiv(queries, 32), batch * heads)](
        saved.output, grad, stored_output, stored_normalizer, saved.new, x.q, x.bias.content, x.bias.position,
        numbers, with_content, by_class,
        *_strides(saved.output), *_strides(grad), *_strides(stored_output), *_strides(x.q), *_strides(with_content),
        *((0,) * 5 if by_class is None else by_class.stride()[:5]),
        H=heads, Q=queries, C=layout.chunk, eps=x.eps,
        D=size, BLOCK_D=block_of(size), BLOCK_Q=32, STORED=x.stored is not None, CONTENT=x.bias.content is not None,
        TABLE=by_class is not None, POSITION=x.bias.position is not None,
    )  # fmt: skip
    return Rows(numbers, with_content, by_class)


def _has_positions(bias: RelativeBias) -> bool:
    return bias.table is not None or bias.score is not None


def _distances(bias: RelativeBias) -> int:
    of = bias.table if bias.table is not None else bias.score
    return 0 if of is None else of.size(1)


def _position_scores(x: Inputs, layout: Layout) -> Tensor:
    """Return unscaled position scores, written where a query sees a key; without a table and scores, a buffer."""
    scores, table, learned = _score_buffer(x, layout), _table(x), x.bias.score
    if not _has_positions(x.bias):
        return scores
    batch, heads, _, size = x.q.shape
    tile = tiles_for(size, x.q.dtype).position
    rows = batch * layout.chunk // 8
    position_kernels.position_kernel[(triton.cdiv(rows, tile.queries), 8, layout.chunks * heads)](
        x.q, x.bias.position, table, None if learned is None else learned.to(x.q.dtype).contiguous(), scores,
        *_strides(x.q), *_table_strides(x), *_score_strides(scores)[:3],
        B=batch, U=_distances(x.bias), entry=x.band.shift, **_geometry(x, layout), **_block_sizes(x, tile),
        TABLE=table is not None, POSITION=x.bias.position is not None, LEARNED=learned is not None,
        **tile.options(),
    )  # fmt: skip
    return scores


def _table(x: Inputs) -> Optional[Tensor]:
    return None if x.bias.table is None else x.bias.table.to(x.q.dtype)


def _table_gradients(
    x: Inputs, layout: Layout, scores: Tensor, by_class: Optional[Tensor], of_learned: bool
) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """Return the gradients of the table, and *of_learned* scores, from score gradients and position queries."""
    table, learned = x.bias.table, x.bias.score if of_learned else None
    if table is None and learned is None:
        return None, None
    batch, heads, _, size = x.q.shape
    tile = tiles_for(size, x.q.dtype).table
    shape, copies, sums = (layout.chunks * heads * 8, layout.width), None, None
    if table is not None:
        copies = scores.new_empty(*shape, size, dtype=torch.float32)
    if learned is not None:
        sums = scores.new_empty(*shape, 1, dtype=torch.float32)
    position_kernels.table_kernel[(triton.cdiv(layout.width, tile.keys), 8, layout.chunks * heads)](
        scores, by_class, x.first, copies, sums, *_score_strides(scores)[:3],
        B=batch, **_geometry(x, layout), **_block_sizes(x, tile),
        TABLE=table is not None, LEARNED=learned is not None, FIRST=x.first is not None,
        **tile.options(),
    )  # fmt: skip
    d_table = d_score = None
    if table is not None and copies is not None:
        d_table = _class_sum(x, layout, copies, torch.empty_like(table))
    if learned is not None and sums is not None:
        d_score = _class_sum(x, layout, sums, sums.new_empty(*learned.shape, 1)).squeeze(2)
    return d_table, d_score


def _class_sum(x: Inputs, layout: Layout, by_class: Tensor, out: Tensor) -> Tensor:
    heads, distances, size = out.shape
    geometry = _geometry(x, layout)
    position_kernels.class_sum_kernel[(triton.cdiv(distances, 16), heads)](
        by_class, out,
        H=heads, U=distances, W=geometry["W"], C=layout.chunk, shift=geometry["shift"], entry=x.band.shift,
        chunks=layout.chunks, scale=x.scale, D=size, BLOCK_D=block_of(size), BLOCK_U=16,
    )  # fmt: skip
    return out


def _score_buffer(x: Inputs, layout: Layout) -> Tensor:
    batch, heads = x.q.shape[:2]
    return x.q.new_empty(layout.chunks, heads, 8, layout.chunk // 8, batch, layout.width)


def _geometry(x: Inputs, layout: Layout) -> Dict[str, int]:
    low, high = x.band.limits
    sizes = {"H": x.q.size(1), "Q": x.q.size(2), "K": x.k.size(2), "W": layout.width // 8}
    return {**sizes, "low": low, "high": high, "C": layout.chunk, "shift": layout.shift // 8}


def _block_sizes(x: Inputs, tile: Tile) -> Dict[str, Union[int, str]]:
    precision = "ieee" if x.q.dtype == torch.float32 else "tf32"  # other dtypes ignore it
    size = x.q.size(-1)
    return {"D": size, "BLOCK_D": block_of(size), "BLOCK_Q": tile[0], "BLOCK_K": tile[1], "PRECISION": precision}


def _contiguous(x: Inputs) -> Inputs:
    """Return the inputs with the strides that the kernels assume."""
    q, k, v = map(by_rows, (x.q, x.k, x.v))
    biases = x.bias._asdict().items()
    bias = x.bias._replace(**{name: t.contiguous() for name, t in biases if t is not None})
    stored = x.stored
    if stored is not None:
        stored = (by_rows(stored[0]), stored[1].float().contiguous())
    return x._replace(q=q, k=k, v=v, bias=bias, stored=stored)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _strides(t: Optional[Tensor]) -> Tuple[int, ...]:
    return (0, 0, 0) if t is None else t.stride()[:3]


def _table_strides(x: Inputs) -> Tuple[int, ...]:
    return (0, 0) if x.bias.table is None else x.bias.table.stride()[:2]


def _score_strides(t: Optional[Tensor]) -> Tuple[int, ...]:
    """Return the strides of position scores in vectors of 8 elements."""
    return (0, 0, 0, 0, 0) if t is None else tuple(stride // 8 for stride in t.stride()[:5])
