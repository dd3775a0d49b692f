"""Triton kernels of banded attention with position scores, forward and backward.

Shapes: B streams, H heads, Q queries, K keys, D size of a head, W vectors of 8 columns of position scores.
Names: p_ pointer, s_ stride (in elements), b_ tile, m_ mask. The last dimension of every tensor is contiguous.

`pairs.py` says which pairs of a query and a key see each other, and which entry of the position scores is theirs.
"""

import triton
import triton.language as tl

from .pairs import (
    LN2,
    LOG2E,
    chunk_shift,
    columns_of,
    dropout_mask,
    in_row,
    score_rows,
    split,
    stream_and_head,
    visible,
    written,
)


@triton.jit
def _forward_block(
    b_out, b_sum, b_top, b_q, i, j0, p_row, column, p_k, p_v, s_kj, s_vj,
    Q, K, W, low, high, first, scale, seed, dropout,
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
            m_at = (i < Q)[:, None] & in_row(at, W)
        b_p = tl.load(p_row[:, None] + at, m_at).to(tl.float32)
        # Triton makes a plain sum the product's start, with fewer registers, but does not load that ahead.
        b_s = (b_s + b_p) * (scale * LOG2E) if MASKED else b_s * (scale * LOG2E) + b_p * (scale * LOG2E)
    else:
        b_s *= scale * LOG2E
    if MASKED:
        b_s = tl.where(visible(i[:, None], j[None, :], Q, K, low, high, first), b_s, -float("inf"))
    top = tl.maximum(b_top, tl.max(b_s, 1))
    finite = top
    if MASKED:
        # A query that has seen nothing yet has no maximum to subtract.
        finite = tl.where(top == -float("inf"), 0.0, top)
    b_w = tl.exp2(b_s - finite[:, None])
    shrink = tl.exp2(b_top - finite)
    b_sum = b_sum * shrink + tl.sum(b_w, 1)
    if DROPOUT:
        b_w = tl.where(dropout_mask(seed, i[:, None], j[None, :], K, dropout), b_w / (1 - dropout), 0.0)
    # [BLOCK_K, BLOCK_D]
    b_v = tl.load(p_v + j[:, None] * s_vj + d[None, :], m_v)
    b_out = b_out * shrink[:, None] + tl.dot(b_w.to(b_v.dtype), b_v, input_precision=PRECISION)
    return b_out, b_sum, top


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_content, p_scores, p_first, p_seed, p_stored, p_stored_lse, p_out, p_merged, p_new,
    s_qb, s_qh, s_qi, s_kb, s_kh, s_kj, s_vb, s_vh, s_vj, s_pc, s_ph, s_pr, s_pi, s_pb,
    s_sb, s_sh, s_si, s_ob, s_oh, s_oi,
    H, Q, K, W, low, high, C, shift, scale, dropout, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    CONTENT: tl.constexpr, POSITION: tl.constexpr, FIRST: tl.constexpr, STORED: tl.constexpr,
    DROPOUT: tl.constexpr, CHUNKED: tl.constexpr,
):  # fmt: skip
    """Compute an online softmax over the keys of a block of queries, then the merge with the stored read-outs.

    Writes read-out and normaliser. With STORED both are merged, and the normaliser of the keys alone is written too.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    b, h = stream_and_head(H)
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
        # Behind the last query its scores are read again, so that no mask is needed there.
        own = tl.minimum(i, Q - 1)
        p_row, column = score_rows(p_scores + (h * s_ph + b * s_pb) * 8, own, s_pc, s_pr, s_pi, C, shift, CHUNKED)
    first = tl.load(p_first + b) if FIRST else 0
    seed = tl.load(p_seed) + bh if DROPOUT else 0
    b_top = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    b_out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)

    start = tl.maximum(tl.maximum(i0 + low, first), 0) // BLOCK_K
    stop = tl.cdiv(tl.minimum(K, i0 + BLOCK_Q + high), BLOCK_K)
    whole = tl.maximum(tl.maximum(i0 + BLOCK_Q - 1 + low, first), 0)
    whole_stop = tl.maximum(tl.minimum(K, i0 + 1 + high), 0)
    before, begin, end, edges = split(start, stop, tl.cdiv(whole, BLOCK_K), whole_stop // BLOCK_K)
    for n in range(begin, end):
        j0 = n * BLOCK_K
        b_out, b_sum, b_top = _forward_block(
            b_out, b_sum, b_top, b_q, i, j0, p_row, column, p_k, p_v, s_kj, s_vj,
            Q, K, W, low, high, first, scale, seed, dropout,
            D, BLOCK_D, BLOCK_K, PRECISION, POSITION, DROPOUT, False,
        )  # fmt: skip
    for n in tl.range(0, edges, num_stages=1):
        j0 = tl.where(n < before, start + n, end + n - before) * BLOCK_K
        b_out, b_sum, b_top = _forward_block(
            b_out, b_sum, b_top, b_q, i, j0, p_row, column, p_k, p_v, s_kj, s_vj,
            Q, K, W, low, high, first, scale, seed, dropout,
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
def row_kernel(
    p_out, p_grad, p_stored, p_stored_lse, p_new, p_q, p_content, p_position, p_rows, p_by_content, p_by_class,
    s_ob, s_oh, s_oi, s_gb, s_gh, s_gi, s_sb, s_sh, s_si, s_qb, s_qh, s_qi, s_cb, s_ch, s_ci,
    s_pc, s_ph, s_pr, s_pi, s_pb,
    H, Q, C, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    STORED: tl.constexpr, CONTENT: tl.constexpr, TABLE: tl.constexpr, POSITION: tl.constexpr,
):  # fmt: skip
    """Write what the backward pass needs of a query.

    It is two numbers, with which ``dS = exp(S - lse) (dO . V - delta)`` (README.md has the derivation). With CONTENT
    it is also the query plus this bias, and with TABLE the position query, by class (plus its bias with POSITION).
    """
    block, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    i, d = block * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    m_i, m_d = i < Q, d < D
    m_o = m_i[:, None] & m_d[None, :]
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
    if CONTENT or TABLE:
        b_q = tl.load(p_q + b * s_qb + h * s_qh + i[:, None] * s_qi + d[None, :], m_o, other=0.0).to(tl.float32)
        if CONTENT:
            b_u = b_q + tl.load(p_content + h * D + d, m_d, other=0.0).to(tl.float32)[None, :]
            at = p_by_content + b * s_cb + h * s_ch + i[:, None] * s_ci + d[None, :]
            tl.store(at, b_u.to(p_by_content.dtype.element_ty), m_o)
        if TABLE:
            if POSITION:
                b_q += tl.load(p_position + h * D + d, m_d, other=0.0).to(tl.float32)[None, :]
            chunk = i // C
            at = p_by_class + h * s_ph + b * s_pb + chunk.to(tl.int64) * s_pc
            at += (7 - i % 8).to(tl.int64) * s_pr + (i - chunk * C) // 8 * s_pi
            tl.store(at[:, None] + d[None, :], b_q.to(p_by_class.dtype.element_ty), m_o)


@triton.jit
def _score_block(p_scores, i, j, s_pc, s_pr, s_pi, Q, W, C, shift, CHUNKED: tl.constexpr):
    """Return pointers ``[BLOCK_Q, BLOCK_K]`` to the pairs' scores, and which of them exist."""
    p_row, column = score_rows(p_scores, i, s_pc, s_pr, s_pi, C, shift, CHUNKED)
    at = column[:, None] + j[None, :]
    return p_row[:, None] + at, (i < Q)[:, None] & in_row(at, W)


