"""Triton kernels: words in and words out of a step of decoding.

Shapes: B sequences, V words, d model width, n words drawn since the last start.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from typing import Optional

import triton
import triton.language as tl
from torch import Tensor

from ..kernels.dependent import launch_options, wait_for_inputs
from .drawn import Drawn

MOST_WORDS = 512  # comparing all pairs of more words takes longer than sorting them
PAIRS = 32  # words that are compared with all others at a time
WARPS = 8


@triton.jit
def embed_kernel(
    p_words, p_table, p_out, p_buffer, p_tokens, s_words, mem_len, columns, scale, D: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    word = tl.load(p_words + b * s_words)
    b_x = tl.load(p_table + word * D + d, mask=d < D, other=0).to(tl.float32) * scale
    b_x = b_x.to(p_out.dtype.element_ty)
    tl.store(p_out + b * D + d, b_x, mask=d < D)
    if KEEP:
        column = mem_len + tl.load(p_tokens + b)
        tl.store(p_buffer + (b * columns + column) * D + d, b_x, mask=d < D)


def embed(
    words: Tensor, table: Tensor, scale: float, tokens: Tensor, mem_len: int, buffer: Optional[Tensor] = None
) -> Tensor:
    """Return ``scale * table[words]``, ``[B, d]``; also write it into column M + *tokens* of ``buffer [B, C, d]``.

    Args:
        words: ``[B, 1]``.
        table: ``[V, d]``, contiguous.
        tokens: ``[B]`` int64.
        mem_len: M.
    """
    out = table.new_empty(len(words), table.size(1))
    target = out.unsqueeze(1) if buffer is None else buffer
    embed_kernel[(len(words),)](
        words, table, out, target, tokens, words.stride(0), mem_len, target.size(1), scale,
        D=table.size(1), KEEP=buffer is not None, BLOCK_D=triton.next_power_of_2(table.size(1)),
    )  # fmt: skip
    return out


@triton.jit
def clock(seed, offset):
    """Draw from the exponential distribution, float32 and above 0."""
    u = tl.maximum(tl.rand(seed, offset), 1e-10)
    # Near u = 0, where the smallest draws lie, 1 - u has no digits left.
    return tl.where(u < 1e-3, u + 0.5 * u * u, -tl.log(1 - u))


@triton.jit
def draw_kernel(
    p_scores, p_added, p_seed, p_log_probs, p_position, p_tokens, p_words, p_drawn, p_drawn_log_probs,
    V, capacity, s_scores, by_temperature, top_p,
    ADD: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_W: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    v = tl.arange(0, BLOCK_V)
    is_word = v < V
    wait_for_inputs(PDL)
    b_s = tl.load(p_scores + b * s_scores + v, mask=is_word, other=-float("inf")).to(tl.float32) * by_temperature
    b_s = b_s - tl.max(b_s, axis=0)
    b_p = b_s - tl.log(tl.sum(tl.exp(b_s), axis=0))
    if ADD:
        b_p += tl.load(p_added + v, mask=is_word, other=0).to(tl.float32)
    drawable = is_word
    if TOP_K > 0 or TOP_P:
        p_row = p_log_probs + b * V
        tl.store(p_row + v, b_p, mask=is_word)
        tl.debug_barrier()
        b_rank = tl.zeros([BLOCK_V], tl.int32)
        b_before = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, V, BLOCK_W):
            w = start + tl.arange(0, BLOCK_W)
            b_other = tl.load(p_row + w, mask=w < V, other=-float("inf"))
            equal = b_other[None, :] == b_p[:, None]
            preceding = (b_other[None, :] > b_p[:, None]) | (equal & (w[None, :] < v[:, None]))
            b_rank += tl.sum(preceding.to(tl.int32), axis=1)
            b_before += tl.sum(tl.where(preceding, tl.exp(b_other)[None, :], 0.0), axis=1)
        # The first k words alone remain, since `top_p` counts their probabilities.
        if TOP_K > 0:
            drawable = drawable & (b_rank < TOP_K)
        if TOP_P:
            drawable = drawable & ((b_before < top_p) | (b_rank == 0))
    position = tl.load(p_position + b)
    at = (position.to(tl.int32) * tl.num_programs(0) + b) * V + v
    # The word whose exponential clock rings first. If a sequence's scores hold NaN, the first word is drawn.
    b_rings = tl.where(drawable & (b_p == b_p), b_p - tl.log(clock(tl.load(p_seed), at)), -float("inf"))
    word = tl.minimum(tl.argmax(b_rings, axis=0), V - 1)
    log_prob = tl.sum(tl.where(v == word, b_p, 0.0), axis=0)
    tl.store(p_words + b, word.to(tl.int64))
    tl.store(p_drawn + b * capacity + position, word.to(tl.int64))
    tl.store(p_drawn_log_probs + b * capacity + position, log_prob)
    tl.store(p_position + b, position + 1)
    tl.store(p_tokens + b, tl.load(p_tokens + b) + 1)


def draw_next(
    scores: Tensor,
    words: Tensor,
    tokens: Tensor,
    drawn: Drawn,
    seed: Tensor,
    space: Tensor,
    temperature: float = 1.0,
    added: Optional[Tensor] = None,
    top_k: int = 0,
    top_p: float = 1.0,
) -> None:
    """Draw a word a sequence from ``softmax(scores / temperature) * exp(added)``, in one launch.

    Args:
        scores: ``[B, V]`` float32, V at most `MOST_WORDS`.
        words: ``[B, 1]`` int64, replaced by the words drawn, which are added to *drawn* with their log-probabilities.
        tokens: ``[B]`` int64, increased by one.
        seed: one int64; with the position in *drawn* it gives the random numbers.
        space: ``[B, V]`` float32 to work in.
        added: ``[V]``.
        top_k: draw from the k most probable words only (0: from all).
        top_p: draw from the fewest words whose probabilities add up to this (1: from all).
    """
    size = scores.size(1)
    draw_kernel[(len(scores),)](
        scores, scores if added is None else added, seed, space, drawn.position, tokens, words, drawn.words,
        drawn.log_probs, size, drawn.words.size(1), scores.stride(0), 1 / temperature, top_p,
        ADD=added is not None, TOP_K=top_k, TOP_P=top_p < 1, BLOCK_V=triton.next_power_of_2(size),
        BLOCK_W=PAIRS, num_warps=WARPS, **launch_options(len(scores), scores.device),
    )  # fmt: skip
