"""Triton kernels of banded attention with position scores, forward and backward.

Shapes: B streams, H heads, Q queries, K keys, D size of a head, W columns of position scores.
Names: p_ pointer, s_ stride (in elements), b_ tile, m_ mask. The last dimension of every tensor is contiguous.

Query i sees key j if ``low <= j - i <= high`` and ``j >= first[b]``. Position scores are stored UNSHIFTED, by chunks
of C queries, and by 8 classes of queries: those with the same remainder by 8. In the row of query ``i`` of a chunk, the
score of key j is in column ``j - i // 8 * 8`` plus a multiple of 8. So the skew costs nothing but pointer arithmetic,
and 8 neighbouring keys' scores are one aligned vector. Strides of position scores are in vectors. See README.md.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _score_rows(p_scores, i, s_chunk, s_class, s_row, C, shift, CHUNKED: tl.constexpr):
    """Return pointers to the queries' rows of position scores, and key 0's columns in them, multiples of 8."""
    if CHUNKED:
        chunk = i // C
        i = i - chunk * C
        p_scores += chunk.to(tl.int64) * s_chunk * 8
        shift = tl.minimum(shift - chunk * (C // 8), C // 8)
    eighth = i // 8
    return p_scores + ((7 - i % 8).to(tl.int64) * s_class + eighth * s_row) * 8, (shift - eighth) * 8


@triton.jit
def _in_row(column, s_row):
    """Return which columns a row has; the same for all columns of a vector."""
    return (column >= 0) & (column < s_row * 8)


@triton.jit
def _visible(i, j, Q, K, low, high, first):
    return (i < Q) & (j < K) & (j - i >= low) & (j - i <= high) & (j >= first)


@triton.jit
def _split(first, last, whole, whole_last):
    """Split blocks *first* to *last* by those that need no mask, *whole* to *whole_last* at most.

    Returns how many before these need one, the bounds of these, and how many need one in all.
    """
    begin = tl.minimum(tl.maximum(first, whole), tl.maximum(first, last))
    end = tl.maximum(begin, tl.minimum(last, whole_last))
    before = begin - first
    return before, begin, end, before + tl.maximum(last - end, 0)


@triton.jit
def _dropout_mask(seed, i, j, K, dropout):
    """Return the weights that dropout keeps, the same in every kernel: by a pair's number and a head's seed."""
    return tl.rand(seed, i * K + j) >= dropout


@triton.jit
def _stream_and_head(H):
    """Return this program's stream and head: the last head first, whose position scores the cache may still hold."""
    n = tl.program_id(1)
    streams = tl.num_programs(1) // H
    return (n % streams).to(tl.int64), (H - 1 - n // streams).to(tl.int64)


@triton.jit
def position_query_kernel(
    p_q, p_position, p_out, s_qb, s_qh, s_qi,
    H, B, Q, C, padded,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, POSITION: tl.constexpr,
):  # fmt: skip
    """Write queries plus the position bias as ``[chunks, H, 8, B, C / 8, D]``; padding behind the last query is 0."""
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    i, d = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    m_d = d < D
    p_q += b.to(tl.int64) * s_qb + h * s_qh
    b_q = tl.load(p_q + i[:, None] * s_qi + d[None, :], (i < Q)[:, None] & m_d[None, :], other=0.0)
    if POSITION:
        b_v = tl.load(p_position + h * D + d, m_d, other=0.0).to(tl.float32)
        b_q = tl.where((i < Q)[:, None], b_q.to(tl.float32) + b_v[None, :], 0.0)
    chunk = i // C
    eighth = (i - chunk * C) // 8
    at = p_out + ((((chunk * H + h).to(tl.int64) * 8 + 7 - i % 8) * B + b) * (C // 8) + eighth) * D
    tl.store(at[:, None] + d[None, :], b_q.to(p_out.dtype.element_ty), (i < padded)[:, None] & m_d[None, :])


@triton.jit
def _forward_block(
    b_out, b_sum, b_top, b_q, i, j0, p_row, column, p_k, p_v, s_kj, s_vj, s_pi,
    Q, K, low, high, first, scale, seed, dropout,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    POSITION: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Read a block of keys; MASKED if one is behind the last one or a query does not see it."""
    j, d = j0 + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    m_k, m_v, m_at = None, None, None
    if D < BLOCK_D:
        m_k, m_v = (d < D)[:, None], (d < D)[None, :]
    if MASKED:
        m_k, m_v = (d < D)[:, None] & (j < K)[None, :], (j < K)[:, None] & (d < D)[None, :]
    # [BLOCK_D, BLOCK_K]
    b_k = tl.load(p_k + j[None, :] * s_kj + d[:, None], m_k)
    # [BLOCK_Q, BLOCK_K]
    b_s = tl.dot(b_q, b_k, input_precision=PRECISION)
    if POSITION:
        at = column[:, None] + j[None, :]
        if MASKED:
            m_at = (i < Q)[:, None] & _in_row(at, s_pi)
        b_p = tl.load(p_row[:, None] + at, m_at).to(tl.float32)
        # Triton makes a plain sum the product's start, with fewer registers, but does not load that ahead.
        b_s = (b_s + b_p) * (scale * LOG2E) if MASKED else b_s * (scale * LOG2E) + b_p * (scale * LOG2E)
    else:
        b_s *= scale * LOG2E
    if MASKED:
        b_s = tl.where(_visible(i[:, None], j[None, :], Q, K, low, high, first), b_s, -float("inf"))
    top = tl.maximum(b_top, tl.max(b_s, 1))
    finite = top
    if MASKED:
        # A query that has seen nothing yet has no maximum to subtract.
        finite = tl.where(top == -float("inf"), 0.0, top)
    b_w = tl.exp2(b_s - finite[:, None])
    shrink = tl.exp2(b_top - finite)
    b_sum = b_sum * shrink + tl.sum(b_w, 1)
    if DROPOUT:
        b_w = tl.where(_dropout_mask(seed, i[:, None], j[None, :], K, dropout), b_w / (1 - dropout), 0.0)
    # [BLOCK_K, BLOCK_D]
    b_v = tl.load(p_v + j[:, None] * s_vj + d[None, :], m_v)
    b_out = b_out * shrink[:, None] + tl.dot(b_w.to(b_v.dtype), b_v, input_precision=PRECISION)
    return b_out, b_sum, top


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_content, p_scores, p_first, p_seed, p_stored, p_stored_lse, p_out, p_merged, p_new,
    s_qb, s_qh, s_qi, s_kb, s_kh, s_kj, s_vb, s_vh, s_vj, s_pc, s_ph, s_pr, s_pb, s_pi,
    s_sb, s_sh, s_si, s_ob, s_oh, s_oi,
    H, Q, K, low, high, C, shift, scale, dropout, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    CONTENT: tl.constexpr, POSITION: tl.constexpr, FIRST: tl.constexpr, STORED: tl.constexpr,
    DROPOUT: tl.constexpr, CHUNKED: tl.constexpr,
):  # fmt: skip
    """Compute an online softmax over the keys of a block of queries, then the merge with the stored read-outs.

    Writes read-out and normaliser. With STORED both are merged, and the normaliser of the keys alone is written too.
    """
    block = tl.program_id(0)
    b, h = _stream_and_head(H)
    bh = b * H + h
    i0 = block * BLOCK_Q
    i, d = i0 + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    m_i, m_d = i < Q, d < D
    # [BLOCK_Q, BLOCK_D]
    b_q = tl.load(p_q + b * s_qb + h * s_qh + i[:, None] * s_qi + d[None, :], m_i[:, None] & m_d[None, :], other=0.0)
    if CONTENT:
        b_u = tl.load(p_content + h * D + d, m_d, other=0.0)
        b_q = (b_q.to(tl.float32) + b_u.to(tl.float32)[None, :]).to(b_q.dtype)
    p_k += b * s_kb + h * s_kh
    p_v += b * s_vb + h * s_vh
    p_row, column = i, i
    if POSITION:
        p_row, column = _score_rows(p_scores + (h * s_ph + b * s_pb) * 8, i, s_pc, s_pr, s_pi, C, shift, CHUNKED)
    first = tl.load(p_first + b) if FIRST else 0
    seed = tl.load(p_seed) + bh if DROPOUT else 0
    b_top = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    b_out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)

    start = tl.maximum(tl.maximum(i0 + low, first), 0) // BLOCK_K
    stop = tl.cdiv(tl.minimum(K, i0 + BLOCK_Q + high), BLOCK_K)
    whole = tl.maximum(tl.maximum(i0 + BLOCK_Q - 1 + low, first), 0)
    whole_stop = tl.maximum(tl.minimum(K, i0 + 1 + high), 0)
    if i0 + BLOCK_Q > Q:
        whole_stop = 0
    before, begin, end, edges = _split(start, stop, tl.cdiv(whole, BLOCK_K), whole_stop // BLOCK_K)
    for n in range(begin, end):
        j0 = n * BLOCK_K
        b_out, b_sum, b_top = _forward_block(
            b_out, b_sum, b_top, b_q, i, j0, p_row, column, p_k, p_v, s_kj, s_vj, s_pi,
            Q, K, low, high, first, scale, seed, dropout,
            D, BLOCK_D, BLOCK_K, PRECISION, POSITION, DROPOUT, False,
        )  # fmt: skip
    for n in tl.range(0, edges, num_stages=1):
        j0 = tl.where(n < before, start + n, end + n - before) * BLOCK_K
        b_out, b_sum, b_top = _forward_block(
            b_out, b_sum, b_top, b_q, i, j0, p_row, column, p_k, p_v, s_kj, s_vj, s_pi,
            Q, K, low, high, first, scale, seed, dropout,
            D, BLOCK_D, BLOCK_K, PRECISION, POSITION, DROPOUT, True,
        )  # fmt: skip

    b_sum = tl.where(m_i, b_sum, 1.0)
    b_out = b_out / b_sum[:, None]
    b_new = (b_top + tl.log2(b_sum)) * LN2
    row = bh * Q + i
    if STORED:
        b_stored_lse = tl.load(p_stored_lse + row, m_i, other=0.0)
        m_o = m_i[:, None] & m_d[None, :]
        b_o = tl.load(p_stored + b * s_sb + h * s_sh + i[:, None] * s_si + d[None, :], m_o, other=0.0)
        greater = tl.maximum(b_stored_lse, b_new)
        w_old, w_new = tl.exp(b_stored_lse - greater), tl.exp(b_new - greater)
        # Not 1 - alpha, which would round away the eps.
        b_out = (w_old[:, None] * b_o.to(tl.float32) + (w_new + eps)[:, None] * b_out) / (w_old + w_new + eps)[:, None]
        tl.store(p_new + row, b_new, m_i)
        b_new = greater + tl.log(w_old + w_new)
    tl.store(p_merged + row, b_new, m_i)
    at = p_out + b * s_ob + h * s_oh + i[:, None] * s_oi + d[None, :]
    tl.store(at, b_out.to(p_out.dtype.element_ty), m_i[:, None] & m_d[None, :])


@triton.jit
def delta_kernel(
    p_out, p_grad, p_stored, p_stored_lse, p_new, p_rows,
    s_ob, s_oh, s_oi, s_gb, s_gh, s_gi, s_sb, s_sh, s_si,
    H, Q, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """Write two numbers a query, with which ``dS = exp(S - lse) (dO . V - delta)`` (README.md has the derivation)."""
    block, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    i, d = block * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    m_i = i < Q
    m_o = m_i[:, None] & (d < D)[None, :]
    # [BLOCK_Q, BLOCK_D]
    b_g = tl.load(p_grad + b * s_gb + h * s_gh + i[:, None] * s_gi + d[None, :], m_o, other=0.0).to(tl.float32)
    b_o = tl.load(p_out + b * s_ob + h * s_oh + i[:, None] * s_oi + d[None, :], m_o, other=0.0).to(tl.float32)
    row = bh * Q + i
    delta = tl.sum(b_g * b_o, 1)
    lse = tl.load(p_new + row, m_i, other=0.0)
    if STORED:
        b_o = tl.load(p_stored + b * s_sb + h * s_sh + i[:, None] * s_si + d[None, :], m_o, other=0.0)
        stored_lse = tl.load(p_stored_lse + row, m_i, other=0.0)
        greater = tl.maximum(stored_lse, lse)
        w_old, w_new = tl.exp(stored_lse - greater), tl.exp(lse - greater)
        total, rest = w_old + w_new + eps, w_new + eps
        fresh = (delta - w_old / total * tl.sum(b_g * b_o.to(tl.float32), 1)) * total / rest
        delta = tl.where(stored_lse > lse, w_new / rest * delta + eps / rest * fresh, delta)
        lse += tl.log(total) - tl.log(rest)
    tl.store(p_rows + 2 * row, lse * LOG2E, m_i)
    tl.store(p_rows + 2 * row + 1, delta, m_i)


@triton.jit
def clear_kernel(
    p_scores, p_first, s_pc, s_ph, s_pr, s_pb, s_pi,
    H, Q, K, low, high, C, padded, shift,
    BLOCK_Q: tl.constexpr, BLOCK_W: tl.constexpr, FIRST: tl.constexpr, CHUNKED: tl.constexpr,
):  # fmt: skip
    """Write 0 wherever the buffer of position scores holds no visible pair, padding of the last chunk included."""
    block_i, block_t, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    i0, t0 = block_i * BLOCK_Q, block_t * BLOCK_W
    first = tl.maximum(tl.load(p_first + b), 0) if FIRST else 0
    p_scores += (h * s_ph + b * s_pb) * 8
    i, t = i0 + tl.arange(0, BLOCK_Q), t0 + tl.arange(0, BLOCK_W)
    p_row, column = _score_rows(p_scores, i, s_pc, s_pr, s_pi, C, shift, CHUNKED)
    # The least and the greatest key and distance of the block's pairs, as if all its queries were of one chunk.
    _, key_0 = _score_rows(p_scores, i0, s_pc, s_pr, s_pi, C, shift, CHUNKED)
    i1, t1 = tl.minimum(i0 + BLOCK_Q, padded) - 1, tl.minimum(t0 + BLOCK_W, s_pi * 8) - 1
    one_chunk = i0 // C == i1 // C
    j0, j1 = t0 - key_0, t1 - key_0 + i1 // 8 * 8 - i0 // 8 * 8
    r0, r1 = j0 - i0 // 8 * 8 - 7, j1 - i1 // 8 * 8
    all_seen = one_chunk & (i1 < Q) & (j0 >= first) & (j1 < K) & (r0 >= low) & (r1 <= high)
    if all_seen == 0:
        m_t = (i < padded)[:, None] & (t < s_pi * 8)[None, :]
        zero = tl.zeros([BLOCK_Q, BLOCK_W], p_scores.dtype.element_ty)
        none_seen = one_chunk & ((i0 >= Q) | (j1 < first) | (j0 >= K) | (r1 < low) | (r0 > high))
        at = p_row[:, None] + t[None, :]
        if none_seen:
            tl.store(at, zero, m_t)
        else:
            j = t[None, :] - column[:, None]
            tl.store(at, zero, m_t & (_visible(i[:, None], j, Q, K, low, high, first) == 0))


@triton.jit
def _key_block(
    b_dk, b_dv, b_k, b_v, i0, j, p_q, p_scores, p_grad, p_rows, s_qi, s_gi, s_pc, s_pr, s_pi,
    Q, K, low, high, first, C, shift, scale, seed, dropout,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
    POSITION: tl.constexpr, DROPOUT: tl.constexpr, CHUNKED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the gradients by a block of queries; MASKED if a query is behind the last one or does not see a key."""
    i, d = i0 + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    p_row, column = _score_rows(p_scores, i, s_pc, s_pr, s_pi, C, shift, CHUNKED)
    # [BLOCK_Q, BLOCK_K]
    at = column[:, None] + j[None, :]
    two = (2 * i)[:, None] + tl.arange(0, 2)[None, :]
    m_d, m_i, m_at = None, None, None
    if D < BLOCK_D:
        m_d = (d < D)[None, :]
    if MASKED:
        m_i = (i < Q)[:, None]
        m_d = m_i & (d < D)[None, :]
        m_at = m_i & _in_row(at, s_pi)
    at = p_row[:, None] + at
    # [BLOCK_Q, BLOCK_D]
    b_q = tl.load(p_q + i[:, None] * s_qi + d[None, :], m_d)
    b_g = tl.load(p_grad + i[:, None] * s_gi + d[None, :], m_d)
    lse, delta = tl.split(tl.load(p_rows + two, m_i))
    # [BLOCK_K, BLOCK_Q]
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    if POSITION:
        b_p = tl.trans(tl.load(at, m_at)).to(tl.float32)
        if MASKED:
            b_s = (b_s + b_p) * (scale * LOG2E) - lse[None, :]
        else:  # Triton makes a plain sum the product's start, and does not load that ahead.
            b_s = b_s * (scale * LOG2E) + (b_p * (scale * LOG2E) - lse[None, :])
    else:
        b_s = b_s * (scale * LOG2E) - lse[None, :]
    b_w = tl.exp2(b_s)
    if MASKED:
        b_w = tl.where(_visible(i[None, :], j[:, None], Q, K, low, high, first), b_w, 0.0)
    b_dw = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION)
    b_dropped = b_w
    if DROPOUT:
        mask = _dropout_mask(seed, i[None, :], j[:, None], K, dropout)
        b_dw = tl.where(mask, b_dw / (1 - dropout), 0.0)
        b_dropped = tl.where(mask, b_w / (1 - dropout), 0.0)
    b_dv += tl.dot(b_dropped.to(b_g.dtype), b_g, input_precision=PRECISION)
    b_ds = (b_w * (b_dw - delta[None, :])).to(b_q.dtype)
    tl.store(at, tl.trans(b_ds), m_at)
    b_dk += tl.dot(b_ds, b_q, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def key_kernel(
    p_q, p_k, p_v, p_scores, p_first, p_seed, p_grad, p_rows, p_dk, p_dv,
    s_qb, s_qh, s_qi, s_kb, s_kh, s_kj, s_vb, s_vh, s_vj, s_pc, s_ph, s_pr, s_pb, s_pi,
    s_gb, s_gh, s_gi, s_dkb, s_dkh, s_dkj, s_dvb, s_dvh, s_dvj,
    H, Q, K, low, high, C, shift, scale, dropout,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    POSITION: tl.constexpr, FIRST: tl.constexpr, ADD: tl.constexpr,
    DROPOUT: tl.constexpr, CHUNKED: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a block of keys and values; each pair's score gradient overwrites its position score.

    The queries have the content bias. ADD adds to the values of ``dk`` and ``dv``.
    """
    block = tl.program_id(0)
    b, h = _stream_and_head(H)
    bh = b * H + h
    j0 = block * BLOCK_K
    j, d = j0 + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    m_d = d < D
    m_k = (j < K)[:, None] & m_d[None, :]
    # [BLOCK_K, BLOCK_D]
    b_k = tl.load(p_k + b * s_kb + h * s_kh + j[:, None] * s_kj + d[None, :], m_k, other=0.0)
    b_v = tl.load(p_v + b * s_vb + h * s_vh + j[:, None] * s_vj + d[None, :], m_k, other=0.0)
    p_q += b * s_qb + h * s_qh
    p_grad += b * s_gb + h * s_gh
    p_scores += (h * s_ph + b * s_pb) * 8
    p_rows += bh * Q * 2
    first = tl.load(p_first + b) if FIRST else 0
    seed = tl.load(p_seed) + bh if DROPOUT else 0
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)

    start = tl.maximum(j0 - high, 0) // BLOCK_Q
    stop = tl.cdiv(tl.minimum(Q, j0 + BLOCK_K - low), BLOCK_Q)
    if j0 + BLOCK_K <= first:
        stop = start
    whole, whole_stop = tl.maximum(j0 + BLOCK_K - 1 - high, 0), tl.maximum(tl.minimum(Q, j0 + 1 - low), 0)
    if (j0 < first) | (j0 + BLOCK_K > K):
        whole_stop = 0
    before, begin, end, edges = _split(start, stop, tl.cdiv(whole, BLOCK_Q), whole_stop // BLOCK_Q)
    for n in tl.range(0, edges, num_stages=1):
        i0 = tl.where(n < before, start + n, end + n - before) * BLOCK_Q
        b_dk, b_dv = _key_block(
            b_dk, b_dv, b_k, b_v, i0, j, p_q, p_scores, p_grad, p_rows, s_qi, s_gi, s_pc, s_pr, s_pi,
            Q, K, low, high, first, C, shift, scale, seed, dropout,
            D, BLOCK_D, BLOCK_Q, PRECISION, POSITION, DROPOUT, CHUNKED, True,
        )  # fmt: skip
    for n in range(begin, end):
        i0 = n * BLOCK_Q
        b_dk, b_dv = _key_block(
            b_dk, b_dv, b_k, b_v, i0, j, p_q, p_scores, p_grad, p_rows, s_qi, s_gi, s_pc, s_pr, s_pi,
            Q, K, low, high, first, C, shift, scale, seed, dropout,
            D, BLOCK_D, BLOCK_Q, PRECISION, POSITION, DROPOUT, CHUNKED, False,
        )  # fmt: skip

    b_dk *= scale
    at_k = p_dk + b * s_dkb + h * s_dkh + j[:, None] * s_dkj + d[None, :]
    at_v = p_dv + b * s_dvb + h * s_dvh + j[:, None] * s_dvj + d[None, :]
    if ADD:
        b_dk += tl.load(at_k, m_k, other=0.0).to(tl.float32)
        b_dv += tl.load(at_v, m_k, other=0.0).to(tl.float32)
    tl.store(at_k, b_dk.to(p_dk.dtype.element_ty), m_k)
    tl.store(at_v, b_dv.to(p_dv.dtype.element_ty), m_k)


@triton.jit
def query_kernel(
    p_k, p_scores, p_first, p_by_position, p_dq, p_du,
    s_kb, s_kh, s_kj, s_pc, s_ph, s_pr, s_pb, s_pi, s_rc, s_rh, s_rr, s_rb, s_ri, s_dqb, s_dqh, s_dqi,
    H, Q, K, low, high, C, shift, scale, blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    POSITION: tl.constexpr, FIRST: tl.constexpr, CHUNKED: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a block of queries from the score gradients, and their sums for the two biases."""
    block = tl.program_id(0)
    b, h = _stream_and_head(H)
    bh = b * H + h
    i0 = block * BLOCK_Q
    i, d = i0 + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    m_q = (i < Q)[:, None] & (d < D)[None, :]
    p_k += b * s_kb + h * s_kh
    p_row, column = _score_rows(p_scores + (h * s_ph + b * s_pb) * 8, i, s_pc, s_pr, s_pi, C, shift, CHUNKED)
    first = tl.load(p_first + b) if FIRST else 0
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    start = tl.maximum(tl.maximum(i0 + low, first), 0) // BLOCK_K * BLOCK_K
    stop = tl.minimum(K, i0 + BLOCK_Q + high)
    for j0 in range(start, stop, BLOCK_K):
        j = j0 + tl.arange(0, BLOCK_K)
        at = column[:, None] + j[None, :]
        # Entries of hidden pairs are 0.
        b_ds = tl.load(p_row[:, None] + at, (i < Q)[:, None] & _in_row(at, s_pi), other=0.0)
        # [BLOCK_K, BLOCK_D]
        b_k = tl.load(p_k + j[:, None] * s_kj + d[None, :], (j < K)[:, None] & (d < D)[None, :], other=0.0)
        b_dq += tl.dot(b_ds, b_k, input_precision=PRECISION)
    b_dq *= scale
    # [B, H, blocks, 2, D]
    p_du += (bh * blocks + block) * 2 * D
    tl.store(p_du + d, tl.sum(b_dq, 0), d < D)
    if POSITION:
        chunk = i // C
        at = p_by_position + h * s_rh + b * s_rb + chunk.to(tl.int64) * s_rc
        at += (7 - i % 8) * s_rr + (i - chunk * C) // 8 * s_ri
        b_r = tl.load(at[:, None] + d[None, :], m_q, other=0.0).to(tl.float32) * scale
        tl.store(p_du + D + d, tl.sum(b_r, 0), d < D)
        b_dq += b_r
    at = p_dq + b * s_dqb + h * s_dqh + i[:, None] * s_dqi + d[None, :]
    tl.store(at, b_dq.to(p_dq.dtype.element_ty), m_q)
