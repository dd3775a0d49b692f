"""Dependent launches: kernels read their inputs after the wait alone, and results are those of other launches."""

import os

import pytest
import torch
from torch import nn

from lamemo_fairseq.core.attention import RelativeBias
from lamemo_fairseq.core.decoding.drawn import Drawn
from lamemo_fairseq.core.decoding.state import DecodingState
from lamemo_fairseq.core.decoding.step import kernel_step

from ..gpus import DEVICE, gpu
from .helpers import random_tokens, tiny_decoder

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(
    DEVICE != "cpu" or os.environ.get("TRITON_INTERPRET") != "1", reason="inputs arrive late under the interpreter only"
)


def random(*sizes, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def norm_of(size, seed):
    norm = nn.LayerNorm(size)
    norm.weight.data, norm.bias.data = 1 + random(size, seed=seed) / 4, random(size, seed=seed + 1) / 4
    return norm


def late(monkeypatch, module, run, *inputs):
    """Return what *run* returns if its *inputs* are NaN, or other words, until the kernel has waited for them."""
    true = [t.clone() for t in inputs]
    for t in inputs:
        t.fill_(torch.nan if t.is_floating_point() else 1)

    def arrive(PDL):
        for t, value in zip(inputs, true, strict=True):
            t.copy_(value)

    monkeypatch.setattr(module, "wait_for_inputs", arrive)
    return run()


@interpreted
@pytest.mark.parametrize("rows", [1, 5])
@torch.no_grad()
def test_a_map_waits_for_rows_and_residual(rows, monkeypatch):
    from lamemo_fairseq.core.kernels import row_kernels

    x, before, weight = random(rows, 24), random(rows, 40, seed=1), random(40, 24, seed=2)
    norm, before_norm = norm_of(24, 3), norm_of(40, 5)

    def run():
        return row_kernels.row_map(
            x, weight, random(40, seed=7), norm=norm, relu=True, residual=before, residual_norm=before_norm
        )

    expected = run()
    assert late(monkeypatch, row_kernels, run, x, before).equal(expected)


@interpreted
@pytest.mark.parametrize("columns", [200, 20])  # several programs for a head, and one
@torch.no_grad()
def test_attention_waits_for_the_new_token(columns, monkeypatch):
    from lamemo_fairseq.core.decoding import attention_kernel

    keys, values, qkv = random(1, 2, columns, 8), random(1, 2, columns, 8, seed=1), random(1, 48, seed=2)
    bias = RelativeBias(random(2, 8, seed=3), random(2, 8, seed=4), random(2, columns, 8, seed=5), random(2, columns))
    tokens, slots = torch.tensor([columns - 11]), torch.tensor([4])
    workspace = attention_kernel.Workspace.empty(keys)
    assert (workspace.splits > 1) == (columns == 200)

    def run():
        return attention_kernel.cached_attention(qkv, keys, values, bias, tokens, slots, 10, workspace)

    expected = run()
    assert late(monkeypatch, attention_kernel, run, qkv).equal(expected)


@interpreted
def test_drawing_waits_for_the_scores(monkeypatch):
    from lamemo_fairseq.core.decoding import word_kernels

    scores = random(2, 21)

    def run():
        words, tokens, noted = (
            torch.zeros(2, 1, dtype=torch.int64),
            torch.zeros(2, dtype=torch.int64),
            torch.zeros(2, 3),
        )
        drawn = Drawn(noted.long(), noted.clone(), tokens.clone())
        seed = torch.tensor([3])
        word_kernels.draw_next(scores, words, tokens, drawn, seed, torch.empty_like(scores), top_p=0.8)
        return drawn.log_probs[:, :1]

    expected = run()
    assert late(monkeypatch, word_kernels, run, scores).equal(expected)


@pytest.mark.parametrize("variant", [("lookahead", "disentangled", "right"), ("recurrent", "shaw", "right")], ids=str)
@torch.no_grad()
def test_early_loads_change_no_bit(variant, monkeypatch):
    from lamemo_fairseq.core.kernels import dependent

    decoder = tiny_decoder(variant, dtype=torch.float32, mem_len=70, segment_length=20, decoder_layers=1).to(DEVICE)
    results = []
    for most in (dependent.MOST_ROWS, 0):
        monkeypatch.setattr(dependent, "MOST_ROWS", most)
        state = DecodingState(decoder, 2)
        state.read(random_tokens(2, 70).to(DEVICE), [70, 34])
        features = kernel_step(state)(random_tokens(2, 1, seed=5).to(DEVICE))
        results.append([features, *state.cache.tensors()])
    assert all(one.equal(other) for one, other in zip(*results, strict=True))


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 16, 17])
@torch.no_grad()
def test_dependent_launches_change_no_bit(rows, dtype, monkeypatch):
    from lamemo_fairseq.core.kernels import dependent

    sizes = {"mem_len": 70, "segment_length": 20, "decoder_embed_dim": 64}
    decoder = tiny_decoder(("lookahead", "disentangled", "right"), dtype=dtype, **sizes).to(DEVICE)
    words, results = random_tokens(rows, 1, seed=5).to(DEVICE), []
    for mode in (0, dependent.MODE):
        monkeypatch.setattr(dependent, "MODE", mode)
        state = DecodingState(decoder, rows)
        state.read(random_tokens(rows, 50).to(DEVICE))
        step = kernel_step(state)
        graph = torch.cuda.CUDAGraph()
        step(words)
        with torch.cuda.graph(graph):
            features = step(words)
        graph.replay()
        results.append([features, *state.cache.tensors()])
    assert all(one.equal(other) for one, other in zip(*results, strict=True))
