"""Launch kernels on tensors: one banded attention forward, and its gradients.

Shapes: B streams, H heads, Q queries, K keys, D size of a head, U distances, C queries of a chunk,
W columns of position scores.
"""

from typing import Dict, NamedTuple, Optional, Tuple, Union

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
    """The layout of position scores: queries in chunks, so that a query has entries only for distances of its chunk."""

    chunk: int  # C
    chunks: int
    width: int  # W, a multiple of 8

    @classmethod
    def of(cls, x: Inputs) -> "Layout":
        queries, keys = x.q.size(2), x.k.size(2)
        chunk = min(_round_up(keys, 64), queries) if queries >= 2 * keys else queries
        distances = x.band.shift + min(keys, x.band.high + 1) if chunk == queries else keys + chunk - 1
        return cls(chunk, -(-queries // chunk), _round_up(distances, 8))

    def starts(self, shift: int) -> Tuple[int, ...]:
        """Return the table's entry in column 0 of each chunk."""
        return tuple(max(0, shift - (c + 1) * self.chunk + 1) for c in range(self.chunks))


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
    delta, lse = torch.empty_like(saved.new), torch.empty_like(saved.new)
    stored_output, stored_normalizer = (None, None) if x.stored is None else x.stored
    kernels.delta_kernel[(triton.cdiv(queries, 32), batch * heads)](
        saved.output, grad, stored_output, stored_normalizer, saved.new, delta, lse,
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
    kernels.key_kernel[(triton.cdiv(keys, tile.keys), batch * heads)](
        x.q, x.k, x.v, x.bias.content, scores, x.first, x.seed, grad, delta, lse, dk, dv,
        *_strides(x.q), *_strides(x.k), *_strides(x.v), *_score_strides(scores), *_strides(grad),
        *_strides(dk), *_strides(dv),
        **geometry, scale=x.scale, dropout=x.dropout, **_block_sizes(x, tile),
        CONTENT=x.bias.content is not None, POSITION=_has_positions(x.bias), FIRST=x.first is not None, ADD=add,
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
        *_strides(x.k), *_score_strides(scores), *_score_strides(by_position), *_strides(dq),
        **geometry, scale=x.scale, blocks=blocks, **_block_sizes(x, tile),
        POSITION=table is not None, FIRST=x.first is not None, CHUNKED=layout.chunks > 1,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    d_content, d_position = sums.sum((0, 2)).unbind(1)
    learned = x.bias.score is not None and x.bias.score.requires_grad
    d_score = _learned_gradients(x, layout, scores) if learned else None
    return RelativeBias(d_content, None if table is None else d_position, d_table, d_score)


def _clear_unseen(x: Inputs, layout: Layout, scores: Tensor) -> None:
    """Set the entries ``[chunks, H, B, C, W]`` that no visible pair owns to 0."""
    batch, heads, queries, _ = x.q.shape
    low, high = x.band.limits
    padded = layout.chunks * layout.chunk
    kernels.clear_kernel[(triton.cdiv(padded, 64), triton.cdiv(layout.width, 64), batch * heads)](
        scores, x.first, *_score_strides(scores),
        heads, queries, x.k.size(2), layout.width, low, high, layout.chunk, _geometry(x, layout)["shift"],
        BLOCK_Q=64, BLOCK_W=64, FIRST=x.first is not None, CHUNKED=layout.chunks > 1,
    )  # fmt: skip


class PositionScores(NamedTuple):
    """Unscaled position scores, and their inputs; without a table and scores, a buffer for gradients."""

    scores: Tensor  # [chunks, H, B, C, W]
    queries: Optional[Tensor] = None  # [chunks, H, B, C, D], None without a table
    table: Optional[Tensor] = None  # [H, at least U, D], followed by zeros as far as a chunk's columns reach


def _has_positions(bias: RelativeBias) -> bool:
    return bias.table is not None or bias.score is not None


def _position_scores(x: Inputs, layout: Layout) -> PositionScores:
    scores, starts = _score_buffer(x, layout), layout.starts(x.band.shift)
    columns, learned = max(starts) + layout.width, x.bias.score
    if learned is not None:
        learned = _followed_by_zeros(learned.to(x.q.dtype).unsqueeze(-1), columns).transpose(1, 2)
    if x.bias.table is None:
        if learned is not None:
            for c, start in enumerate(starts):
                scores[c].flatten(1, 2).copy_(learned[:, :, start : start + layout.width])
        return PositionScores(scores)
    position_q, table = _position_queries(x, layout), _followed_by_zeros(x.bias.table.to(x.q.dtype), columns)
    for c, start in enumerate(starts):
        seen = slice(start, start + layout.width)
        by_distance, flat_q, flat = table[:, seen].transpose(1, 2), position_q[c].flatten(1, 2), scores[c].flatten(1, 2)
        if learned is None:
            torch.bmm(flat_q, by_distance, out=flat)
        else:
            torch.baddbmm(learned[:, :, seen], flat_q, by_distance, out=flat)
    return PositionScores(scores, position_q, table)


def _followed_by_zeros(by_distance: Tensor, columns: int) -> Tensor:
    """Pad ``[H, U, ..] -> [H, at least columns, ..]``."""
    missing = columns - by_distance.size(1)
    return F.pad(by_distance, (0, 0, 0, missing)) if missing > 0 else by_distance  # F.pad copies in any case


def _position_queries(x: Inputs, layout: Layout) -> Tensor:
    """Return ``[chunks, H, B, C, D]``, so that one product serves all streams of a head; padding queries are 0."""
    batch, heads, queries, size = x.q.shape
    made = x.q.new_empty(layout.chunks, heads, batch, layout.chunk, size)
    padded = layout.chunks * layout.chunk
    kernels.position_query_kernel[(triton.cdiv(padded, 64), batch * heads)](
        x.q, x.bias.position, made, *_strides(x.q),
        heads, batch, queries, layout.chunk, padded,
        D=size, BLOCK_D=_block(size), BLOCK_Q=64, POSITION=x.bias.position is not None,
    )  # fmt: skip
    return made


def _learned_gradients(x: Inputs, layout: Layout, scores: Tensor) -> Tensor:
    """Return the gradients of learned scores ``[H, U]``, float32, from score gradients ``[chunks, H, B, C, W]``."""
    assert x.bias.score is not None
    starts, count = layout.starts(x.band.shift), x.bias.score.size(1)
    by_chunk = scores.sum((2, 3), dtype=torch.float32)  # [chunks, H, W]
    by_distance = by_chunk.new_zeros(by_chunk.size(1), max(count, max(starts) + layout.width))
    for c, start in enumerate(starts):
        by_distance[:, start : start + layout.width] += by_chunk[c]
    return by_distance[:, :count] * x.scale


def _position_gradients(x: Inputs, layout: Layout, made: PositionScores) -> Tuple[Tensor, Tensor]:
    """Return the queries' unscaled gradients, and the table's, from score gradients ``[chunks, H, B, C, W]``."""
    scores, position_q, padded = made
    assert position_q is not None and padded is not None and x.bias.table is not None
    starts = layout.starts(x.band.shift)
    by_position = torch.empty_like(position_q)
    several = torch.zeros_like(padded, dtype=torch.float32) if layout.chunks > 1 else None
    for c, start in enumerate(starts):
        flat = scores[c].flatten(1, 2)
        seen = slice(start, start + layout.width)
        torch.bmm(flat, padded[:, seen], out=by_position[c].flatten(1, 2))
        d_seen = torch.bmm(flat.transpose(1, 2), position_q[c].flatten(1, 2))
        if several is not None:
            several[:, seen] += d_seen
    d_table, count = d_seen if several is None else several, x.bias.table.size(1)
    return by_position, _followed_by_zeros(d_table[:, :count], count) * x.scale


def _score_buffer(x: Inputs, layout: Layout) -> Tensor:
    batch, heads = x.q.shape[:2]
    return x.q.new_empty(layout.chunks, heads, batch, layout.chunk, layout.width)


def _geometry(x: Inputs, layout: Layout) -> Dict[str, int]:
    low, high = x.band.limits
    shift = x.band.shift if layout.chunks > 1 else min(x.band.shift, layout.chunk - 1)
    sizes = {"H": x.q.size(1), "Q": x.q.size(2), "K": x.k.size(2)}
    return {**sizes, "low": low, "high": high, "C": layout.chunk, "shift": shift}


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
    return (0, 0, 0, 0) if t is None else t.stride()[:4]
