"""Memory tokens against a computation written from the paper, and what is their own: gradient, cache, segments.

Shapes: one stream; n tokens of a segment, K memory tokens, m cached rows, H heads, D size of a head, d model width.
"""

from functools import partial

import numpy as np
import pytest
import torch

from ..gpus import DEVICE
from .helpers import (
    assert_decoding_follows_reordered_beams,
    assert_updates_change_the_gradient_alone,
    random_tokens,
    read_features,
    read_streams,
    read_texts,
    segments_of,
    tiny_decoder,
    whole_segments,
)
from .paper import Paper, differences

PLAIN, DISENTANGLED = ("token", "transformer-xl", "right"), ("token", "disentangled-content", "right")
ODD = {
    "decoder_embed_dim": 10, "decoder_attention_heads": 3, "decoder_head_dim": 3, "decoder_ffn_embed_dim": 7,
    "memory_tokens": 3, "segment_length": 5, "mem_len": 0,
}  # fmt: skip
SEGMENTED = {"segment_length": 6, "bptt_segments": 3, "memory_tokens": 3}


class TokenPaper(Paper):
    """The model in numpy."""

    def __init__(self, decoder, reads_cache=False, **shell):
        super().__init__(decoder, **shell)
        self.reads_cache = reads_cache

    def seen(self, i, m, size, n):
        """The rows that row i of ``[cache; read; x; write]`` attends to."""
        cache, begin, end = list(range(m)), m + size, m + size + n
        if i < begin:
            return (cache if self.reads_cache else []) + list(range(m, begin))
        if i < end:
            return list(range(i + 1))
        return (cache if self.reads_cache else []) + list(range(m, end + size))

    def segment(self, x, tokens, cache):
        """Features ``[n, d]``, memory tokens written ``[K, d]``, and the rows ``[m + n, d]`` into every layer."""
        n, size, rows, entered = len(x), len(tokens), np.concatenate([tokens, x, tokens]), []
        for layer in range(self.layers):
            m = len(cache[layer])
            entered.append(np.concatenate([cache[layer], rows[size : size + n]]))
            everything = np.concatenate([cache[layer], rows])
            rows = self.through(layer, everything, len(rows), lambda i, m=m: self.seen(i, m, size, n))
        return rows[size : size + n], rows[size + n :], entered

    def text(self, embedded, period, mem_len):
        """Features of a text, and the memory tokens and cache behind it."""
        tokens = self.w["memory.initial_tokens"]
        cache = [embedded[:0]] * self.layers
        features = []
        for start in range(0, len(embedded), period):
            part, tokens, entered = self.segment(embedded[start : start + period], tokens, cache)
            cache = [rows[max(len(rows) - mem_len, 0) :] for rows in entered]
            features.append(part)
        return np.concatenate(features), tokens, cache


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        (PLAIN, {}),
        (PLAIN, {"mem_len": 7}),
        (PLAIN, {"mem_len": 4, "memory_reads_cache": True, "memory_tokens": 1}),
        (DISENTANGLED, {"mem_len": 7, "memory_reads_cache": True}),
        (DISENTANGLED, {"segment_length": 10, "bptt_segments": 2, "mem_len": 3, "decoder_layers": 3}),
        (PLAIN, {"mem_len": 7, "decoder_normalize_before": True, "clamp_len": 1}),
    ],
    ids=str,
)
@torch.no_grad()
def test_four_segments_equal_the_papers_computation(variant, options):
    options = {**ODD, **options}
    decoder = tiny_decoder(variant, **options)
    words = random_tokens(2, 18)
    features, state = read_features(decoder, words)
    paper = TokenPaper(
        decoder,
        options.get("memory_reads_cache", False),
        pre_norm=options.get("decoder_normalize_before", False),
        farthest=options.get("clamp_len"),
    )
    for row in range(2):
        expected, tokens, cache = paper.text(paper.embedding(words[row]), 5, options["mem_len"])
        np.testing.assert_allclose(features[row].numpy(), expected, rtol=0, atol=1e-9)
        np.testing.assert_allclose(state.tokens[row].numpy(), tokens, rtol=0, atol=1e-9)
        for hidden, rows in zip(state.hidden, cache, strict=True):
            np.testing.assert_allclose(hidden[row].numpy(), rows, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("variant", "mem_len"), [(PLAIN, 4), (DISENTANGLED, 0)], ids=str)
