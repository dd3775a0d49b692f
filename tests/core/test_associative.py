"""Associative memory against a computation written from the paper, and what is its own: gradient, matrices, decoding.

Shapes: one stream; n tokens of a segment, m memory tokens, s cached rows, d model width, e width of a key,
F = 6 e its features.
"""

from functools import partial

import numpy as np
import pytest
import torch

from lamemo_fairseq.core import LanguageModel
from lamemo_fairseq.core.decoding.state import DecodingState
from lamemo_fairseq.core.memory.associative.association import Association, Associations
from lamemo_fairseq.core.memory.associative.features import dpfp
from lamemo_fairseq.core.memory.associative.options import AssociativeOptions

from ..gpus import DEVICE
from .associative_paper import AssociativePaper
from .helpers import (
    assert_decoding_follows_reordered_beams,
    assert_one_segment_an_update_is_told,
    assert_updates_change_the_gradient_alone,
    config_of,
    random_tokens,
    read_features,
    read_streams,
    read_texts,
    tiny_decoder,
    tiny_options,
    whole_segments,
)
from .paper import differences

PLAIN = ("associative", "transformer-xl", "right")
ODD = {
    "decoder_embed_dim": 10, "decoder_attention_heads": 3, "decoder_head_dim": 3, "decoder_ffn_embed_dim": 7,
    "associative_tokens": 3, "associative_dim": 5, "segment_length": 4, "mem_len": 0,
}  # fmt: skip
SEGMENTED = {"segment_length": 6, "bptt_segments": 3}


