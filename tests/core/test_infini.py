"""Infini-attention against a computation written from the paper, its gradient between segments, and its numbers.

Shapes: one stream; n tokens of a segment, H heads, D size of a head, d model width.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from lamemo_fairseq.core import LanguageModel
from lamemo_fairseq.core.decoding.state import DecodingState
from lamemo_fairseq.core.memory.infini.cache import empty_associations

from . import fake_graphs
from .helpers import (
    assert_decoding_follows_reordered_beams,
    assert_streams_end_anywhere,
    assert_updates_change_the_gradient_alone,
    config_of,
    random_tokens,
    read_features,
    read_streams,
    recording_of,
    tiny_decoder,
    tiny_options,
    whole_segments,
)
from .paper import Paper, differences

LINEAR, DELTA = ("infini", "transformer-xl", "linear"), ("infini", "transformer-xl", "delta")
rules = pytest.mark.parametrize("variant", [LINEAR, DELTA], ids=["linear", "delta"])
ODD = {"decoder_embed_dim": 10, "decoder_attention_heads": 3, "decoder_head_dim": 3, "decoder_ffn_embed_dim": 7}
SEGMENTED = {"segment_length": 6, "bptt_segments": 3}


def infini_decoder(variant=LINEAR, scale=1.0, **options):
    """A tiny model whose gates, one a head, are all different."""
    decoder = tiny_decoder(variant, **options)
    with torch.no_grad():
        for n, layer in enumerate(decoder.layers):
            gates = layer.self_attn.memory_gate
            gates.copy_(torch.linspace(-1.5, 2.0, gates.numel()) + 0.3 * n)
        for parameter in decoder.parameters():
            parameter.mul_(scale)
    return decoder


def sigma(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


class InfiniPaper(Paper):
    """The model in numpy. By the linear rule a query reads a weighted mean of all earlier values, without a matrix."""

    def __init__(self, decoder, delta, **shell):
        super().__init__(decoder, **shell)
        self.delta, self.gate_unit = delta, decoder.config.own_options.memory_gate_lr_scale

    def begin(self):
        """Forget everything."""
        # A layer: the keys and values of all earlier segments; M and z.
        self.past = [None] * self.layers
        self.written = [None] * self.layers

    def mixed(self, layer, q, k, v, attended):
        gates = 1 / (1 + np.exp(-self.gate_unit * self.w[f"layers.{layer}.self_attn.memory_gate"]))
        mixed = attended.copy()
        if self.past[layer] is not None:
            for i, h in np.ndindex(len(q), self.heads):
                mixed[i, h] = gates[h] * self.read(layer, h, q[i, h]) + (1 - gates[h]) * attended[i, h]
        self.write(layer, k, v)
        return mixed

    def read(self, layer, h, x):
        if self.delta:
            matrix, z = self.written[layer]
            return sigma(x) @ matrix[h] / (sigma(x) @ z[h] + 1e-6)
        keys, values = self.past[layer]
        weights = np.array([sigma(x) @ sigma(key) for key in keys[:, h]])
        return weights @ values[:, h] / (weights.sum() + 1e-6)

    def write(self, layer, k, v):
        size, matrices, sums = k.shape[-1], [], []
        before = self.written[layer] or (np.zeros((self.heads, size, size)), np.zeros((self.heads, size)))
        for h in range(self.heads):
            matrix, z = before[0][h].copy(), before[1][h].copy()
            for key, value in zip(k[:, h], v[:, h], strict=True):
                if self.delta and self.past[layer] is not None:
                    value = value - self.read(layer, h, key)
                matrix += np.outer(sigma(key), value)
                z += sigma(key)
            matrices.append(matrix)
            sums.append(z)
        earlier = self.past[layer]
        self.past[layer] = (k, v) if earlier is None else tuple(map(np.concatenate, zip(earlier, (k, v), strict=True)))
        self.written[layer] = np.array(matrices), np.array(sums)

    def text(self, embedded, period):
        """Features of a text."""
        self.begin()
        features = []
        for start in range(0, len(embedded), period):
            rows = embedded[start : start + period]
            for layer in range(self.layers):
                rows = self.through(layer, rows, len(rows), lambda i: range(i + 1))
            features.append(rows)
        return np.concatenate(features)


@rules
@pytest.mark.parametrize(
    "options",
    [
        {"segment_length": 5},
        {"segment_length": 6, "bptt_segments": 2, "decoder_layers": 3},
        {"segment_length": 4, "decoder_normalize_before": True, "clamp_len": 2},
    ],
    ids=str,
)
@torch.no_grad()
def test_segments_equal_the_papers_computation(variant, options):
    decoder = infini_decoder(variant, **{**ODD, **options})
    words = random_tokens(2, 13)
    features, state = read_features(decoder, words)
    pre_norm = options.get("decoder_normalize_before", False)
    paper = InfiniPaper(decoder, variant == DELTA, pre_norm=pre_norm, farthest=options.get("clamp_len"))
    for stream in range(2):
        expected = paper.text(paper.embedding(words[stream]), decoder.memory.period)
        np.testing.assert_allclose(features[stream].numpy(), expected, rtol=0, atol=1e-9)
        for matrix, normalizer, written in zip(state.matrices, state.normalizers, paper.written, strict=True):
            np.testing.assert_allclose(matrix[stream].numpy(), written[0], rtol=0, atol=1e-9)
            np.testing.assert_allclose(normalizer[stream].numpy(), written[1], rtol=0, atol=1e-9)


@rules
def test_gradient_flows_through_the_matrix_to_earlier_segments(variant):
    """By finite differences in the paper's computation, for embeddings and gates; of the third segment's tokens."""
    sizes = {"decoder_embed_dim": 6, "decoder_attention_heads": 2, "decoder_ffn_embed_dim": 5}
    decoder = infini_decoder(variant, scale=0.4, **{**sizes, **SEGMENTED})
    paper, words = InfiniPaper(decoder, variant == DELTA), random_tokens(1, 6)
    embedded, weights = paper.embedding(words[0]), np.random.default_rng(0).normal(size=(2, 6))
    name = "layers.0.self_attn.memory_gate"
    gates = paper.w[name].copy()

    def loss(x, gates):
        paper.w[name] = gates
        return float((weights * paper.text(x, 2)[4:]).sum())

    x = torch.tensor(embedded).unsqueeze(0).requires_grad_()
    features = decoder.memory(x, decoder.memory.initial_state(x), decoder.layers, decoder.positions).features
    wanted = (features[0, 4:] * torch.tensor(weights)).sum()
    found, found_gates = torch.autograd.grad(wanted, (x, decoder.layers[0].self_attn.memory_gate))
    expected = differences(lambda x: loss(x, gates), embedded)
    assert min(np.abs(expected[segment : segment + 2]).max() for segment in (0, 2, 4)) > 1e-4
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-5, atol=1e-7)
    expected = differences(lambda gates: loss(embedded, gates), gates)
    assert np.abs(expected).min() > 1e-4
    np.testing.assert_allclose(found_gates.numpy(), expected, rtol=1e-5, atol=1e-7)


@rules
def test_more_segments_an_update_change_the_gradient_alone(variant):
    assert_updates_change_the_gradient_alone(partial(infini_decoder, variant))


@rules
@torch.no_grad()
def test_streams_end_anywhere_inside_an_update(variant):
    assert_streams_end_anywhere(infini_decoder(variant, **SEGMENTED))


@rules
def test_recomputed_activations_give_the_same_gradients_through_segments(variant):
    def gradients(**options):
        decoder = infini_decoder(variant, **SEGMENTED, **options).train()
        read_streams(decoder, random_tokens(2, 12)).logsumexp(-1).sum().backward()
        return {name: p.grad for name, p in decoder.named_parameters()}

    recomputed = gradients(checkpoint_activations=True)
    for name, gradient in gradients().items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_the_first_segment_has_local_attention_alone():
    """By the flag, stream by stream: zeros in M and z mean nothing of themselves."""
    decoder, plain = infini_decoder(), tiny_decoder(("none", "transformer-xl", "right"))
    plain.load_state_dict({k: v for k, v in decoder.state_dict().items() if not k.endswith("memory_gate")})
    first, second = random_tokens(2, 6).split(3, dim=1)
    passage = decoder.read_segment(first, None)
    torch.testing.assert_close(passage.features, plain.read_segment(first).features, rtol=0, atol=1e-12)
    assert passage.state.written.all()
    expected = plain.read_segment(second).features
    for stream in (0, 1):
        flags = torch.arange(2).unsqueeze(1) == stream
        full = replace(passage.state, written=flags)
        states = full, full.map(lambda t: torch.zeros_like(t) if t.is_floating_point() else t)
        for state in states:
            features = decoder.read_segment(second, state).features
            torch.testing.assert_close(features[1 - stream], expected[1 - stream], rtol=0, atol=1e-12)
            assert (features[stream] - expected[stream]).abs().max() > 1e-3


def test_gates_begin_at_zero():
    model = LanguageModel(config_of(17, **tiny_options(LINEAR, {})))
    assert all(torch.equal(layer.self_attn.memory_gate, torch.zeros(2)) for layer in model.layers)


@torch.no_grad()
def test_memory_knows_no_positions():
    """What is written does not depend on the order of keys, nor what is read on where a query stands."""
    decoder = infini_decoder(("infini", "rotary", "linear"), segment_length=5)
    attention, rows = decoder.layers[0].self_attn, decoder.embed_tokens(random_tokens(1, 5))
    q, k, v = attention.project(rows, 5)
    empty, order = empty_associations(1, 2, 4, rows), torch.tensor([3, 0, 4, 1, 2])
    _, past = attention(rows, decoder.positions(5, None, rows)[0], empty)
    torch.testing.assert_close(past, attention.write(empty, k[:, :, order], v[:, :, order]))
    nothing = torch.zeros_like(q)
    read_out = attention.combine(q, nothing, past)
    torch.testing.assert_close(read_out[:, :, order], attention.combine(q[:, :, order], nothing, past))


@torch.no_grad()
def test_a_change_is_read_many_segments_later():
    decoder, tokens = infini_decoder(), random_tokens(1, 90)
    other = tokens.clone()
    other[0, 0] = 4 + (other[0, 0] - 3) % 13
    last = [read_streams(decoder, t)[0, -3:] for t in (tokens, other)]
    assert (last[0] - last[1]).abs().max() > 1e-6


@rules
@torch.no_grad()
def test_a_part_filled_segment_writes_nothing_in_generation(variant):
    """And a full one what the pass over segments writes; sequences fill theirs at other times."""
    decoder = infini_decoder(variant, segment_length=4)
    tokens, state = random_tokens(2, 8), DecodingState(decoder, 2)
    state.read(tokens[:, :3], [3, 2])
    assert not any(t.any() for cached in state.cache.layers for t in cached.past)
    state.read(tokens[:, 3:4], [1, 0])
    written = decoder.read_segment(tokens[:, :4], None).state
    for cached, matrix, normalizer in zip(state.cache.layers, written.matrices, written.normalizers, strict=True):
        assert cached.past.written.tolist() == [[True], [False]] and not cached.past.matrix[1].any()
        torch.testing.assert_close(cached.past.matrix[0], matrix[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(cached.past.normalizer[0], normalizer[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"segment_length": 4}, SEGMENTED], ids=str)
def test_decoding_of_ragged_sequences_and_reordered_beams(options):
    decoder = infini_decoder(DELTA, **options)
    assert_decoding_follows_reordered_beams(decoder)


def test_a_graph_is_recorded_from_the_third_segment_on(monkeypatch):
    """The state has its full size from the first segment on."""
    fake_graphs.install(monkeypatch)
    decoder, state = infini_decoder(cuda_graphs=True, **SEGMENTED).train(), None
    for count, segment in enumerate(random_tokens(2, 24).split(6, dim=1)):
        assert (recording_of(decoder) is not None) == (count == 3)
        state = decoder(segment, state).state


@rules
@torch.no_grad()
def test_nothing_grows_over_two_thousand_segments(variant):
    """M and z grow as the number of segments; what is read of them does not, nor does it fade."""
    decoder, state, sizes, sums = infini_decoder(variant, dtype=torch.float32, decoder_layers=1), None, [], []
    for segment in random_tokens(2, 6000).split(3, dim=1):
        features, state, _ = decoder.read_segment(segment, state)
        sizes.append(features.abs().max())
        sums.append(state.normalizers[0].sum())
    assert max(sizes[-200:]) <= 1.1 * max(sizes[:200])
    assert sums[-1] / sums[999] == pytest.approx(2, rel=0.05)
    exact = infini_decoder(variant, decoder_layers=1)
    expected = state.map(lambda t: t.double() if t.is_floating_point() else t)
    later = random_tokens(2, 3, seed=5)
    torch.testing.assert_close(
        decoder.read_segment(later, state).features.double(),
        exact.read_segment(later, expected).features,
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@rules
@torch.no_grad()
def test_half_precision_has_an_exact_memory(variant, dtype):
    """M and z are float32, far beyond what float16 holds; read-outs are ratios, which their size leaves as they are."""
    half, decoder = (infini_decoder(variant, scale=0.2, dtype=t) for t in (dtype, torch.float32))
    tokens = random_tokens(2, 12)
    found, expected = (whole_segments(d, tokens) for d in (half, decoder))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=60 * torch.finfo(dtype).eps)
    state = half.read_segment(tokens[:, :3], None).state
    assert {t.dtype for t in state.tensors()} == {torch.float32, torch.bool}
    larger = state.map(lambda t: t * 1e6 if t.is_floating_point() else t)
    one, other = (half.read_segment(tokens[:, 3:6], s) for s in (state, larger))
    torch.testing.assert_close(one.features, other.features, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert all(t.isfinite().all() for t in other.state.tensors()) and other.state.normalizers[0].max() > 1e6


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        (("infini", "transformer-xl", "gamma"), {}, r"unknown --memory-update-rule 'gamma'; .* linear, delta"),
        (LINEAR, {"memory_gate_lr_scale": 0.0}, r"--memory-gate-lr-scale is 0.0, it must be above 0 and finite"),
        (LINEAR, {"same_length": True}, r"--same-length .* but --memory infini has none"),
        (LINEAR, {"bptt_segments": 2}, r"--tokens-per-sample 3 .* --bptt-segments 2 .* pass a multiple"),
        (("infini", "absolute", "linear"), {}, r"--position-encoding absolute .* instead of infini"),
        (("infini", "disentangled", "linear"), {}, r"nothing attends to its right: take transformer-xl"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(variant, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_decoder(variant, **options)


def test_there_are_no_slots():
    """Whatever --mem-len says, a token attends within its segment."""
    decoders = [infini_decoder(mem_len=mem_len) for mem_len in (-3, 0, 50)]
    assert {decoder.memory.slots for decoder in decoders} == {0}
    scores = [read_streams(decoder, random_tokens(2, 9)) for decoder in decoders]
    assert all(torch.equal(scores[0], other) for other in scores[1:])