def test_gradient_flows_through_memory_tokens_to_an_earlier_segment(variant, mem_len):
    """By finite differences in the paper's computation, for embeddings and initial tokens; the cache is a constant."""
    sizes = {"decoder_embed_dim": 6, "decoder_attention_heads": 2, "memory_tokens": 2, "mem_len": mem_len}
    decoder = tiny_decoder(variant, **{**ODD, **sizes, "segment_length": 6, "bptt_segments": 3})
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(0.4)  # so that differences are exact enough
    paper = TokenPaper(decoder)
    words = random_tokens(1, 6)
    embedded = paper.embedding(words[0])
    weights = np.random.default_rng(0).normal(size=(2, 6))
    frozen, cache = [], [embedded[:0]] * 2
    tokens = initial = paper.w["memory.initial_tokens"]
    for start in range(0, 6, 2):
        frozen.append(cache)
        _, tokens, entered = paper.segment(embedded[start : start + 2], tokens, cache)
        cache = [rows[max(len(rows) - mem_len, 0) :] for rows in entered]

    def loss(x, tokens):
        """Of the third segment's tokens alone."""
        for start, cache in zip(range(0, 6, 2), frozen, strict=True):
            features, tokens, _ = paper.segment(x[start : start + 2], tokens, cache)
        return float((weights * features).sum())

    x = torch.tensor(embedded).unsqueeze(0).requires_grad_()
    features = decoder.memory(x, decoder.memory.initial_state(x), decoder.layers, decoder.positions).features
    learned = decoder.memory.initial_tokens
    found, found_initial = torch.autograd.grad((features[0, 4:] * torch.tensor(weights)).sum(), (x, learned))
    for gradient, expected in (
        (found[0].numpy(), differences(lambda x: loss(x, initial), embedded)),
        (found_initial.numpy(), differences(lambda tokens: loss(embedded, tokens), initial)),
    ):
        assert np.abs(expected[:2]).max() > 1e-4
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_initial_tokens_begin_as_large_as_what_a_layer_norm_leaves():
    options = {"memory_tokens": 200, "decoder_embed_dim": 32}
    decoder = tiny_decoder(PLAIN, **options)  # whose parameters are ten times as large
    assert float(decoder.memory.initial_tokens.std()) == pytest.approx(10, rel=0.05)


def test_initial_tokens_learn_whenever_a_stream_begins_and_have_a_zero_gradient_elsewhere():
    decoder = tiny_decoder(PLAIN).train()
    for epoch in (1, 2, 3):
        state = None
        for segment, _ in segments_of(decoder, random_tokens(2, 9, seed=epoch)):
            decoder.zero_grad()
            features, after, _ = decoder(segment, state)
            decoder.output_layer(features).logsumexp(-1).sum().backward()
            gradient = decoder.memory.initial_tokens.grad
            assert bool(gradient.abs().max() > 0) == (state is None)
            state = after


@pytest.mark.parametrize("options", [{"decoder_layers": 1}, {"memory_tokens": 1}, {}], ids=str)
def test_every_parameter_has_a_gradient_where_directions_are_told_apart(options):
    decoder = tiny_decoder(DISENTANGLED, **options).train()
    state = None
    for segment, _ in segments_of(decoder, random_tokens(2, 6)):
        decoder.zero_grad()
        features, state, _ = decoder(segment, state)
        decoder.output_layer(features).logsumexp(-1).sum().backward()
        assert [name for name, p in decoder.named_parameters() if p.grad is None] == []


def test_more_segments_an_update_change_the_gradient_alone():
    assert_updates_change_the_gradient_alone(partial(tiny_decoder, PLAIN))