@pytest.mark.parametrize(
    ("options", "limited"),
    [
        ({}, False),
        ({"associative_tokens": 1, "associative_dim": 1}, True),  # so few features that gamma is anything from 0 to 1
        ({"mem_len": 7}, False),
        ({"associative_decay": 0.6}, True),
        ({"associative_value_lr_scale": 0.3}, True),
        ({"mem_len": 3, "segment_length": 8, "bptt_segments": 2, "decoder_layers": 3}, True),
        ({"mem_len": 3, "decoder_normalize_before": True, "clamp_len": 2}, True),
    ],
    ids=str,
)
@torch.no_grad()
def test_segments_equal_the_papers_computation(options, limited):
    """Four segments, the last one shorter."""
    options = {**ODD, **options}
    decoder = tiny_decoder(PLAIN, **options)
    words = random_tokens(2, 14)
    features, state = read_features(decoder, words)
    paper = AssociativePaper(decoder, options.get("decoder_normalize_before", False), options.get("clamp_len"))
    for stream in range(2):
        expected, memory, cache = paper.text(paper.embedding(words[stream]), 4, options["mem_len"])
        np.testing.assert_allclose(features[stream].numpy(), expected, rtol=0, atol=1e-9)
        for layer, (A, z) in enumerate(memory):
            np.testing.assert_allclose(state.matrices[layer][stream].numpy(), A.T, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(state.normalizers[layer][stream].numpy(), z, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(state.hidden[layer][stream].numpy(), cache[layer], rtol=0, atol=1e-9)
    assert (paper.limited > 0) == limited


def test_gradient_flows_through_the_matrices_to_an_earlier_segment():
    """By finite differences in the paper's computation; gamma and the cache are constants."""
    sizes = {"decoder_embed_dim": 6, "decoder_attention_heads": 2, "associative_tokens": 2, "associative_dim": 4}
    mem_len = 3
    decoder = tiny_decoder(PLAIN, **{**ODD, **sizes, **SEGMENTED, "mem_len": mem_len}).train()
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(0.4)  # so that differences are exact enough
        for layer in decoder.layers:
            layer.self_attn.association.value.mul_(8)
    paper = AssociativePaper(decoder)
    embedded = paper.embedding(random_tokens(1, 6)[0])
    weights, tokens = np.random.default_rng(0).normal(size=(2, 6)), paper.w["memory.tokens"]
    held, memory, cache = [], [None] * 2, [embedded[:0]] * 2
    for start in range(0, 6, 2):
        _, memory, entered, gammas = paper.segment(embedded[start : start + 2], tokens, memory, cache)
        held.append((cache, gammas))
        cache = [rows[max(len(rows) - mem_len, 0) :] for rows in entered]
    assert any(0.1 < gamma < 0.9 for layer in held[1][1] for gamma in layer)  # where it would have a gradient

    def loss(x, tokens):
        """Of the third segment's tokens alone."""
        memory = [None] * 2
        for start, (cache, gammas) in zip(range(0, 6, 2), held, strict=True):
            features, memory, _, _ = paper.segment(x[start : start + 2], tokens, memory, cache, gammas)
        return float((weights * features).sum())

    def with_weight(name):
        def other(value):
            before, paper.w[name] = paper.w[name], value
            try:
                return loss(embedded, tokens)
            finally:
                paper.w[name] = before

        return other

    x = torch.tensor(embedded).unsqueeze(0).requires_grad_()
    features = decoder.memory(x, decoder.memory.initial_state(x), decoder.layers, decoder.positions).features
    names = [n for n, _ in decoder.named_parameters() if "layers.0.self_attn.association" in n]
    named = dict(decoder.named_parameters())
    found = torch.autograd.grad(
        (features[0, 4:] * torch.tensor(weights)).sum(), (x, decoder.memory.tokens, *(named[n] for n in names))
    )
    expected = [
        differences(lambda x: loss(x, tokens), embedded),
        differences(lambda tokens: loss(embedded, tokens), tokens),
        *(differences(with_weight(name), paper.w[name]) for name in names),
    ]
    assert len(names) == 5
    for gradient, other in zip((found[0][0], *found[1:]), expected, strict=True):
        assert np.abs(other[:2]).max() > 1e-4
        np.testing.assert_allclose(gradient.numpy(), other, rtol=1e-5, atol=1e-7)


def test_more_segments_an_update_change_the_gradient_alone():
    assert_updates_change_the_gradient_alone(partial(tiny_decoder, PLAIN))


@torch.no_grad()
def test_a_new_model_reads_nothing_and_its_tokens_are_as_large_as_embeddings():
    torch.manual_seed(0)
    sizes = {"mem_len": 0, "decoder_embed_dim": 64, "associative_tokens": 100}
    model = LanguageModel(config_of(200, **tiny_options(PLAIN, sizes))).eval()
    tokens = random_tokens(2, 9, words=200)
    texts = torch.cat([model.read_text(segment) for segment in tokens.split(3, dim=1)], dim=1)
    assert torch.equal(model.read_text(tokens), texts)
    words = model.embed_tokens(torch.arange(200))
    assert float(model.memory.tokens.std()) == pytest.approx(float(words.std()), rel=0.05)


@torch.no_grad()
def test_a_key_met_before_gets_a_new_value():
    """The delta rule: with a gate that is open, the old value is replaced, and z stays what it was."""
    torch.manual_seed(0)
    association = Association(6, AssociativeOptions(associative_dim=4)).double()
    association.value.normal_()
    association.gate.bias.fill_(40.0)
    row = torch.randn(1, 1, 6).double()
    first = association.write(row, None)
    features = dpfp(association.key(row))[0, 0]

    def value(memory):
        return memory.matrix[0].T @ features / (memory.normalizer[0] @ features)

    torch.testing.assert_close(value(first), association.value @ row[0, 0], rtol=0, atol=1e-9)
    association.value.normal_()
    second = association.write(row, first)
    torch.testing.assert_close(value(second), association.value @ row[0, 0], rtol=0, atol=1e-4)
    torch.testing.assert_close(second.normalizer, first.normalizer, rtol=1e-5, atol=0)


@torch.no_grad()
def test_of_zeros_nothing_is_read():
    rows, nothing = torch.randn(2, 3, 6), Associations(torch.zeros(2, 24, 6), torch.zeros(2, 24))
    assert torch.equal(Association(6, AssociativeOptions(associative_dim=4)).read(rows, nothing), rows)


OPTIONS = [
    {"mem_len": 0},
    {"mem_len": 0, "segment_length": 4, "bptt_segments": 2, "associative_tokens": 1, "decoder_layers": 1},
    {"mem_len": 5, **SEGMENTED},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("positions", ["transformer-xl", "shaw"])
def test_decoding_of_ragged_sequences_and_reordered_beams(positions, options):
    """Sequences in their first segment beside others; segments shorter than an update."""
    decoder = tiny_decoder(("associative", positions, "right"), **options)
    assert_decoding_follows_reordered_beams(decoder, length=26)


@torch.no_grad()
def test_segments_inside_an_update_are_causal_and_rows_do_not_depend_on_their_neighbours():
    decoder = tiny_decoder(PLAIN, **SEGMENTED)
    tokens = random_tokens(3, 15)
    expected = read_streams(decoder, tokens)
    for changed in range(0, 15, 2):
        other = tokens.clone()
        other[:, changed] = 4 + (other[:, changed] - 3) % 13
        found = read_streams(decoder, other)
        torch.testing.assert_close(found[:, :changed], expected[:, :changed], rtol=0, atol=1e-10)
        assert not torch.equal(found[:, changed], expected[:, changed])
    lengths = torch.tensor([15, 10, 1])
    padded = tokens.masked_fill(torch.arange(15) >= lengths.unsqueeze(1), 1)
    for found in (read_streams(decoder, padded, lengths=lengths.tolist()), read_texts(decoder, padded, lengths)):
        for row, length in enumerate(lengths.tolist()):
            torch.testing.assert_close(found[row, :length], expected[row, :length], rtol=0, atol=1e-10)


def test_the_fused_backend_reads_the_tokens():
    pytest.importorskip("triton", reason="the fused backend needs Triton")
    passes = []
    for backend in ("eager", "fused"):
        options = {"attention_backend": backend, "segment_length": 4, "bptt_segments": 2, "decoder_layers": 1}
        decoder = tiny_decoder(PLAIN, dtype=torch.float32, **options).to(DEVICE).train()
        with torch.no_grad():
            for p in decoder.parameters():
                p.mul_(0.3)
        scores = decoder.read_segment(random_tokens(1, 4).to(DEVICE), None).features
        scores.logsumexp(-1).sum().backward()
        passes.append((scores, {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}))
    (eager, gradients), (fused, others) = passes
    torch.testing.assert_close(fused, eager, rtol=0, atol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_is_as_near_as_its_rounding(dtype):
    """Matrices stay in float32: in segments and token by token."""
    exact, half = (tiny_decoder(PLAIN, dtype=t, mem_len=3) for t in (torch.float32, dtype))
    for decoder in (exact, half):
        for p in decoder.parameters():
            p.mul_(0.4)
        decoder.memory.tokens.mul_(10)  # keys large enough for z to matter
    found, expected = (whole_segments(decoder, random_tokens(2, 12)) for decoder in (half, exact))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=60 * torch.finfo(dtype).eps)
    state = half.read_segment(random_tokens(2, 3), None).state
    assert {t.dtype for t in (*state.matrices, *state.normalizers)} == {torch.float32}
    decoding = DecodingState(half, 2)
    decoding.read(random_tokens(2, 4))
    assert {t.dtype for cached in decoding.cache.layers for t in cached.associations} == {torch.float32}


@torch.no_grad()
def test_autocast_leaves_matrices_in_float32():
    decoder = tiny_decoder(PLAIN, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = decoder.read_segment(random_tokens(2, 3), None).state
        state = decoder.read_segment(random_tokens(2, 3), state).state
    assert {t.dtype for t in (*state.matrices, *state.normalizers)} == {torch.float32}


@torch.no_grad()
def test_longer_memory_at_test_time():
    """Another cache with the same weights, and as many segments as there are."""
    short, long = (tiny_decoder(PLAIN, mem_len=m) for m in (0, 9))
    assert short.state_dict().keys() == long.state_dict().keys()
    long.load_state_dict(short.state_dict())
    tokens = random_tokens(2, 12)
    one, other = read_streams(short, tokens), read_streams(long, tokens)
    torch.testing.assert_close(one[:, :3], other[:, :3], rtol=0, atol=1e-12)
    assert not torch.allclose(one[:, 3:], other[:, 3:])


@torch.no_grad()
def test_nothing_grows_over_two_thousand_segments():
    """With layer norms behind the residuals, what is written has one size; z stops where it has met the keys."""
    decoder = tiny_decoder(PLAIN, segment_length=2, mem_len=0, decoder_layers=1, dtype=torch.float32)
    state, sizes, normalizers, matrices = None, [], [], []
    for segment in random_tokens(1, 4000).split(2, dim=1):
        features, state, _ = decoder.read_segment(segment, state)
        sizes.append(features.abs().max())
        normalizers.append(max(t.max() for t in state.normalizers))
        matrices.append(max(t.abs().max() for t in state.matrices))
    assert max(sizes[-200:]) <= 1.5 * max(sizes[:200])
    assert normalizers[-1] <= 1.1 * normalizers[200]
    assert max(matrices[-200:]) <= 3 * max(matrices[:200])


@torch.no_grad()
@pytest.mark.parametrize(("decay", "alike"), [(1.0, False), (0.5, True)])
def test_a_stream_forgets_what_other_weights_wrote(decay, alike):
    """Training carries a stream's memory from its first weights to its last, and evaluation begins with none.

    Without decay, z keeps the keys of the first weights for ever.
    """
    sizes = {"segment_length": 4, "mem_len": 0, "decoder_layers": 1, "associative_decay": decay}
    decoder, words = tiny_decoder(PLAIN, **sizes), random_tokens(1, 400)
    keys, trained, evaluated = decoder.layers[0].self_attn.association.key.weight, None, None
    later = keys.flip(1) / 2
    for n, segment in enumerate(words.split(4, dim=1)):
        in_training, trained, _ = decoder.read_segment(segment, trained)
        if n == 0:
            keys.copy_(later)
    for segment in words[:, -120:].split(4, dim=1):
        in_evaluation, evaluated, _ = decoder.read_segment(segment, evaluated)
    assert bool((in_training - in_evaluation).abs().max() < 0.01) == alike


@torch.no_grad()
def test_keys_that_have_grown_do_not_overshoot():
    """As in training: the keys of a stream's first segment are small, so z is, and all later keys are larger.

    Sixteen keys are alike. In the paper's formula A then changes its sign and grows in every segment, out of float16.
    """
    sizes = {"associative_tokens": 16, "segment_length": 2, "mem_len": 0, "decoder_layers": 1}
    decoder = tiny_decoder(PLAIN, dtype=torch.float16, **sizes)
    decoder.memory.tokens.copy_(decoder.memory.tokens[:1].expand(16, -1))
    association, state, matrices = decoder.layers[0].self_attn.association, None, []
    association.gate.bias.fill_(8)
    for segment in random_tokens(2, 400).split(2, dim=1):
        features, state, _ = decoder.read_segment(segment, state)
        if not matrices:
            association.key.weight.mul_(2)
        assert features.isfinite().all()
        matrices.append(state.matrices[0].abs().max())
    assert max(matrices[-50:]) < 2 * max(matrices[1:50])


@torch.no_grad()
@pytest.mark.parametrize("met", [0.0, 0.3, 5.0])  # what z has of the keys
def test_no_write_enlarges_what_the_matrix_has(met):
    """For values of zero, the change of A has eigenvalues from -1 to 0, however alike the keys."""
    torch.manual_seed(0)
    association = Association(6, AssociativeOptions(associative_dim=4)).double()
    association.gate.bias.fill_(3)
    rows = torch.randn(1, 6) + torch.randn(2, 9, 6).double() / 4
    normalizer = met * dpfp(association.key(rows))[:, 0]
    unit = torch.eye(24, dtype=torch.float64).expand(2, -1, -1)  # A of width 24
    association.value = torch.nn.Parameter(torch.zeros(24, 6).double())
    after = association.write(rows, Associations(unit, normalizer)).matrix
    eigenvalues = torch.linalg.eigvalsh(after)
    assert eigenvalues.min() > -1e-9 and eigenvalues.max() < 1 + 1e-9


def test_one_segment_an_update_is_told(caplog):
    assert_one_segment_an_update_is_told(partial(tiny_decoder, PLAIN), "associative", caplog)


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        (PLAIN, {"mem_len": -1}, r"--mem-len is -1, but --memory associative needs at least 0"),
        (PLAIN, {"associative_tokens": 0}, r"--associative-tokens is 0, it must be at least 1"),
        (PLAIN, {"associative_dim": 0}, r"--associative-dim is 0, it must be at least 1"),
        (PLAIN, {"associative_decay": 0.0}, r"--associative-decay is 0.0, it must be above 0 and at most 1"),
        (PLAIN, {"associative_decay": 1.1}, r"--associative-decay is 1.1, it must be above 0 and at most 1"),
        (
            PLAIN,
            {"associative_value_lr_scale": 0.0},
            r"--associative-value-lr-scale is 0.0, it must be above 0 and finite",
        ),
        (PLAIN, {"bptt_segments": 2}, r"--tokens-per-sample 3 .* --bptt-segments 2 .* pass a multiple"),
        (PLAIN, {"same_length": True}, r"--same-length .* leave it out, or pass --memory recurrent"),
        (("associative", "disentangled", "right"), {}, r"without look-ahead memory nothing attends to its right"),
        (("associative", "absolute", "right"), {}, r"--position-encoding absolute .* instead of associative"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(variant, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_decoder(variant, **options)
