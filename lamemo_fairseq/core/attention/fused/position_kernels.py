"""Triton kernels of position scores, and of the gradient of the table that they come from.

Shapes: B streams, H heads, Q queries, K keys, D size of a head, U distances, W vectors of 8 columns of position scores.
R rows of a class: its queries in a chunk, neighbours first, then streams. Names as in `kernels.py`.
"""

import triton
import triton.language as tl

from .pairs import chunk_shift, columns_of, in_row, split, written


@triton.jit
def position_kernel(
    p_q, p_position, p_table, p_learned, p_scores,
    s_qb, s_qh, s_qi, s_th, s_tu, s_pc, s_ph, s_pr,
    H, B, Q, K, U, W, low, high, C, shift, entry,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    TABLE: tl.constexpr, POSITION: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """Compute the position scores of a block of a class's rows, in the columns where one of them sees a key.

    They are products of position queries with the table (TABLE), plus the learned scores by distance (LEARNED).
    """
    r0, n = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q, tl.program_id(1)  # the longest first
    chunk, h = tl.program_id(2) // H, tl.program_id(2) % H
    shift = chunk_shift(chunk, C, shift)
    r, d = r0 + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    e = r // B
    i = chunk * C + e * 8 + 7 - n
    m_r, m_d = (e < C // 8) & (i < Q), d < D
    if TABLE:
        # [BLOCK_Q, BLOCK_D]
        p_q += h.to(tl.int64) * s_qh + (r - e * B).to(tl.int64) * s_qb
        b_q = tl.load(p_q[:, None] + i[:, None] * s_qi + d[None, :], m_r[:, None] & m_d[None, :], other=0.0)
        if POSITION:
            b_v = tl.load(p_position + h * D + d, m_d, other=0.0).to(tl.float32)
            b_q = (b_q.to(tl.float32) + b_v[None, :]).to(b_q.dtype)
        p_table += h.to(tl.int64) * s_th
    t_entry = entry - chunk * C - shift * 8 - 7 + n  # the table's entry in column 0
    p_scores += (chunk.to(tl.int64) * s_pc + h.to(tl.int64) * s_ph + n.to(tl.int64) * s_pr) * 8
    p_row = p_scores + r * (W * 8)
    last = tl.minimum((r0 + BLOCK_Q - 1) // B, C // 8 - 1)
    begin, stop = columns_of(n, r0 // B, last, C, chunk, shift, K, W, low, high)
    for t0 in range(begin // BLOCK_K * BLOCK_K, stop, BLOCK_K):
        t = t0 + tl.arange(0, BLOCK_K)
        u = t_entry + t
        m_u = (u >= 0) & (u < U)
        b_s = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        if TABLE:
            # [BLOCK_D, BLOCK_K]
            b_r = tl.load(p_table + u[None, :] * s_tu + d[:, None], m_u[None, :] & m_d[:, None], other=0.0)
            b_s = tl.dot(b_q, b_r, input_precision=PRECISION)
        if LEARNED:
            b_s += tl.load(p_learned + h * U + u, m_u, other=0.0).to(tl.float32)[None, :]
        tl.store(p_row[:, None] + t[None, :], b_s.to(p_scores.dtype.element_ty), m_r[:, None] & in_row(t, W)[None, :])


@triton.jit
def _table_block(
    b_dr, b_dl, r0, t, p_scores, p_queries, p_first, B, Q, K, W, low, high, C, chunk, shift, n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
    TABLE: tl.constexpr, LEARNED: tl.constexpr, FIRST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the gradients by a block of rows; MASKED if an entry of it has no gradient."""
    r, d = r0 + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    m_q, m_at = None, None
    if D < BLOCK_D:
        m_q = (d < D)[None, :]
    if MASKED:
        e = r // B
        i8 = chunk * C + e * 8
        m_r = (e < C // 8) & (i8 + 7 - n < Q)
        m_q = m_r[:, None] & (d < D)[None, :]
        first = 0
        if FIRST:
            first = tl.load(p_first + (r - e * B), m_r, other=0)[:, None]
        j8 = (t // 8 * 8)[None, :] - ((shift - e) * 8)[:, None]
        m_at = m_r[:, None] & in_row(t, W)[None, :] & written(i8[:, None], j8, K, low, high, first)
    # [BLOCK_Q, BLOCK_K]
    b_ds = tl.load(p_scores + (r * (W * 8))[:, None] + t[None, :], m_at, other=0.0 if MASKED else None)
    if TABLE:
        b_q = tl.load(p_queries + r[:, None] * D + d[None, :], m_q, other=0.0 if MASKED or D < BLOCK_D else None)
        b_dr += tl.dot(tl.trans(b_ds), b_q, input_precision=PRECISION)
    if LEARNED:
        b_dl += tl.sum(b_ds.to(tl.float32), 0)
    return b_dr, b_dl


@triton.jit
def table_kernel(
    p_scores, p_queries, p_first, p_dtable, p_dlearned,
    s_pc, s_ph, s_pr,
    H, B, Q, K, W, low, high, C, shift,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    TABLE: tl.constexpr, LEARNED: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a class's copy of the table, of a block of columns, and those of learned scores."""
    # The last columns first: most rows see keys there.
    t0, n = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_K, tl.program_id(1)
    chunk, h = tl.program_id(2) // H, tl.program_id(2) % H
    shift = chunk_shift(chunk, C, shift)
    one = tl.program_id(2).to(tl.int64) * 8 + n  # of all copies
    p_scores += (chunk.to(tl.int64) * s_pc + h.to(tl.int64) * s_ph + n.to(tl.int64) * s_pr) * 8
    if TABLE:
        p_queries += one * (C // 8) * B * D
    t, d = t0 + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    b_dr = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dl = tl.zeros([BLOCK_K], tl.float32)

    # Eighths of rows whose keys in these columns exist: some of them, and all of them.
    v0, v1 = t0 // 8, t0 // 8 + BLOCK_K // 8 - 1
    behind = tl.minimum(C // 8, tl.cdiv(tl.maximum(Q - chunk * C - 7 + n, 0), 8))
    start, stop = tl.maximum(shift - v1, 0), tl.minimum(behind, shift + tl.cdiv(K, 8) - v0)
    whole, whole_stop = tl.maximum(shift - v0, 0), tl.minimum(behind, shift + tl.cdiv(K, 8) - v1)
    least, most = v0 * 8 - chunk * C - shift * 8, v1 * 8 - chunk * C - shift * 8  # keys' starts less queries'
    if (least - 7 > high) | (most + 7 < low):
        stop = start
    if FIRST | (least + 7 < low) | (most - 7 > high) | (v1 >= W):
        whole_stop = 0
    start, stop = start * B // BLOCK_Q, tl.cdiv(tl.maximum(stop, start) * B, BLOCK_Q)
    before, begin, end, edges = split(
        start, stop, tl.cdiv(whole * B, BLOCK_Q), tl.maximum(whole_stop, 0) * B // BLOCK_Q
    )
    for block in range(begin, end):
        b_dr, b_dl = _table_block(
            b_dr, b_dl, block * BLOCK_Q, t, p_scores, p_queries, p_first, B, Q, K, W, low, high, C, chunk, shift, n,
            D, BLOCK_D, BLOCK_Q, PRECISION, TABLE, LEARNED, FIRST, False,
        )  # fmt: skip
    for block in tl.range(0, edges, num_stages=1):
        r0 = tl.where(block < before, start + block, end + block - before) * BLOCK_Q
        b_dr, b_dl = _table_block(
            b_dr, b_dl, r0, t, p_scores, p_queries, p_first, B, Q, K, W, low, high, C, chunk, shift, n,
            D, BLOCK_D, BLOCK_Q, PRECISION, TABLE, LEARNED, FIRST, True,
        )  # fmt: skip
    # [chunks, H, 8, 8 W, D] and [chunks, H, 8, 8 W]
    at = one * W * 8 + t
    if TABLE:
        tl.store(p_dtable + at[:, None] * D + d[None, :], b_dr, in_row(t, W)[:, None] & (d < D)[None, :])
    if LEARNED:
        tl.store(p_dlearned + at, b_dl, in_row(t, W))


@triton.jit
def class_sum_kernel(
    p_copies, p_out,
    H, U, W, C, shift, entry, chunks, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Sum ``[chunks, H, 8, 8 W, D]``, the gradients of the classes' copies, into that of the table ``[H, U, D]``."""
    h = tl.program_id(1)
    u, d = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U), tl.arange(0, BLOCK_D)
    b_sum = tl.zeros([BLOCK_U, BLOCK_D], tl.float32)
    for chunk in range(0, chunks):
        for n in tl.static_range(8):
            t = u - (entry - chunk * C - chunk_shift(chunk, C, shift) * 8 - 7 + n)
            at = (((chunk * H + h) * 8 + n).to(tl.int64) * W * 8 + t) * D
            b_sum += tl.load(p_copies + at[:, None] + d[None, :], in_row(t, W)[:, None] & (d < D)[None, :], other=0.0)
    at = p_out + (h.to(tl.int64) * U + u)[:, None] * D + d[None, :]
    tl.store(at, (b_sum * scale).to(p_out.dtype.element_ty), (u < U)[:, None] & (d < D)[None, :])
