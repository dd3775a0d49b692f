"""Triton kernels of what a layer does to single rows: residual, dropout and layer norm in one, activation and dropout.

Shapes: B x Q rows of D numbers, W >= D of them stored; what is behind D is written as 0.
Names: p_ pointer, s_ stride (in elements), b_ tile, m_ mask. The last dimension of every tensor is contiguous.

One draw of Philox gives four numbers, so a row is held as four parts of BLOCK columns, one number for each.
"""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)  # of Philox; its authors found no flaw with as many (Salmon et al. 2011)


@triton.jit
def _load(p, rows, d, m_rows, D, L):
    """L, from D to W, is how far rows may be read: a multiple of 8 keeps loads wide."""
    b = tl.load(p + rows[:, None] + d[None, :], m_rows[:, None] & (d < L)[None, :], other=0.0)
    return tl.where((d < D)[None, :], b.to(tl.float32), 0.0)


@triton.jit
def _store(p, rows, d, m_rows, D, W, b):
    b = tl.where((d < D)[None, :], b, 0.0)
    tl.store(p + rows[:, None] + d[None, :], b.to(p.dtype.element_ty), m_rows[:, None] & (d < W)[None, :])


@triton.jit
def _drawn(p_seed, row, d, BLOCK: tl.constexpr):
    """Four numbers in [0, 1) for each row and column of a part."""
    return tl.rand4x(tl.load(p_seed), row[:, None] * BLOCK + d[None, :], n_rounds=ROUNDS)


@triton.jit
def _dropped(b, drawn, dropout):
    return tl.where(drawn >= dropout, b / (1 - dropout), 0.0)


@triton.jit
def _rounded(b, p):
    """As the sum would be stored: the norm is that of the sum in the rows' own precision."""
    return b.to(p.dtype.element_ty).to(tl.float32)


