"""Attention block by block against eager attention in float64: output, normaliser and every gradient."""

import math

import pytest
import torch

from lamemo_fairseq.core.attention import RelativeBias, blocked, causal_attention

from .attention_cases import CASES, NAMES, Case, computed
from .helpers import random_tokens, tiny_decoder

DROPOUT = [Case(37, 37, 5), Case(40, 33, 8, "right", ragged=True), Case(18, 35, 6, parts="content table score")]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Small enough for several tiles of queries, of heads and of streams. Memory that is not written holds NaN."""
    monkeypatch.setattr(blocked, "QUERIES", 16)
    monkeypatch.setattr(blocked, "SCORES", 16 * 40)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(math.nan))


def assert_same(case, dropout=0.0):
    torch.manual_seed(1)
    expected = computed(case, "eager", torch.float64, "cpu", dropout=dropout)
    torch.manual_seed(1)
    found = computed(case, "blocked", torch.float64, "cpu", dropout=dropout)
    for name in NAMES:
        if expected[name] is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_as_eager(case):
    assert_same(case)


@pytest.mark.parametrize("case", DROPOUT, ids=lambda case: "-".join(map(str, case)))
def test_dropout_is_eagers(case):
    """The random numbers are the same, and so is what they drop."""
    assert_same(case, dropout=0.3)


def test_whole_streams_in_a_tile(monkeypatch):
    """Of three streams two fit into a tile, and one is left."""
    monkeypatch.setattr(blocked, "SCORES", 4 * 10 * 12 // torch.get_num_threads())
    assert_same(Case(10, 12, 5, parts="content position table score", streams=3))


def test_one_head_in_a_tile(monkeypatch):
    """With one query, the scores of a head by distance may be read where they lie."""
    monkeypatch.setattr(blocked, "SCORES", 1)
    assert_same(Case(1, 9, 4, parts="content score", heads=3))
    assert_same(Case(10, 12, 5, parts="content position table score", heads=3))


def test_threads_may_change_before_the_backward_pass():
    q, k, v = (torch.randn(2, 4, 40, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    gradients, threads = [], torch.get_num_threads()
    for other in (threads, threads + 1):
        attended = causal_attention("blocked", q, k, v, RelativeBias())
        torch.set_num_threads(other)
        try:
            gradients.append(torch.autograd.grad(attended.output.sum(), (q, k, v)))
        finally:
            torch.set_num_threads(threads)
    for one, same in zip(*gradients, strict=True):
        torch.testing.assert_close(one, same, rtol=0, atol=1e-12)


@pytest.mark.parametrize("recomputed", [False, True], ids=["stored", "recomputed"])
def test_a_decoder(recomputed):
    """With memory, dropout and recomputed activations, every gradient is that of the eager backend."""
    passes = []
    options = {"dropout": 0.2, "attention_dropout": 0.3, "checkpoint_activations": recomputed}
    for backend in ("eager", "blocked"):
        decoder = tiny_decoder(attention_backend=backend, **options).train()
        torch.manual_seed(1)
        state, total = None, torch.zeros(())
        for start in range(3):
            features, state, _ = decoder.read_segment(random_tokens(2, 5, seed=start), state)
            total = total + features.square().sum()
        total.backward()
        passes.append([p.grad for p in decoder.parameters()])
    for eager, found in zip(*passes, strict=True):
        torch.testing.assert_close(found, eager, rtol=1e-9, atol=1e-11)


def test_half_precision_and_autocast_are_left_to_eager():
    q = torch.randn(1, 2, 3, 4)
    assert "float32 and float64" in blocked.why_not(q.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert "float32 and float64" in blocked.why_not(q)
    assert blocked.why_not(q) is None
    with pytest.raises(ValueError, match="--attention-backend blocked cannot run here: it has float32 and float64"):
        causal_attention("blocked", q.bfloat16(), q.bfloat16(), q.bfloat16(), RelativeBias())