@triton.jit
def _key_block(
    b_dk, b_dv, b_k, b_v, b_p, i0, i_stop, j, p_q, p_scores, p_grad, p_rows, s_qi, s_gi, s_pc, s_pr, s_pi,
    Q, K, W, low, high, first, C, shift, scale, seed, dropout,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
    POSITION: tl.constexpr, DROPOUT: tl.constexpr, CHUNKED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the gradients by a block of queries; MASKED if a query is behind the last one or does not see a key.

    Takes the position scores ``b_p [BLOCK_Q, BLOCK_K]``. If not MASKED, returns those of the next block too, if it is
    before query *i_stop*.
    """
    i, d = i0 + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    at, m_at = _score_block(p_scores, i, j, s_pc, s_pr, s_pi, Q, W, C, shift, CHUNKED)
    two = (2 * i)[:, None] + tl.arange(0, 2)[None, :]
    m_d, m_i = None, None
    if D < BLOCK_D:
        m_d = (d < D)[None, :]
    if MASKED:
        m_i = (i < Q)[:, None]
        m_d = m_i & (d < D)[None, :]
    # [BLOCK_Q, BLOCK_D]
    b_q = tl.load(p_q + i[:, None] * s_qi + d[None, :], m_d)
    b_g = tl.load(p_grad + i[:, None] * s_gi + d[None, :], m_d)
    lse, delta = tl.split(tl.load(p_rows + two, m_i))
    # [BLOCK_K, BLOCK_Q]
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    if POSITION:
        b_s = b_s * (scale * LOG2E) + (tl.trans(b_p).to(tl.float32) * (scale * LOG2E) - lse[None, :])
        if not MASKED:
            ahead, _ = _score_block(p_scores, i + BLOCK_Q, j, s_pc, s_pr, s_pi, Q, W, C, shift, CHUNKED)
            b_p = tl.load(ahead, (i + BLOCK_Q < i_stop)[:, None], other=0.0)
    else:
        b_s = b_s * (scale * LOG2E) - lse[None, :]
    b_w = tl.exp2(b_s)
    if MASKED:
        b_w = tl.where(visible(i[None, :], j[:, None], Q, K, low, high, first), b_w, 0.0)
    b_dw = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION)
    b_dropped = b_w
    if DROPOUT:
        mask = dropout_mask(seed, i[None, :], j[:, None], K, dropout)
        b_dw = tl.where(mask, b_dw / (1 - dropout), 0.0)
        b_dropped = tl.where(mask, b_w / (1 - dropout), 0.0)
    b_dv += tl.dot(b_dropped.to(b_g.dtype), b_g, input_precision=PRECISION)
    b_ds = (b_w * (b_dw - delta[None, :])).to(b_q.dtype)
    tl.store(at, tl.trans(b_ds), m_at if MASKED else None)
    b_dk += tl.dot(b_ds, b_q, input_precision=PRECISION)
    return b_dk, b_dv, b_p


@triton.jit
def key_kernel(
    p_q, p_k, p_v, p_scores, p_first, p_seed, p_grad, p_rows, p_dk, p_dv,
    s_qb, s_qh, s_qi, s_kb, s_kh, s_kj, s_vb, s_vh, s_vj, s_pc, s_ph, s_pr, s_pi, s_pb,
    s_gb, s_gh, s_gi, s_dkb, s_dkh, s_dkj, s_dvb, s_dvh, s_dvj,
    H, Q, K, W, low, high, C, shift, scale, dropout,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    POSITION: tl.constexpr, FIRST: tl.constexpr, ADD: tl.constexpr,
    DROPOUT: tl.constexpr, CHUNKED: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a block of keys and values; each pair's score gradient overwrites its position score.

    The queries have the content bias. ADD adds to the values of ``dk`` and ``dv``.
    """
    block = tl.program_id(0)
    b, h = stream_and_head(H)
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
    before, begin, end, edges = split(start, stop, tl.cdiv(whole, BLOCK_Q), whole_stop // BLOCK_Q)
    q = tl.arange(0, BLOCK_Q)
    b_p = tl.zeros([BLOCK_Q, BLOCK_K], p_scores.dtype.element_ty)
    for n in tl.range(0, edges, num_stages=1):
        i0 = tl.where(n < before, start + n, end + n - before) * BLOCK_Q
        if POSITION:
            at, m_at = _score_block(p_scores, i0 + q, j, s_pc, s_pr, s_pi, Q, W, C, shift, CHUNKED)
            b_p = tl.load(at, m_at, other=0.0)
        b_dk, b_dv, _ = _key_block(
            b_dk, b_dv, b_k, b_v, b_p, i0, 0, j, p_q, p_scores, p_grad, p_rows, s_qi, s_gi, s_pc, s_pr, s_pi,
            Q, K, W, low, high, first, C, shift, scale, seed, dropout,
            D, BLOCK_D, BLOCK_Q, PRECISION, POSITION, DROPOUT, CHUNKED, True,
        )  # fmt: skip
    # Position scores are loaded one block ahead: Triton itself does this for operands of products alone.
    if POSITION:
        at, _ = _score_block(p_scores, begin * BLOCK_Q + q, j, s_pc, s_pr, s_pi, Q, W, C, shift, CHUNKED)
        b_p = tl.load(at, (begin * BLOCK_Q + q < end * BLOCK_Q)[:, None], other=0.0)
    for n in range(begin, end):
        i0 = n * BLOCK_Q
        b_dk, b_dv, b_p = _key_block(
            b_dk, b_dv, b_k, b_v, b_p, i0, end * BLOCK_Q, j, p_q, p_scores, p_grad, p_rows,
            s_qi, s_gi, s_pc, s_pr, s_pi, Q, K, W, low, high, first, C, shift, scale, seed, dropout,
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
    p_k, p_table, p_scores, p_first, p_dq, p_du,
    s_kb, s_kh, s_kj, s_th, s_tu, s_pc, s_ph, s_pr, s_pi, s_pb, s_dqb, s_dqh, s_dqi,
    H, Q, K, U, W, low, high, C, shift, entry, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    TABLE: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a block of queries of one class, and their sums for the two biases.

    It reads their score gradients by keys, for the products with keys, and by columns, for those with the table.
    """
    n, block = tl.program_id(0) % 8, tl.program_id(0) // 8
    b, h = stream_and_head(H)
    blocks = tl.cdiv(C // 8, BLOCK_Q)
    chunk = block // blocks
    e0 = (block - chunk * blocks) * BLOCK_Q
    e1 = tl.minimum(e0 + BLOCK_Q, C // 8) - 1
    e, d = e0 + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    i8 = chunk * C + e * 8
    i = i8 + 7 - n
    m_i, m_d = (e <= e1) & (i < Q), d < D
    shift = chunk_shift(chunk, C, shift)
    column = (shift - e) * 8
    p_k += b * s_kb + h * s_kh
    p_row = p_scores + (chunk.to(tl.int64) * s_pc + h * s_ph + n.to(tl.int64) * s_pr + b * s_pb + e * s_pi) * 8
    first = tl.load(p_first + b) if FIRST else 0
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    b_dp = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)

    i0, i1 = chunk * C + e0 * 8 + 7 - n, tl.minimum(chunk * C + e1 * 8 + 7 - n, Q - 1)
    start = tl.maximum(tl.maximum(i0 + low, first), 0) // BLOCK_K * BLOCK_K
    count = tl.minimum(K, i1 + high + 1) - start
    if TABLE:
        t_start, t_stop = columns_of(n, e0, e1, C, chunk, shift, K, W, low, high)
        t_start = t_start // BLOCK_K * BLOCK_K
        count = tl.maximum(count, t_stop - t_start)
        t_entry = entry - chunk * C - shift * 8 - 7 + n  # the table's entry in column 0
        p_table += h * s_th
    for past in range(0, count, BLOCK_K):
        j = start + past + tl.arange(0, BLOCK_K)
        m_at = m_i[:, None] & written(i8[:, None], (j // 8 * 8)[None, :], K, low, high, first)
        b_ds = tl.load(p_row[:, None] + (column[:, None] + j[None, :]), m_at, other=0.0)
        # [BLOCK_K, BLOCK_D]
        b_k = tl.load(p_k + j[:, None] * s_kj + d[None, :], (j < K)[:, None] & m_d[None, :], other=0.0)
        b_dq += tl.dot(b_ds, b_k, input_precision=PRECISION)
        if TABLE:
            t = t_start + past + tl.arange(0, BLOCK_K)
            j8 = (t // 8 * 8)[None, :] - column[:, None]
            m_at = m_i[:, None] & in_row(t, W)[None, :] & written(i8[:, None], j8, K, low, high, first)
            b_ds = tl.load(p_row[:, None] + t[None, :], m_at, other=0.0)
            u = t_entry + t
            m_u = (u >= 0) & (u < U)
            b_r = tl.load(p_table + u[:, None] * s_tu + d[None, :], m_u[:, None] & m_d[None, :], other=0.0)
            b_dp += tl.dot(b_ds, b_r, input_precision=PRECISION)
    b_dq *= scale
    # [B, H, blocks, 2, D]
    p_du += ((b * H + h) * tl.num_programs(0) + tl.program_id(0)) * 2 * D
    tl.store(p_du + d, tl.sum(b_dq, 0), m_d)
    if TABLE:
        b_dp *= scale
        tl.store(p_du + D + d, tl.sum(b_dp, 0), m_d)
        b_dq += b_dp
    at = p_dq + b * s_dqb + h * s_dqh + i[:, None] * s_dqi + d[None, :]
    tl.store(at, b_dq.to(p_dq.dtype.element_ty), m_i[:, None] & m_d[None, :])
