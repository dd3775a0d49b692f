"""Every subset of a bias's parts against scores computed pair by pair, in eager, cached and fused attention.

Output and every gradient. A part that is left out, or has no effect, has no gradient.
"""

import importlib.util
import itertools
import math

import pytest
import torch

from lamemo_fairseq.core.attention import Attended, RelativeBias, causal_attention
from lamemo_fairseq.core.decoding.attention import Columns, cached_attention
from lamemo_fairseq.core.memory.lookahead import LookaheadWindow, lookahead_attention

from ..gpus import DEVICE

SUBSETS = list(itertools.chain.from_iterable(itertools.combinations(RelativeBias._fields, n) for n in range(5)))
subsets = pytest.mark.parametrize("parts", SUBSETS, ids=lambda parts: "-".join(parts) or "none")
HEADS, SIZE = 2, 3


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_of(parts, queries, keys, distances, dtype=torch.float64, device="cpu", streams=2):
    """q, k, v and a bias of the given parts, as leaves."""
    rows = [normal(streams, HEADS, n, SIZE, seed=seed) for seed, n in enumerate((queries, keys, keys))]
    shapes = {"content": (SIZE,), "position": (SIZE,), "table": (distances, SIZE), "score": (distances,)}
    bias = {name: normal(HEADS, *shapes[name], seed=4) for name in parts}
    leaves = [t.to(device, dtype).requires_grad_() for t in (*rows, *bias.values())]
    return leaves[:3], RelativeBias(**dict(zip(bias, leaves[3:], strict=True)))


def pairwise(q, k, v, bias, row_of):
    """``row_of(i, j)`` is the pair's row of the table and of the scores, None for a pair that is not seen."""
    output, normalizer = [], []
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        scores, seen = [], [j for j in range(k.size(2)) if row_of(i, j) is not None]
        for j in seen:
            row = row_of(i, j)
            by_content = q[b, h, i] if bias.content is None else q[b, h, i] + bias.content[h]
            score = by_content @ k[b, h, j]
            if bias.table is not None:
                by_position = q[b, h, i] if bias.position is None else q[b, h, i] + bias.position[h]
                score = score + by_position @ bias.table[h, row]
            if bias.score is not None:
                score = score + bias.score[h, row]
            scores.append(score / math.sqrt(q.size(-1)))
        scores = torch.stack(scores)
        output.append(scores.softmax(0) @ v[b, h, seen])
        normalizer.append(scores.logsumexp(0))
    return Attended(torch.stack(output).view_as(q), torch.stack(normalizer).view(q.shape[:3]))


def interpolated(stored, new):
    """The released interpolation, written for the case that its maximum leaves."""
    gap = new.normalizer - stored.normalizer
    share = torch.where(
        gap >= 0, 1 / (1 + (-gap).exp() + 1e-6) * (1 + 1e-6), (gap.exp() + 1e-6) / (1 + gap.exp() + 1e-6)
    )
    return Attended(
        torch.lerp(stored.output, new.output, share.unsqueeze(-1)),
        torch.logaddexp(*(s.normalizer for s in (stored, new))),
    )


def assert_same(found, rows, bias, expected, exact_rows, exact_bias, tolerance):
    """Output, normaliser, and the gradients of a random weighting of the output."""
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double().cpu(), right, rtol=0, atol=tolerance)
    grad = normal(*expected.output.shape, seed=9)
    found.output.backward(grad.to(found.output))
    expected.output.backward(grad)
    for name, mine, right in zip("qkv", rows, exact_rows, strict=True):
        torch.testing.assert_close(mine.grad.double().cpu(), right.grad, rtol=0, atol=tolerance, msg=name)
    for name, mine, right in zip(bias._fields, bias, exact_bias, strict=True):
        assert (mine is None) == (right is None)
        if right is not None and right.grad is None:
            assert name == "position" and mine.grad is None
        elif right is not None:
            torch.testing.assert_close(mine.grad.double().cpu(), right.grad, rtol=0, atol=tolerance, msg=name)


def backends():
    yield pytest.param("eager", torch.float64, 1e-12, id="eager")
    yield pytest.param("blocked", torch.float64, 1e-12, id="blocked")
    if importlib.util.find_spec("triton") is not None:
        yield pytest.param("fused", torch.float32, 1e-4, id="fused")


@subsets
@pytest.mark.parametrize(("name", "dtype", "tolerance"), backends())
def test_causal_attention(parts, name, dtype, tolerance):
    queries, keys = 3, 5
    exact_rows, exact_bias = inputs_of(parts, queries, keys, keys)
    expected = pairwise(*exact_rows, exact_bias, lambda i, j: 2 - i + j if j <= i + 2 else None)
    rows, bias = inputs_of(parts, queries, keys, keys, dtype, DEVICE if name == "fused" else "cpu")
    found = causal_attention(name, *rows, bias)
    assert_same(found, rows, bias, expected, exact_rows, exact_bias, tolerance)


@subsets
@pytest.mark.parametrize(("name", "dtype", "tolerance"), backends())
def test_lookahead_attention(parts, name, dtype, tolerance):
    """So many slots for so few keys that the fused backend cuts them into chunks."""
    slots, keys = 70, 2
    device = DEVICE if name == "fused" else "cpu"
    window = LookaheadWindow(slots - keys + 1, False)
    stored = Attended(normal(1, HEADS, slots, SIZE, seed=7), normal(1, HEADS, slots, seed=8))

    def row(i, j):
        distance = window.first + j - i
        return distance - 1 if distance > 0 else None

    exact_rows, exact_bias = inputs_of(parts, slots, keys, slots, streams=1)
    expected = interpolated(stored, pairwise(*exact_rows, exact_bias, row))
    rows, bias = inputs_of(parts, slots, keys, slots, dtype, device, 1)
    held = Attended(*(t.to(device, dtype) for t in stored))
    found = lookahead_attention(name, *rows, bias, window, held)
    assert_same(found, rows, bias, expected, exact_rows, exact_bias, tolerance)


@subsets
@pytest.mark.parametrize("queries", [1, 3])
def test_cached_attention(parts, queries):
    """Over more columns than are looked at, with more distances than are needed."""
    columns, distances, oldest = 6, 8, 1
    exact_rows, exact_bias = inputs_of(parts, queries, columns, distances)

    def row(i, j):
        distance = columns - queries + i - j
        return distances - 1 - distance if distance >= 0 and j >= oldest else None

    expected = pairwise(*exact_rows, exact_bias, row)
    rows, bias = inputs_of(parts, queries, columns, distances)
    at = columns - queries
    query = torch.arange(at, columns).expand(2, queries)
    for common in (at, None):  # known to the host, and not
        where = Columns(oldest, columns, query, torch.full((2,), oldest), columns - 1, None, common)
        found = cached_attention(*rows, bias, where)
        for mine, right in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, right, rtol=0, atol=1e-12)
    assert_same(found, rows, bias, expected, exact_rows, exact_bias, 1e-12)