@triton.jit
def residual_norm_kernel(
    p_x, p_residual, p_weight, p_bias, p_seed, p_out, p_sum, p_mean, p_rstd,
    s_xb, s_xq, s_rb, s_rq, s_out, rows, Q, D, L, W, eps, dropout,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DROPOUT: tl.constexpr, LEARNS: tl.constexpr,
):  # fmt: skip
    """``layer_norm(residual + dropout(x))``; LEARNS keeps the sum and its statistics."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d0 = tl.arange(0, BLOCK)
    d1, d2, d3 = d0 + BLOCK, d0 + 2 * BLOCK, d0 + 3 * BLOCK
    m = row < rows
    x, residual = row // Q * s_xb + row % Q * s_xq, row // Q * s_rb + row % Q * s_rq
    # [ROWS, BLOCK]
    b0, b1 = _load(p_x, x, d0, m, D, L), _load(p_x, x, d1, m, D, L)
    b2, b3 = _load(p_x, x, d2, m, D, L), _load(p_x, x, d3, m, D, L)
    if DROPOUT:
        drawn0, drawn1, drawn2, drawn3 = _drawn(p_seed, row, d0, BLOCK)
        b0, b1 = _dropped(b0, drawn0, dropout), _dropped(b1, drawn1, dropout)
        b2, b3 = _dropped(b2, drawn2, dropout), _dropped(b3, drawn3, dropout)
    b0, b1 = b0 + _load(p_residual, residual, d0, m, D, L), b1 + _load(p_residual, residual, d1, m, D, L)
    b2, b3 = b2 + _load(p_residual, residual, d2, m, D, L), b3 + _load(p_residual, residual, d3, m, D, L)
    b0, b1, b2, b3 = _rounded(b0, p_out), _rounded(b1, p_out), _rounded(b2, p_out), _rounded(b3, p_out)
    out = row * s_out
    if LEARNS:
        _store(p_sum, out, d0, m, D, W, b0)
        _store(p_sum, out, d1, m, D, W, b1)
        _store(p_sum, out, d2, m, D, W, b2)
        _store(p_sum, out, d3, m, D, W, b3)
    mean = (tl.sum(b0, 1) + tl.sum(b1, 1) + tl.sum(b2, 1) + tl.sum(b3, 1)) / D
    b0, b1 = tl.where((d0 < D)[None, :], b0 - mean[:, None], 0.0), tl.where((d1 < D)[None, :], b1 - mean[:, None], 0.0)
    b2, b3 = tl.where((d2 < D)[None, :], b2 - mean[:, None], 0.0), tl.where((d3 < D)[None, :], b3 - mean[:, None], 0.0)
    squares = tl.sum(b0 * b0, 1) + tl.sum(b1 * b1, 1) + tl.sum(b2 * b2, 1) + tl.sum(b3 * b3, 1)
    rstd = tl.rsqrt(squares / D + eps)
    if LEARNS:
        tl.store(p_mean + row, mean, m)
        tl.store(p_rstd + row, rstd, m)
    _scale_and_store(p_out, out, d0, m, D, W, b0, rstd, p_weight, p_bias)
    _scale_and_store(p_out, out, d1, m, D, W, b1, rstd, p_weight, p_bias)
    _scale_and_store(p_out, out, d2, m, D, W, b2, rstd, p_weight, p_bias)
    _scale_and_store(p_out, out, d3, m, D, W, b3, rstd, p_weight, p_bias)


@triton.jit
def _scale_and_store(p_out, out, d, m, D, W, b, rstd, p_weight, p_bias):
    weight = tl.load(p_weight + d, d < D, other=0.0).to(tl.float32)
    bias = tl.load(p_bias + d, d < D, other=0.0).to(tl.float32)
    _store(p_out, out, d, m, D, W, b * rstd[:, None] * weight[None, :] + bias[None, :])


@triton.jit
def _by_weight(p_grad, p_sum, p_weight, grad, at, d, m, D, L, mean, rstd):
    """Of a part: the gradient, the normalised sum, and the gradient times the weight."""
    b_g = _load(p_grad, grad, d, m, D, L)
    b_n = tl.where((d < D)[None, :], (_load(p_sum, at, d, m, D, L) - mean[:, None]) * rstd[:, None], 0.0)
    weight = tl.load(p_weight + d, d < D, other=0.0).to(tl.float32)
    return b_g, b_n, b_g * weight[None, :]


@triton.jit
def _store_gradients(p_dx, p_dr, at, d, m, D, W, b_w, b_n, along, mean, rstd, drawn, dropout, DROPOUT: tl.constexpr):
    b = (b_w - b_n * along[:, None] - mean[:, None]) * rstd[:, None]
    _store(p_dr, at, d, m, D, W, b)
    if DROPOUT:
        _store(p_dx, at, d, m, D, W, _dropped(b, drawn, dropout))


@triton.jit
def residual_norm_gradient_kernel(
    p_grad, p_sum, p_weight, p_seed, p_mean, p_rstd, p_dx, p_dr, p_parts,
    s_gb, s_gq, s_out, rows, Q, D, L, W, dropout,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Gradients of the two summands, and the sums of those of weight and bias over the rows of this program.

    Without dropout the summands have one gradient, that of the residual.
    """
    d0 = tl.arange(0, BLOCK)
    d1, d2, d3 = d0 + BLOCK, d0 + 2 * BLOCK, d0 + 3 * BLOCK
    zero = tl.zeros([BLOCK], tl.float32)
    w0, w1, w2, w3 = zero, zero, zero, zero
    c0, c1, c2, c3 = zero, zero, zero, zero
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        m = row < rows
        mean, rstd = tl.load(p_mean + row, m, other=0.0), tl.load(p_rstd + row, m, other=0.0)
        grad, at = row // Q * s_gb + row % Q * s_gq, row * s_out
        # [ROWS, BLOCK]
        g0, n0, b0 = _by_weight(p_grad, p_sum, p_weight, grad, at, d0, m, D, L, mean, rstd)
        g1, n1, b1 = _by_weight(p_grad, p_sum, p_weight, grad, at, d1, m, D, L, mean, rstd)
        g2, n2, b2 = _by_weight(p_grad, p_sum, p_weight, grad, at, d2, m, D, L, mean, rstd)
        g3, n3, b3 = _by_weight(p_grad, p_sum, p_weight, grad, at, d3, m, D, L, mean, rstd)
        w0, w1, w2, w3 = (
            w0 + tl.sum(g0 * n0, 0),
            w1 + tl.sum(g1 * n1, 0),
            w2 + tl.sum(g2 * n2, 0),
            w3 + tl.sum(g3 * n3, 0),
        )
        c0, c1, c2, c3 = c0 + tl.sum(g0, 0), c1 + tl.sum(g1, 0), c2 + tl.sum(g2, 0), c3 + tl.sum(g3, 0)
        along = (tl.sum(b0 * n0, 1) + tl.sum(b1 * n1, 1) + tl.sum(b2 * n2, 1) + tl.sum(b3 * n3, 1)) / D
        level = (tl.sum(b0, 1) + tl.sum(b1, 1) + tl.sum(b2, 1) + tl.sum(b3, 1)) / D
        drawn0, drawn1, drawn2, drawn3 = b0, b1, b2, b3
        if DROPOUT:
            drawn0, drawn1, drawn2, drawn3 = _drawn(p_seed, row, d0, BLOCK)
        _store_gradients(p_dx, p_dr, at, d0, m, D, W, b0, n0, along, level, rstd, drawn0, dropout, DROPOUT)
        _store_gradients(p_dx, p_dr, at, d1, m, D, W, b1, n1, along, level, rstd, drawn1, dropout, DROPOUT)
        _store_gradients(p_dx, p_dr, at, d2, m, D, W, b2, n2, along, level, rstd, drawn2, dropout, DROPOUT)
        _store_gradients(p_dx, p_dr, at, d3, m, D, W, b3, n3, along, level, rstd, drawn3, dropout, DROPOUT)
    # [programs, 2, D]
    p_parts += tl.program_id(0) * 2 * D
    tl.store(p_parts + d0, w0, d0 < D)
    tl.store(p_parts + d1, w1, d1 < D)
    tl.store(p_parts + d2, w2, d2 < D)
    tl.store(p_parts + d3, w3, d3 < D)
    tl.store(p_parts + D + d0, c0, d0 < D)
    tl.store(p_parts + D + d1, c1, d1 < D)
    tl.store(p_parts + D + d2, c2, d2 < D)
    tl.store(p_parts + D + d3, c3, d3 < D)


