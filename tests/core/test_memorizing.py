"""The memorizing memory against a computation written from the paper, and its store.

Shapes: one stream; n tokens of a segment, S rows of the store, k retrieved rows, H heads, D size of a head.
"""

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lamemo_fairseq.core.decoding.state import DecodingState
from lamemo_fairseq.core.decoding.step import kernel_step
from lamemo_fairseq.core.kernels import aligned
from lamemo_fairseq.core.memory import memorizing
from lamemo_fairseq.core.memory.memorizing import attention, search
from lamemo_fairseq.core.memory.memorizing.options import MemorizingOptions

from ..gpus import DEVICE
from .helpers import (
    assert_fused_is_as_exact,
    random_tokens,
    read_by_token,
    read_features,
    read_streams,
    tiny_decoder,
    whole_segments,
)
from .paper import Paper

TOP_K, DENSE = ("memorizing", "transformer-xl", "top-k"), ("memorizing", "transformer-xl", "dense")
ODD = {"decoder_embed_dim": 10, "decoder_attention_heads": 3, "decoder_head_dim": 3, "decoder_ffn_embed_dim": 7}
both = pytest.mark.parametrize("variant", [TOP_K, DENSE], ids="-".join)


def model(variant, **options):
    """A tiny model whose gates and scales have been learned."""
    decoder = tiny_decoder(variant, **options)
    attention = decoder.layers[decoder.memory.store_layer].self_attn
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (attention.log_scale, *([attention.gate] if variant == TOP_K else [])):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return decoder


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def attend(q, keys, values, scale):
    weights = np.exp(scale * (keys @ q))
    return weights @ values / weights.sum()


class MemorizingPaper(Paper):
    """The model in numpy; the layer with the store is run on its own."""

    def __init__(self, decoder, top, size, store_layer, pre_norm=False):
        super().__init__(decoder, pre_norm)
        self.top, self.size, self.store_layer = top, size, store_layer
        prefix = f"layers.{store_layer}.self_attn."
        self.scale = np.exp(self.w[prefix + "log_scale"])
        self.gate = None if top is None else 1 / (1 + np.exp(-self.w[prefix + "gate"]))
        self.keys, self.values = None, None  # [S, H, D]

    def heads_of(self, layer, rows):
        if self.pre_norm:
            rows = self.norm(layer, "self_attn_layer_norm", rows)
        qkv = (rows @ self.w[f"layers.{layer}.self_attn.qkv_proj.weight"].T).reshape(len(rows), 3, self.heads, -1)
        return unit(qkv[:, 0]), unit(qkv[:, 1]), qkv[:, 2]

    def read(self, q, i, h, k, v):
        """What query i of head h reads of ``k, v``, up to row i, and of the store."""
        keys, values, scale = k[: i + 1, h], v[: i + 1, h], self.scale[h]
        stored = (self.keys[:, h], self.values[:, h]) if self.keys is not None else (keys[:0], values[:0])
        if self.top is None:
            return attend(q, np.concatenate([stored[0], keys]), np.concatenate([stored[1], values]), scale)
        local = attend(q, keys, values, scale)
        if not len(stored[0]):
            return local
        best = sorted(range(len(stored[0])), key=lambda row: (-(stored[0][row] @ q), row))[: self.top]
        return self.gate[h] * attend(q, stored[0][best], stored[1][best], scale) + (1 - self.gate[h]) * local

    def through_store(self, slots, rows):
        """Retrieve, then append."""
        layer, everything = self.store_layer, np.concatenate([slots, rows]) if self.top else rows
        q, k, v = self.heads_of(layer, everything)
        first = len(everything) - len(rows)
        read = np.array(
            [[self.read(q[i, h], i, h, k, v) for h in range(self.heads)] for i in range(first, len(everything))]
        )
        if self.keys is None:
            self.keys, self.values = k[:0], v[:0]
        self.keys, self.values = (
            np.concatenate([old, new[first:]])[-self.size :] for old, new in ((self.keys, k), (self.values, v))
        )
        rows = rows + read.reshape(len(rows), -1) @ self.w[f"layers.{layer}.self_attn.out_proj.weight"].T
        if self.pre_norm:
            return rows + self.feed_forward(layer, self.norm(layer, "final_layer_norm", rows))
        rows = self.norm(layer, "self_attn_layer_norm", rows)
        return self.norm(layer, "final_layer_norm", rows + self.feed_forward(layer, rows))

    def text(self, embedded, period, mem_len):
        """Features of a text."""
        slots, features = [embedded[:0]] * self.layers, []
        for start in range(0, len(embedded), period):
            rows = embedded[start : start + period]
            for layer in range(self.layers):
                everything = np.concatenate([slots[layer], rows])
                if layer == self.store_layer:
                    rows = self.through_store(slots[layer], rows)
                else:
                    rows = self.through(layer, everything, len(rows), lambda i: range(i + 1))
                slots[layer] = everything[max(len(everything) - mem_len, 0) :]
            features.append(rows)
        return np.concatenate(features)


