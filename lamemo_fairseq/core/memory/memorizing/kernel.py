"""Triton kernels of queries that attend to constant keys and values: all of them, or the rows with the largest scores.

Shapes: B streams, H heads, Q queries, K keys, D size of a head.
Names: p_ pointer, s_ stride (in elements), b_ tile, m_ mask. The last dimension of every tensor is contiguous.
"""

import triton
import triton.language as tl

from ...attention.fused.pairs import LOG2E, dropout_mask, stream_and_head


@triton.jit
def store_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_grad, p_seed, p_dq,
    s_qb, s_qh, s_qi, s_kb, s_kh, s_kj, s_vb, s_vh, s_vj, s_ob, s_oh, s_oi, s_gb, s_gh, s_gi, s_dqb, s_dqh, s_dqi,
    H, Q, K, scale, dropout,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add to ``dq`` the gradient by all keys, of which none is hidden. MASKED if the last block of keys has fewer.

    *p_lse* are normalisers and *p_out* read-outs of a softmax that may have other keys too.
    """
    b, h = stream_and_head(H)
    i, d = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    m_i, m_d = i < Q, (d < D)[None, :]
    m_q = m_i[:, None] & m_d
    # [BLOCK_Q, BLOCK_D]
    b_q = tl.load(p_q + b * s_qb + h * s_qh + i[:, None] * s_qi + d[None, :], m_q, other=0.0)
    b_g = tl.load(p_grad + b * s_gb + h * s_gh + i[:, None] * s_gi + d[None, :], m_q, other=0.0)
    b_o = tl.load(p_out + b * s_ob + h * s_oh + i[:, None] * s_oi + d[None, :], m_q, other=0.0)
    delta = tl.sum(b_g.to(tl.float32) * b_o.to(tl.float32), 1)
    lse = tl.load(p_lse + (b * H + h) * Q + i, m_i, other=0.0) * LOG2E
    seed = tl.load(p_seed) + b * H + h if DROPOUT else 0
    p_k += b * s_kb + h * s_kh
    p_v += b * s_vb + h * s_vh
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for j0 in range(0, K, BLOCK_K):
        j = j0 + tl.arange(0, BLOCK_K)
        m_k = m_d
        if MASKED:
            m_k = (j < K)[:, None] & m_d
        # [BLOCK_K, BLOCK_D]
        b_k = tl.load(p_k + j[:, None] * s_kj + d[None, :], m_k, other=0.0)
        b_v = tl.load(p_v + j[:, None] * s_vj + d[None, :], m_k, other=0.0)
        # [BLOCK_Q, BLOCK_K]
        b_w = tl.exp2(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2E) - lse[:, None])
        if MASKED:
            b_w = tl.where((j < K)[None, :], b_w, 0.0)
        b_dw = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION)
        if DROPOUT:
            b_dw = tl.where(dropout_mask(seed, i[:, None], j[None, :], K, dropout), b_dw / (1 - dropout), 0.0)
        b_ds = (b_w * (b_dw - delta[:, None])).to(b_k.dtype)
        b_dq += tl.dot(b_ds, b_k, input_precision=PRECISION)
    at = p_dq + b * s_dqb + h * s_dqh + i[:, None] * s_dqi + d[None, :]
    b_dq = b_dq * scale + tl.load(at, m_q, other=0.0).to(tl.float32)
    tl.store(at, b_dq.to(p_dq.dtype.element_ty), m_q)


@triton.jit
def group_kernel(
    p_q, p_k, p_best,
    s_qb, s_qh, s_qi, s_kb, s_kh, s_kj,
    H, Q, K, G,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Write the largest product of each query with the keys of each of G groups, of SIZE neighbours."""
    b, h = stream_and_head(H)
    i, d = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    m_i, m_d = i < Q, d < D
    # [BLOCK_Q, BLOCK_D]
    b_q = tl.load(p_q + b * s_qb + h * s_qh + i[:, None] * s_qi + d[None, :], m_i[:, None] & m_d[None, :], other=0.0)
    p_k += b * s_kb + h * s_kh
    p_best += ((b * H + h) * Q + i) * G
    for j0 in range(0, K, BLOCK_K):
        j = j0 + tl.arange(0, BLOCK_K)
        # [BLOCK_D, BLOCK_K]
        b_k = tl.load(p_k + j[None, :] * s_kj + d[:, None], m_d[:, None] & (j < K)[None, :], other=0.0)
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION)
        b_s = tl.where((j < K)[None, :], b_s, -float("inf"))
        # [BLOCK_Q, BLOCK_K / SIZE]
        b_best = tl.max(tl.reshape(b_s, [BLOCK_Q, BLOCK_K // SIZE, SIZE]), 2)
        g = j0 // SIZE + tl.arange(0, BLOCK_K // SIZE)
        tl.store(p_best[:, None] + g[None, :], b_best, m_i[:, None] & (g < G)[None, :])


@triton.jit
def first_of(b_x, COUNT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Find the COUNT largest of a row, of equal ones the first: return whether each is one, and its place among these.

    Bisection finds a bound that COUNT numbers reach, or the one that the last of them are equal to. It begins with the
    smallest one of the maxima of PARTS >= COUNT parts of the row.
    """
    bits = tl.where(b_x != b_x, float("inf"), b_x).to(tl.int32, bitcast=True)  # NaN has bits beyond all others
    b_key = (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)  # in the same order
    maxima = tl.max(tl.reshape(b_key, [PARTS, BLOCK // PARTS]), 1)
    low, high = tl.min(maxima, 0), tl.max(maxima, 0) + 1
    reached = tl.sum((b_key >= low).to(tl.int32), 0)  # numbers that reach low: COUNT or more; fewer reach high
    while (reached != COUNT) & (high - low > 1):
        middle = low + ((high - low) >> 1)
        count = tl.sum((b_key >= middle).to(tl.int32), 0)
        low, high = tl.where(count >= COUNT, middle, low), tl.where(count >= COUNT, high, middle)
        reached = tl.where(count >= COUNT, count, reached)
    above, last = b_key >= high, (b_key >= low) & (b_key < high)
    free = COUNT - tl.sum(above.to(tl.int32), 0)
    taken = above | (last & (tl.cumsum(last.to(tl.int32), 0) <= free))
    return taken, tl.cumsum(taken.to(tl.int32), 0) - 1


@triton.jit
def best_group_kernel(p_best, p_groups, G, COUNT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the COUNT groups of a query with the largest maxima, the oldest first."""
    row, g = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    b_best = tl.load(p_best + row * G + g, g < G, other=-float("inf"))
    taken, place = first_of(b_best, COUNT, PARTS, BLOCK)
    tl.store(p_groups + row * COUNT + place, g, taken)


@triton.jit
def candidate_kernel(
    p_q, p_k, p_groups, p_rows,
    s_qb, s_qh, s_qi, s_kb, s_kh, s_kj,
    H, Q, K,
    D: tl.constexpr, COUNT: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the COUNT keys with the largest products with a query, of those in its COUNT groups, the oldest first."""
    b, h = stream_and_head(H)
    i, c, d = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, 8)
    row, m_c = (b * H + h) * Q + i, c < COUNT * SIZE
    j = tl.load(p_groups + row * COUNT + c // SIZE, m_c, other=0) * SIZE + c % SIZE
    m_j = m_c & (j < K)
    p_q += b * s_qb + h * s_qh + i * s_qi
    p_k += b * s_kb + h * s_kh + j[:, None].to(tl.int64) * s_kj
    b_s = tl.zeros([BLOCK], tl.float32)
    for d0 in range(0, D, 8):  # 16 bytes in half precision
        m_d = d0 + d < D
        b_q = tl.load(p_q + d0 + d, m_d, other=0.0).to(tl.float32)
        # [BLOCK, 8]
        b_k = tl.load(p_k + d0 + d[None, :], m_j[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        b_s += tl.sum(b_k * b_q[None, :], 1)
    taken, place = first_of(tl.where(m_j, b_s, -float("inf")), COUNT, PARTS, BLOCK)
    tl.store(p_rows + row * COUNT + place, j, taken)


@triton.jit
def retrieval_kernel(
    p_q, p_k, p_v, p_rows, p_out, p_lse, p_grad, p_dq,
    s_qb, s_qh, s_qi, s_kb, s_kh, s_kj, s_vb, s_vh, s_vj, s_ob, s_oh, s_oi, s_gb, s_gh, s_gi,
    H, Q, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, COUNT: tl.constexpr, BLOCK_C: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Let each query attend to its COUNT rows: write read-out and normaliser, or with BACKWARD its gradient.

    The gradient ``dq`` has the strides of the read-out.
    """
    b, h = stream_and_head(H)
    i, d, c = tl.program_id(0), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    m_d, m_c = d < D, c < COUNT
    row = (b * H + h) * Q + i
    j = tl.load(p_rows + row * COUNT + c, m_c, other=0).to(tl.int64)
    m_k = m_c[:, None] & m_d[None, :]
    # [BLOCK_C, BLOCK_D]
    b_k = tl.load(p_k + b * s_kb + h * s_kh + j[:, None] * s_kj + d[None, :], m_k, other=0.0).to(tl.float32)
    b_v = tl.load(p_v + b * s_vb + h * s_vh + j[:, None] * s_vj + d[None, :], m_k, other=0.0).to(tl.float32)
    b_q = tl.load(p_q + b * s_qb + h * s_qh + i * s_qi + d, m_d, other=0.0).to(tl.float32)
    b_s = tl.where(m_c, tl.sum(b_k * b_q[None, :], 1) * scale, -float("inf"))
    at = b * s_ob + h * s_oh + i * s_oi + d
    if BACKWARD:
        b_w = tl.exp(b_s - tl.load(p_lse + row))
        b_g = tl.load(p_grad + b * s_gb + h * s_gh + i * s_gi + d, m_d, other=0.0).to(tl.float32)
        b_dw = tl.sum(b_v * b_g[None, :], 1)
        b_ds = b_w * (b_dw - tl.sum(b_w * b_dw, 0)) * scale
        tl.store(p_dq + at, tl.sum(b_ds[:, None] * b_k, 0).to(p_dq.dtype.element_ty), m_d)
    else:
        top = tl.max(b_s, 0)
        b_w = tl.exp(b_s - top)
        total = tl.sum(b_w, 0)
        b_out = tl.sum(b_w[:, None] * b_v, 0) / total
        tl.store(p_out + at, b_out.to(p_out.dtype.element_ty), m_d)
        tl.store(p_lse + row, top + tl.log(total))


@triton.jit
def append_kernel(p_old, p_new, p_out, s_nb, s_nh, s_ni, H, OLD, KEPT, NEW, SIZE, D: tl.constexpr, BLOCK: tl.constexpr):
    """Write the last KEPT of OLD rows of D numbers and, behind them, the last ``SIZE - KEPT`` of NEW rows."""
    n, start = tl.program_id(1), tl.program_id(0) * BLOCK
    e = start + tl.arange(0, BLOCK)
    p_old += (n.to(tl.int64) * OLD + (OLD - KEPT)) * D
    p_out += n.to(tl.int64) * SIZE * D
    if start + BLOCK <= KEPT * D:  # nearly always
        tl.store(p_out + e, tl.load(p_old + e))
    else:
        is_old, row = e < KEPT * D, NEW - SIZE + e // D
        b_old = tl.load(p_old + e, is_old, other=0.0)
        p_new += (n // H).to(tl.int64) * s_nb + (n % H).to(tl.int64) * s_nh
        b_new = tl.load(p_new + row * s_ni + e % D, (e < SIZE * D) & (is_old == 0), other=0.0)
        tl.store(p_out + e, tl.where(is_old, b_old, b_new), e < SIZE * D)