OPTIONS = [
    {"mem_len": 0},
    {"mem_len": 0, "segment_length": 4, "bptt_segments": 2, "memory_tokens": 1, "decoder_layers": 1},
    {"mem_len": 5, "memory_reads_cache": True, **SEGMENTED},
    {"mem_len": 1, "segment_length": 2, "bptt_segments": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_decoding_of_ragged_sequences_and_reordered_beams(options):
    """With segments shorter than an update, without a cache, and with a cache that memory tokens read."""
    decoder = tiny_decoder(DISENTANGLED, **options)
    assert_decoding_follows_reordered_beams(decoder, words=10)


@torch.no_grad()
def test_segments_inside_an_update_are_causal_and_rows_do_not_depend_on_their_neighbours():
    decoder = tiny_decoder(PLAIN, **SEGMENTED)
    tokens = random_tokens(3, 15)
    expected = read_streams(decoder, tokens)
    for changed in range(15):
        other = tokens.clone()
        other[:, changed] = 4 + (other[:, changed] - 3) % 13
        found = read_streams(decoder, other)
        torch.testing.assert_close(found[:, :changed], expected[:, :changed], rtol=0, atol=1e-12)
        assert not torch.equal(found[:, changed], expected[:, changed])
    lengths = torch.tensor([15, 10, 1])
    padded = tokens.masked_fill(torch.arange(15) >= lengths.unsqueeze(1), 1)
    for found in (read_streams(decoder, padded, lengths=lengths.tolist()), read_texts(decoder, padded, lengths)):
        for row, length in enumerate(lengths.tolist()):
            torch.testing.assert_close(found[row, :length], expected[row, :length], rtol=0, atol=1e-12)


def test_recomputed_activations_give_the_same_gradients_through_segments():
    def gradients(**options):
        decoder = tiny_decoder(PLAIN, **SEGMENTED, **options).train()
        read_streams(decoder, random_tokens(2, 12)).logsumexp(-1).sum().backward()
        return {name: p.grad for name, p in decoder.named_parameters()}

    recomputed = gradients(checkpoint_activations=True)
    for name, gradient in gradients().items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-12, atol=1e-12)


def test_the_fused_backend_reads_the_tokens():
    pytest.importorskip("triton", reason="the fused backend needs Triton")
    passes = []
    for backend in ("eager", "fused"):
        decoder = tiny_decoder(PLAIN, dtype=torch.float32, attention_backend=backend, **SEGMENTED).to(DEVICE).train()
        with torch.no_grad():
            for p in decoder.parameters():
                p.mul_(0.3)
        scores = decoder.read_segment(random_tokens(2, 6).to(DEVICE), None).features
        scores.logsumexp(-1).sum().backward()
        passes.append((scores, {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}))
    (eager, gradients), (fused, others) = passes
    torch.testing.assert_close(fused, eager, rtol=0, atol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-3, msg=name)


def test_memory_tokens_are_dropped_out_where_they_are_read_and_where_they_are_written():
    decoder = tiny_decoder(PLAIN, dropout=0.5).train()
    rows = []
    decoder.layers[0].register_forward_hook(lambda module, inputs, output: rows.append(inputs[0]))
    _, state, _ = decoder.read_segment(random_tokens(2, 3), None)
    read, write = rows[0][:, :2], rows[0][:, -2:]
    assert not torch.equal(read, write)
    for dropped in (read, write, state.tokens):
        assert 0.2 < dropped.eq(0).double().mean() < 0.8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_near_as_its_rounding(dtype):
    decoder, half = (tiny_decoder(PLAIN, dtype=t, mem_len=3) for t in (torch.float32, dtype))
    with torch.no_grad():
        for one in (decoder, half):
            for p in one.parameters():
                p.mul_(0.2)
        found, expected = (whole_segments(d, random_tokens(2, 12)) for d in (half, decoder))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=60 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        (PLAIN, {"mem_len": -1}, r"--mem-len is -1, but --memory token needs at least 0"),
        (PLAIN, {"memory_tokens": 0}, r"--memory-tokens is 0, it must be at least 1"),
        (PLAIN, {"bptt_segments": 0}, r"--bptt-segments is 0, it must be at least 1"),
        (PLAIN, {"bptt_segments": 2}, r"--tokens-per-sample 3 .* --bptt-segments 2 .* pass a multiple"),
        (PLAIN, {"same_length": True}, r"--same-length .* leave it out, or pass --memory recurrent"),
        (("token", "shaw", "right"), {}, r"shaw has no distances to the right.*memory tokens"),
        (("token", "absolute", "right"), {}, r"--position-encoding absolute .* instead of token"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(variant, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_decoder(variant, **options)