OPTIONS = [
    {"store_len": 12},
    {"store_len": 7, "mem_len": 7, "decoder_layers": 4},
    {"store_len": 5, "mem_len": 2, "segment_length": 8, "decoder_layers": 3, "store_layer": 1},
    {"store_len": 20, "mem_len": 0, "decoder_normalize_before": True},
    {"store_len": 9, "segment_length": 5, "decoder_layers": 1},
]


@both
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_segments_equal_the_papers_computation(variant, options, monkeypatch):
    monkeypatch.setattr(search, "AT_ONCE", 100)  # a stream and some queries at a time
    top = 3 if variant == TOP_K else None
    decoder = model(variant, **ODD, **options, **({"retrieved_rows": top} if top else {}))
    words = random_tokens(2, 22)
    features, state = read_features(decoder, words)
    layers = options.get("decoder_layers", 2)
    store_layer = options.get("store_layer", layers - layers // 4) - 1
    for stream in range(2):
        pre_norm = options.get("decoder_normalize_before", False)
        paper = MemorizingPaper(decoder, top, options["store_len"], store_layer, pre_norm)
        expected = paper.text(paper.embedding(words[stream]), decoder.segment_length, decoder.memory.slots)
        np.testing.assert_allclose(features[stream].numpy(), expected, rtol=0, atol=1e-9)
        for mine, other in ((state.keys, paper.keys), (state.values, paper.values)):
            np.testing.assert_allclose(mine[stream].transpose(0, 1).numpy(), other, rtol=0, atol=1e-9)


@both
@torch.no_grad()
def test_decoding_reads_the_store_in_blocks(variant, monkeypatch):
    decoder, tokens = model(variant, store_len=8, segment_length=4), random_tokens(3, 19)
    monkeypatch.setattr(search, "AT_ONCE", 400)
    expected = decoder.output_layer(whole_segments(decoder, tokens))
    torch.testing.assert_close(read_by_token(decoder, tokens, first=7), expected, rtol=0, atol=1e-11)


@both
@torch.no_grad()
def test_sequences_in_other_segments_have_stores_of_their_own(variant):
    """One sequence has an empty store, others a part of one and a full one."""
    decoder, tokens = model(variant, store_len=8, segment_length=4), random_tokens(3, 20)
    lengths, state = [2, 7, 15], DecodingState(decoder, 3)
    state.read(tokens, lengths)
    for step in range(4):
        new = torch.stack([tokens[n, length + step] for n, length in enumerate(lengths)]).unsqueeze(1)
        features = state.read(new)
        for n, length in enumerate(lengths):
            expected = whole_segments(decoder, tokens[n : n + 1, : length + step + 1])[0, -1]
            torch.testing.assert_close(features[n, 0], expected, rtol=0, atol=1e-11)


@torch.no_grad()
def test_rotated_layers_above_the_store_have_no_kernels_step():
    """The layer with the store, here the first, does not rotate."""
    decoder = tiny_decoder(("memorizing", "rotary", "top-k"), dtype=torch.float32, store_layer=1)
    assert kernel_step(DecodingState(decoder, 1)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("stored", "new", "size"), [(7, 3, 9), (7, 3, 20), (900, 3, 900), (5, 4, 4), (2, 9, 10), (0, 3, 5)]
)
def test_rows_appended_by_a_kernel(stored, new, size, dtype, monkeypatch):
    """Some rows leave, or none; new ones are views of a projection."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(2, 3, stored, 8, generator=generator).to(DEVICE, dtype)
    rows = torch.randn(2, new, 3, 2, 8, generator=generator).to(DEVICE, dtype)[:, :, :, 1].transpose(1, 2)
    found = []
    for kernels in (False, True):
        monkeypatch.setattr(attention, "fusable", lambda t, kernels=kernels: kernels)
        found.append(attention.appended(old, rows, size))
    assert torch.equal(*found) and found[1].is_contiguous()


def test_a_store_may_be_wider_than_its_heads():
    """As half precision stores it on a GPU, by zeros: a model on another device goes on with it, and the other way."""
    for variant in (TOP_K, DENSE):
        decoder, (first, second) = model(variant, store_len=8, decoder_layers=1), random_tokens(2, 8).split(4, dim=1)
        state = decoder.read_segment(first, None).state
        wide = replace(
            state, **{name: torch.nn.functional.pad(getattr(state, name), (0, 3)) for name in ("keys", "values")}
        )
        one, other = (decoder.read_segment(second, before) for before in (state, wide))
        torch.testing.assert_close(one.features, other.features, rtol=0, atol=1e-12)
        assert torch.equal(one.state.keys, other.state.keys)


@both
@torch.no_grad()
def test_a_store_forgets_what_came_in_first(variant):
    """A token is read as long as it is in the store, and no longer: here two segments, in a model of one layer."""
    decoder = model(variant, decoder_layers=1, mem_len=0, store_len=6)
    if variant == TOP_K:
        decoder.layers[0].self_attn.options = MemorizingOptions(store_len=6, retrieved_rows=6)
    tokens = random_tokens(1, 15)
    before = read_streams(decoder, tokens)[0, -3:]
    for position in range(12):
        other = tokens.clone()
        other[0, position] = 4 + (other[0, position] - 3) % 13
        assert torch.equal(read_streams(decoder, other)[0, -3:], before) == (position < 6)


@both
def test_no_gradient_flows_to_what_is_stored(variant):
    """Queries have one, of the scores: the differences of the loss with the store held."""
    decoder = model(variant, segment_length=4).train()
    first, second = random_tokens(1, 8).split(4, dim=1)
    state = decoder.read_segment(first, None).state
    assert not any(tensor.requires_grad for tensor in state.tensors())
    attention = decoder.layers[1].self_attn

    def loss():
        return decoder.read_segment(second, state).features.square().sum()

    parameters = [attention.qkv_proj.weight, attention.log_scale, *([attention.gate] if variant == TOP_K else [])]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss(), parameters), strict=True):
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        values = []
        for step in (1e-6, -2e-6, 1e-6):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
            values.append(loss().item())
        difference = (values[0] - values[1]) / 2e-6
        assert difference == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_keeps_keys_of_length_one(variant, dtype):
    exact, words = model(variant, store_len=9), random_tokens(2, 12)
    half, state, other = tiny_decoder(variant, store_len=9, dtype=dtype), None, None
    half.load_state_dict(exact.state_dict())
    for segment in words.split(3, dim=1):
        features, state, _ = half.read_segment(segment, state)
        expected, other, _ = exact.read_segment(segment, other)
        assert (features - expected).abs().max() < (0.02 if dtype == torch.float16 else 0.15) * expected.abs().max()
    assert state.keys.dtype == dtype
    torch.testing.assert_close(state.keys.float().norm(dim=-1), torch.ones(2, 2, 9), rtol=0, atol=0.01)


@both
def test_fused_kernels_at_odd_widths(variant, monkeypatch):
    """Features and gradients in float16 are as exact as those of plain operations, with more keys than queries."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    sizes = {"decoder_embed_dim": 10, "decoder_attention_heads": 2, "decoder_layers": 1, "mem_len": 2}

    def results(dtype, backend):
        decoder = model(variant, attention_backend=backend, **sizes).to(DEVICE, dtype).train()
        state, outputs = None, []
        for segment in random_tokens(1, 6).to(DEVICE).split(3, dim=1):
            features, state, _ = decoder.read_segment(segment, state)
            outputs.append(features.double())
        gradients = torch.autograd.grad(torch.cat(outputs).square().mean(), list(decoder.layers.parameters()))
        return [*outputs, *(gradient.double() for gradient in gradients)]

    if DEVICE == "cpu":
        monkeypatch.setattr(aligned, "matters", lambda x: True)
    assert_fused_is_as_exact(results)


@both
@torch.no_grad()
def test_nothing_grows_over_two_thousand_segments(variant):
    decoder = model(("memorizing", "alibi", variant[2]), store_len=9, decoder_layers=1)
    state, sizes = None, []
    for segment in random_tokens(2, 6000).split(3, dim=1):
        features, state, _ = decoder.read_segment(segment, state)
        sizes.append(features.abs().max())
    assert state.keys.shape == (2, 2, 9, 4) and max(sizes[-200:]) <= 1.5 * max(sizes[:200])


@torch.no_grad()
def test_a_longer_store_at_test_time():
    short, long = (model(TOP_K, store_len=length, retrieved_rows=2) for length in (6, 12))
    long.load_state_dict(short.state_dict())
    tokens = random_tokens(1, 18)
    one, other = read_streams(short, tokens)[0], read_streams(long, tokens)[0]
    assert torch.equal(one[:9], other[:9]) and not torch.allclose(one[9:], other[9:])


@torch.no_grad()
def test_the_size_of_the_store_is_told_once(caplog):
    memorizing._tell.cache_clear()
    with caplog.at_level(logging.INFO):
        read_streams(tiny_decoder(TOP_K, store_len=2**20), random_tokens(3, 6))
        read_streams(tiny_decoder(TOP_K, store_len=2**20), random_tokens(3, 6))
    size = 2 * 3 * 8 * 2**20 * 8 / 2**30
    assert [m for m in caplog.messages if "store takes" in m] == [
        f"the store takes up to 1,048,576 rows of one layer for each of 3 streams: {size:.3f} GiB, and as much of a "
        "checkpoint"
    ]


@pytest.mark.parametrize(("layers", "expected"), [(1, 1), (2, 2), (4, 3), (8, 6), (12, 9), (16, 12)])
def test_a_quarter_of_the_layers_is_above_the_store(layers, expected):
    decoder = tiny_decoder(TOP_K, decoder_layers=layers)
    assert [hasattr(layer.self_attn, "gate") for layer in decoder.layers].index(True) == expected - 1
    assert sum(name.endswith(("gate", "log_scale")) for name, _ in decoder.named_parameters()) == 2


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        (TOP_K, {"store_len": 0}, "--store-len is 0, it must be at least 1: for no store, pass --memory recurrent"),
        (TOP_K, {"retrieved_rows": 0}, "--retrieved-rows is 0, it must be at least 1"),
        (DENSE, {"retrieved_rows": 4}, "--retrieved-rows is 4, but --retrieval dense reads all: leave it out"),
        (TOP_K, {"store_layer": 3}, "--store-layer is 3, but there are 2 layers: pass one from 1 to 2, or leave it"),
        (DENSE, {"mem_len": 9}, "--store-len is 7, fewer rows than --mem-len 9 gives other layers: pass a longer one"),
        (DENSE, {"same_length": True}, "--same-length lets a token see a fixed number of rows, which would hide the"),
        ((*TOP_K[:2], "best"), {}, "unknown --retrieval 'best'; the known ones are top-k, dense"),
        (TOP_K, {"bptt_segments": 3}, "--bptt-segments is 3, but --memory memorizing lets no gradient through"),
    ],
)
def test_options_without_use_are_refused(variant, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_decoder(variant, **options)


def test_equal_scores_at_first():
    """Scales begin at 1 and gates half open, as in the authors' code."""
    attention = tiny_decoder(TOP_K).layers[1].self_attn
    assert attention.log_scale.tolist() == attention.gate.tolist() == [0, 0]
    q, k = attention.prepare(*torch.randn(2, 1, 2, 5, 4, dtype=torch.float64))
    assert (q.norm(dim=-1) * attention.scale).allclose(torch.ones(()).double(), atol=1e-5) and math.isclose(
        k.norm(dim=-1).mean().item(), 1, abs_tol=1e-5
    )