@triton.jit
def relu_dropout_kernel(p_x, p_seed, p_out, count, dropout, BLOCK: tl.constexpr, DROPOUT: tl.constexpr):
    """``dropout(relu(x))`` of numbers side by side."""
    quad = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * BLOCK * 4 + tl.arange(0, BLOCK)
    drawn = tl.zeros([BLOCK], tl.float32)
    drawn0, drawn1, drawn2, drawn3 = drawn, drawn, drawn, drawn
    if DROPOUT:
        drawn0, drawn1, drawn2, drawn3 = tl.rand4x(tl.load(p_seed), quad, n_rounds=ROUNDS)
    _relu(p_x, p_out, start, count, drawn0, dropout, DROPOUT)
    _relu(p_x, p_out, start + BLOCK, count, drawn1, dropout, DROPOUT)
    _relu(p_x, p_out, start + 2 * BLOCK, count, drawn2, dropout, DROPOUT)
    _relu(p_x, p_out, start + 3 * BLOCK, count, drawn3, dropout, DROPOUT)


@triton.jit
def _relu(p_x, p_out, at, count, drawn, dropout, DROPOUT: tl.constexpr):
    b = tl.load(p_x + at, at < count, other=0.0).to(tl.float32)
    b = tl.where(b <= 0, 0.0, b)  # a number that is none stays so
    if DROPOUT:
        b = _dropped(b, drawn, dropout)
    tl.store(p_out + at, b.to(p_out.dtype.element_ty), at < count)
