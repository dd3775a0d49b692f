"""Eager attention against loops written from the equations, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamemo_fairseq.core.attention import Attended, RelativeBias, eager
from lamemo_fairseq.core.memory.lookahead import LookaheadWindow
from lamemo_fairseq.core.memory.lookahead import eager as lookahead


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def bias_over(distances, heads, size, seed=1):
    """A bias with every part, its table holding *distances*."""
    content, position, table, score = tensors(
        (heads, size), (heads, size), (heads, len(distances), size), (heads, len(distances)), seed=seed
    )
    return RelativeBias(content, position, table, score)


def score(q, k, bias, h, t):
    position = (q + bias.position[h]) @ bias.table[h, t] + bias.score[h, t]
    return ((q + bias.content[h]) @ k + position) / math.sqrt(len(q))


@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 6), st.data())
@settings(max_examples=60, deadline=None)
def test_relative_shift(queries, distances, offset, data):
    offset = min(offset, queries)
    keys = data.draw(st.integers(1, distances))
    by_distance = torch.arange(queries * distances, dtype=torch.float64).view(queries, distances)
    shifted = eager.relative_shift(by_distance, offset, keys)
    for i in range(queries):
        for j in range(keys):
            if 0 <= offset - i + j < distances:
                assert shifted[i, j] == by_distance[i, offset - i + j]


@pytest.mark.parametrize(("queries", "keys", "span"), [(1, 1, None), (1, 6, None), (3, 7, None), (5, 5, 2), (4, 9, 6)])
def test_causal_attention(queries, keys, span):
    q, k, v = tensors((2, 2, queries, 3), (2, 2, keys, 3), (2, 2, keys, 3))
    distances = list(range(keys - 1, -1, -1))
    bias = bias_over(distances, 2, 3)
    attended = eager.causal_attention(q, k, v, bias, span)
    for b in range(2):
        for h in range(2):
            for i in range(queries):
                place = keys - queries + i
                seen = [j for j in range(place + 1) if span is None or place - j < span]
                scores = torch.stack([score(q[b, h, i], k[b, h, j], bias, h, distances.index(place - j)) for j in seen])
                output = scores.softmax(0) @ v[b, h, seen]
                torch.testing.assert_close(attended.output[b, h, i], output)
                torch.testing.assert_close(attended.normalizer[b, h, i], scores.logsumexp(0))


def lookahead_by_loops(q, k, v, bias, window, stored):
    slots = q.size(2)
    distances = list(window.distances(slots))
    output, normalizer = torch.empty_like(stored.output), torch.empty_like(stored.normalizer)
    for b, h, a in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        first = window.first
        if window.lengths is not None:
            first = slots - max(int(window.lengths[b]), 1) + 1
        seen = [p for p in range(first, slots + 1) if window.both_sides or p > a]
        scores = torch.stack(
            [score(q[b, h, a], k[b, h, p - window.first], bias, h, distances.index(p - a)) for p in seen]
        )
        c = scores.softmax(0) @ v[b, h, [p - window.first for p in seen]]
        d, new = stored.normalizer[b, h, a], scores.logsumexp(0)
        top = max(d, new)
        alpha = (d - top).exp() / ((d - top).exp() + (new - top).exp() + 1e-6)
        output[b, h, a] = alpha * stored.output[b, h, a] + (1 - alpha) * c
        normalizer[b, h, a] = torch.logaddexp(d, new)
    return Attended(output, normalizer)


@pytest.mark.parametrize("both_sides", [False, True])
@pytest.mark.parametrize(("slots", "keys"), [(1, 1), (5, 5), (5, 1), (7, 3)])
@pytest.mark.parametrize("ragged", [False, True])
def test_lookahead_attention(slots, keys, both_sides, ragged):
    q, k, v, o, d = tensors((2, 2, slots, 3), (2, 2, keys, 3), (2, 2, keys, 3), (2, 2, slots, 3), (2, 2, slots))
    lengths = torch.tensor([keys, max(keys - 2, 0)]) if ragged else None
    window = LookaheadWindow(slots - keys + 1, both_sides, lengths)
    bias = bias_over(window.distances(slots), 2, 3)
    stored = Attended(o, d)
    attended = lookahead.lookahead_attention(q, k, v, bias, window, stored)
    expected = lookahead_by_loops(q, k, v, bias, window, stored)
    torch.testing.assert_close(attended.output, expected.output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attended.normalizer, expected.normalizer, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("both_sides", [False, True])
def test_gradients_of_lookahead_attention(both_sides):
    window = LookaheadWindow(2, both_sides)
    q, k, v, o, d = tensors((1, 2, 4, 3), (1, 2, 3, 3), (1, 2, 3, 3), (1, 2, 4, 3), (1, 2, 4))
    bias = bias_over(window.distances(4), 2, 3)
    inputs = [t.requires_grad_() for t in (q, k, v, *bias)]

    def output(q, k, v, *parts):
        return lookahead.lookahead_attention(q, k, v, RelativeBias(*parts), window, Attended(o, d)).output

    assert torch.autograd.gradcheck(output, inputs)


def test_the_mixing_weight_has_the_gradient_of_its_maximum(monkeypatch):
    """With an eps large enough for differences to show; ``d alpha / d l = -g alpha (1 - alpha)``."""
    monkeypatch.setattr(lookahead, "INTERPOLATION_EPS", 0.1)
    o, c, d = tensors((1, 1, 8, 3), (1, 1, 8, 3), (1, 1, 8))
    new = (d + torch.linspace(-3, 3, 8)).requires_grad_()
    c.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda c, new: lookahead.merge(Attended(o, d), Attended(c, new)).output, (c, new), atol=1e-8
    )

    one, equal = d.new_ones(1, 1, 8, 1), d.clone().requires_grad_()
    alpha = lookahead.merge(Attended(one, d), Attended(0 * one, equal)).output.squeeze(-1)
    alpha.sum().backward()
    torch.testing.assert_close(equal.grad, -alpha * (1 - alpha))  # where both are equal, the new one is the maximum


def test_merging_is_one_softmax_over_both_sets_of_keys():
    """What a slot held and what it sees make the read-out over all keys, up to the eps of the released code."""
    q, k, v = tensors((1, 1, 1, 3), (1, 1, 9, 3), (1, 1, 9, 3))
    scores = (q @ k.transpose(-1, -2)).squeeze(2)
    whole = scores.softmax(-1).unsqueeze(2) @ v
    parts = [
        Attended(scores[..., s].softmax(-1).unsqueeze(2) @ v[:, :, s], scores[..., s].logsumexp(-1, keepdim=True))
        for s in (slice(0, 4), slice(4, 9))
    ]
    merged = lookahead.merge(*parts)
    torch.testing.assert_close(
        merged.output, whole, rtol=0, atol=lookahead.INTERPOLATION_EPS * float(v.abs().max()) * 2
    )
    assert not torch.equal(merged.output, whole)
    torch.testing.assert_close(merged.normalizer, scores.logsumexp(-1, keepdim=True), rtol=1e-12, atol=1e-12)


def test_a_stored_read_out_far_ahead_or_behind_wins_without_overflow():
    near, far = tensors((1, 1, 2, 3), (1, 1, 2, 3))
    high, low = torch.full((1, 1, 2), 1e4, dtype=torch.float64), torch.full((1, 1, 2), -1e4, dtype=torch.float64)
    for stored, new, kept in ((high, low, near), (low, high, far)):
        merged = lookahead.merge(Attended(near, stored), Attended(far, new))
        torch.testing.assert_close(merged.output, kept, rtol=0, atol=1e-5)
