"""Device functions about pairs of a query and a key, shared by the Triton kernels.

Query i sees key j if ``low <= j - i <= high`` and ``j >= first[b]``. Position scores are stored UNSHIFTED, by chunks
of C queries, and by 8 classes of queries: those with the same remainder by 8. In the row of query ``i`` of a chunk, the
score of key j is in column ``j - i // 8 * 8`` plus a multiple of 8. So the skew costs nothing but pointer arithmetic,
and 8 neighbouring keys' scores are one aligned vector. Strides of position scores are in vectors. See README.md.

Names as in `kernels.py`.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def score_rows(p_scores, i, s_chunk, s_class, s_row, C, shift, CHUNKED: tl.constexpr):
    """Return pointers to the queries' rows of position scores, and key 0's columns in them, multiples of 8."""
    if CHUNKED:
        chunk = i // C
        i = i - chunk * C
        p_scores += chunk.to(tl.int64) * s_chunk * 8
        shift = chunk_shift(chunk, C, shift)
    eighth = i // 8
    return p_scores + ((7 - i % 8).to(tl.int64) * s_class + eighth * s_row) * 8, (shift - eighth) * 8


@triton.jit
def chunk_shift(chunk, C, shift):
    """Return the column of key 0 for the first queries of a chunk, in vectors."""
    return tl.minimum(shift - chunk * (C // 8), C // 8 - 1)


@triton.jit
def columns_of(n, first, last, C, chunk, shift, K, W, low, high):
    """Return the range of columns in which queries of class *n* see keys, by their least and greatest eighth."""
    own = chunk * C + 7 - n + shift * 8  # a query's own position
    begin = tl.maximum(tl.maximum(own + low, (shift - last) * 8), 0)
    return begin, tl.minimum(tl.minimum(own + high + 1, K + (shift - first) * 8), W * 8)


@triton.jit
def in_row(column, W):
    """Return which columns a row has; the same for all columns of a vector."""
    return (column >= 0) & (column < W * 8)


@triton.jit
def visible(i, j, Q, K, low, high, first):
    return (i < Q) & (j < K) & (j - i >= low) & (j - i <= high) & (j >= first)


@triton.jit
def written(i, j, K, low, high, first):
    """Return which vectors `key_kernel` writes, of 8 queries from *i* on and 8 keys from *j* on: all with a pair.

    Their hidden pairs are 0. It writes others too, so that this may depend on vectors alone.
    """
    return (j >= 0) & (j < K) & (j + 7 >= first) & (j - i + 7 >= low) & (j - i - 7 <= high)


@triton.jit
def split(first, last, whole, whole_last):
    """Split blocks *first* to *last* by those that need no mask, *whole* to *whole_last* at most.

    Returns how many before these need one, the bounds of these, and how many need one in all.
    """
    begin = tl.minimum(tl.maximum(first, whole), tl.maximum(first, last))
    end = tl.maximum(begin, tl.minimum(last, whole_last))
    before = begin - first
    return before, begin, end, before + tl.maximum(last - end, 0)


@triton.jit
def dropout_mask(seed, i, j, K, dropout):
    """Return the weights that dropout keeps, the same in every kernel: by a pair's number and a head's seed."""
    return tl.rand(seed, i * K + j) >= dropout


@triton.jit
def stream_and_head(H):
    """Return this program's stream and head: the last head first, whose position scores the cache may still hold."""
    n = tl.program_id(1)
    streams = tl.num_programs(1) // H
    return (n % streams).to(tl.int64), (H - 1 - n // streams).to(tl.int64)
