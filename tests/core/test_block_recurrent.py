"""The block-recurrent memory against a computation written from the paper, and what is its own: windows and states.

Shapes: one stream; n tokens of a window, M tokens that a token sees, S states, H heads, D size of a head,
d model width.
"""

from functools import partial

import numpy as np
import pytest
import torch

from lamemo_fairseq.core import LanguageModel
from lamemo_fairseq.core.decoding.state import DecodingState
from lamemo_fairseq.core.decoding.step import kernel_step
from lamemo_fairseq.core.kernels import aligned
from lamemo_fairseq.core.memory.block_recurrent.attention import KeyValues
from lamemo_fairseq.core.memory.block_recurrent.options import BlockRecurrentOptions

from ..gpus import DEVICE
from .block_recurrent_paper import paper_of
from .helpers import (
    assert_decoding_follows_reordered_beams,
    assert_fused_is_as_exact,
    assert_one_segment_an_update_is_told,
    assert_streams_end_anywhere,
    assert_updates_change_the_gradient_alone,
    config_of,
    random_tokens,
    read_by_token,
    read_features,
    read_streams,
    tiny_decoder,
    tiny_options,
    whole_segments,
)
from .paper import differences

FIXED, LSTM = ("block-recurrent", "t5", "fixed"), ("block-recurrent", "t5", "lstm")
SINUSOIDS = ("block-recurrent", "transformer-xl", "lstm")
gates = pytest.mark.parametrize("variant", [FIXED, LSTM], ids=["fixed", "lstm"])
ODD = {"decoder_embed_dim": 10, "decoder_attention_heads": 3, "decoder_head_dim": 3, "decoder_ffn_embed_dim": 7}
WINDOWS = {"segment_length": 6, "bptt_segments": 3}


def model(variant=FIXED, scale=1.0, **options):
    """A tiny model whose scales and gates, one a head or a channel, are all different."""
    decoder = tiny_decoder(variant, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("scale"):
                random = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(3 * random)  # of both signs: |a|
            parameter.mul_(scale)
    return decoder


@pytest.mark.parametrize(
    ("variant", "options", "recurrent"),
    [
        (FIXED, {"segment_length": 5, "mem_len": 5}, [0]),
        (LSTM, {"segment_length": 6, "bptt_segments": 2, "mem_len": 4, "decoder_layers": 4}, [1]),
        (FIXED, {"segment_length": 4, "mem_len": 25, "recurrent_states": 5}, [0]),
        (LSTM, {"segment_length": 7, "mem_len": 2, "decoder_normalize_before": True, "recurrent_layers": "2"}, [1]),
        (SINUSOIDS, {"segment_length": 4, "mem_len": 6, "decoder_layers": 3, "recurrent_layers": "3,1"}, [0, 2]),
    ],
    ids=str,
)
@torch.no_grad()
def test_windows_equal_the_papers_computation(variant, options, recurrent):
    """The last window is a part of one."""
    decoder = model(variant, **ODD, **options)
    words = random_tokens(2, 30 if decoder.memory.slots > 16 else 17)
    features, state = read_features(decoder, words)
    paper = paper_of(decoder, variant, recurrent)
    for stream in range(2):
        expected = paper.text(paper.embedding(words[stream]))
        np.testing.assert_allclose(features[stream].numpy(), expected, rtol=0, atol=1e-9)
        for layer, states in zip(recurrent, state.states, strict=True):
            np.testing.assert_allclose(states[stream].numpy(), paper.states[layer], rtol=0, atol=1e-9)
        for layer, (keys, values) in paper.past.items():
            for mine, other in ((state.keys, keys), (state.values, values)):
                last = other[-decoder.memory.slots :].swapaxes(0, 1)
                np.testing.assert_allclose(mine[layer][stream].numpy(), last, rtol=0, atol=1e-9)


@gates
def test_gradient_flows_through_the_states_to_earlier_windows(variant):
    """By finite differences in the paper's computation, of the third window's tokens: embeddings and the whole cell."""
    sizes = {"decoder_embed_dim": 6, "decoder_attention_heads": 2, "decoder_ffn_embed_dim": 5, "recurrent_states": 2}
    decoder = model(variant, scale=0.4, mem_len=2, **sizes, **WINDOWS)
    paper = paper_of(decoder, variant)
    embedded, weights = paper.embedding(random_tokens(1, 6)[0]), np.random.default_rng(0).normal(size=(2, 6))

    def loss():
        return float((weights * paper.text(embedded)[4:]).sum())

    def differ(array):
        """By an array that the paper's computation reads, changed in place."""
        before = array.copy()

        def changed(value):
            array[:] = value
            try:
                return loss()
            finally:
                array[:] = before

        return differences(changed, before)

    x = torch.tensor(embedded).unsqueeze(0).requires_grad_()
    features = decoder.memory(x, decoder.memory.initial_state(x), decoder.layers, decoder.positions).features
    named = {n: p for n, p in decoder.named_parameters() if n.startswith("memory.") and not n.endswith("value.weight")}
    wanted = (features[0, 4:] * torch.tensor(weights)).sum()
    found = torch.autograd.grad(wanted, (x, *named.values()))
    for name in named:
        paper.w[name] = paper.w[name].copy()
    expected = [differ(embedded), *(differ(paper.w[name]) for name in named)]
    assert min(np.abs(expected[0][window : window + 2]).max() for window in (0, 2, 4)) > 1e-4
    for gradient, other, name in zip((found[0][0], *found[1:]), expected, ("x", *named), strict=True):
        assert np.abs(other).max() > 1e-5, name
        np.testing.assert_allclose(gradient.numpy(), other, rtol=1e-5, atol=1e-7, err_msg=name)


@gates
def test_more_windows_an_update_change_the_gradient_alone(variant):
    assert_updates_change_the_gradient_alone(partial(model, variant))


@pytest.mark.parametrize("past", [0, 2, 4])
def test_a_token_sees_the_tokens_before_it_and_not_itself(past):
    """By the gradient of read-outs by values; a window of 3. The first token of a text reads zeros."""
    decoder = model(decoder_layers=3, mem_len=3)
    attention, bias = decoder.layers[2].self_attn, decoder.positions(past + 5, None, torch.zeros(1).double())[2]
    q, k, v = torch.randn(3, 1, 2, past + 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v.requires_grad_()
    read_out = attention._before(q[:, :, past:], KeyValues(k, v), bias)
    for i in range(5):
        (gradient,) = torch.autograd.grad(read_out[:, :, i].sum(), v, retain_graph=True)
        seen = [j for j in range(past + 5) if gradient[0, 0, j].abs().max() > 0]
        assert seen == list(range(max(0, past + i - 3), past + i))
    assert bool(read_out[:, :, 0].any()) == (past > 0)


def test_windows_of_one_token_give_every_parameter_a_gradient():
    """The first token of a text sees nothing: no key, and no position."""
    for variant in (FIXED, SINUSOIDS):
        decoder = model(variant, segment_length=2, bptt_segments=2).train()
        words = random_tokens(2, 2)
        features, alone = (decoder.read_segment(part, None).features for part in (words, words[:, :1]))
        torch.testing.assert_close(alone, features[:, :1], rtol=0, atol=1e-12)
        decoder.loss(alone, words[:, 1:]).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


@gates
@torch.no_grad()
def test_streams_end_anywhere_inside_an_update(variant):
    assert_streams_end_anywhere(model(variant, **WINDOWS))


@gates
def test_a_text_begins_with_the_learned_states(variant):
    """Which other texts of the batch do not change, and which only a beginning trains."""
    decoder, (first, second) = model(variant), random_tokens(2, 6).split(3, dim=1)
    cell = decoder.memory.cells[0]
    state = decoder.read_segment(first, None).state
    assert decoder.memory.initial_state(decoder.embed_tokens(first)).states[0].shape == (2, 0, 8)
    assert state.states[0].shape == (2, 3, 8) and not torch.equal(state.states[0][0], state.states[0][1])
    for before, trained in ((None, True), (state, False)):
        features = decoder.read_segment(second, before).features
        (gradient,) = torch.autograd.grad(features.logsumexp(-1).sum(), cell.first_states, allow_unused=True)
        assert (gradient is not None and bool(gradient.any())) == trained


@torch.no_grad()
def test_a_change_is_read_many_windows_later():
    """Beyond what windows reach, 2 layers of 4 tokens."""
    decoder, tokens = model(scale=0.5), random_tokens(1, 60)
    other = tokens.clone()
    other[0, 0] = 4 + (other[0, 0] - 3) % 13
    last = [read_streams(decoder, t)[0, -3:] for t in (tokens, other)]
    assert (last[0] - last[1]).abs().max() > 1e-6


@pytest.mark.parametrize("variant", [LSTM, SINUSOIDS], ids="-".join)
def test_decoding_of_ragged_sequences_and_reordered_beams(variant):
    decoder = model(variant, mem_len=5, decoder_layers=3, **WINDOWS)
    assert_decoding_follows_reordered_beams(decoder, length=26)


@gates
@torch.no_grad()
def test_a_part_filled_window_writes_nothing_in_generation(variant):
    """And a full one what the pass over windows writes; sequences fill theirs at other times."""
    decoder = model(variant, segment_length=4)
    tokens, state = random_tokens(2, 8), DecodingState(decoder, 2)
    cached, first = state.cache.layers[0], decoder.memory.cells[0].first_states
    state.read(tokens[:, :3], [3, 2])
    assert all(torch.equal(states, first) for states in cached.states)
    state.read(tokens[:, 3:4], [1, 0])
    written = decoder.read_segment(tokens[:, :4], None).state.states[0]
    torch.testing.assert_close(cached.states[0], written[0], rtol=0, atol=1e-12)
    assert torch.equal(cached.states[1], first)


@torch.no_grad()
def test_a_cache_goes_on_with_weights_that_have_changed():
    """Positions that are multiplied by a scale are those of the new one."""
    decoder, tokens = model(SINUSOIDS), random_tokens(2, 7)
    going = DecodingState(decoder, 2)
    for layer in decoder.layers:
        layer.self_attn.head_scale.mul_(1.7)
    fresh = DecodingState(decoder, 2)
    for state in (going, fresh):
        if state is going:
            state.copy_(fresh)
        found = decoder.output_layer(state.read(tokens))
        torch.testing.assert_close(found, decoder.output_layer(whole_segments(decoder, tokens)), rtol=0, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"decoder_normalize_before": True}], ids=str)
@torch.no_grad()
def test_the_kernels_step_of_ragged_sequences(options):
    """One has no token yet, and reads nothing of its window; others have slots in part, or tokens beyond the window."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    sizes = {"mem_len": 3, "segment_length": 4, "decoder_embed_dim": 12, "decoder_layers": 2, **options}
    decoder = model(FIXED, dtype=torch.float32, **sizes).to(DEVICE)
    prompts, words = random_tokens(4, 9).to(DEVICE), random_tokens(4, 3, seed=5).to(DEVICE)
    plain, kernel = DecodingState(decoder, 4), DecodingState(decoder, 4)
    for state in (plain, kernel):
        state.read(prompts, [0, 3, 9, 4])
    step = kernel_step(kernel)
    for new in words.split(1, dim=1):
        kernel.refresh(decoder.embed_tokens(new), [1] * 4)
        found = step(new)
        kernel.cache.advance([1] * 4, kernel.network)
        torch.testing.assert_close(found, plain.read(new), rtol=0, atol=1e-4)


def test_fused_kernels_at_odd_widths(monkeypatch):
    """Features and gradients in float16 are as exact as those of plain operations."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    sizes = {"decoder_embed_dim": 10, "decoder_layers": 1, "mem_len": 2, "segment_length": 6, "bptt_segments": 2}

    def results(dtype, backend):
        decoder = model(FIXED, attention_backend=backend, **sizes).to(DEVICE, dtype).train()
        features = decoder.read_segment(random_tokens(1, 6).to(DEVICE), None).features.double()
        gradients = torch.autograd.grad(
            features.square().mean(), [*decoder.layers.parameters(), *decoder.memory.parameters()]
        )
        return [features.detach(), *(gradient.double() for gradient in gradients)]

    if DEVICE == "cpu":
        monkeypatch.setattr(aligned, "matters", lambda x: True)
    assert_fused_is_as_exact(results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@gates
@torch.no_grad()
def test_half_precision_has_exact_states(variant, dtype):
    """A small update of a state is not rounded away; in segments and token by token."""
    exact, words = model(variant, scale=0.3), random_tokens(2, 12)
    half = tiny_decoder(variant, dtype=dtype)
    half.load_state_dict(exact.state_dict())
    state, other = None, None
    for segment in words.split(3, dim=1):
        features, state, _ = half.read_segment(segment, state)
        expected, other, _ = exact.read_segment(segment, other)
        assert (features - expected).abs().max() < 20 * torch.finfo(dtype).eps * expected.abs().max()
    assert state.keys[0].dtype == dtype and {t.dtype for t in state.states} == {torch.float32}
    decoding = DecodingState(half, 2)
    decoding.read(words)
    assert decoding.cache.layers[0].states.dtype == torch.float32
    torch.testing.assert_close(
        decoding.cache.layers[0].states, state.states[0], rtol=0, atol=20 * torch.finfo(dtype).eps
    )


@torch.no_grad()
def test_autocast_leaves_states_in_float32():
    decoder, state = model(dtype=torch.float32), None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for segment in random_tokens(2, 6).split(3, dim=1):
            state = decoder.read_segment(segment, state).state
    assert {t.dtype for t in state.states} == {torch.float32}


@torch.no_grad()
def test_nothing_grows_over_two_thousand_windows():
    """Nor does it fade: states are means of what they were and what they read."""
    decoder, state, sizes, states = model(dtype=torch.float32, decoder_layers=1, mem_len=2), None, [], []
    for segment in random_tokens(1, 4000).split(2, dim=1):
        features, state, _ = decoder.read_segment(segment, state)
        sizes.append(features.abs().max())
        states.append(state.states[0].abs().max())
    assert max(sizes[-200:]) <= 1.1 * max(sizes[:200]) and max(states[-200:]) <= 1.1 * max(states[:200])
    assert min(states[-200:]) >= 0.9 * min(states[:200])


@torch.no_grad()
def test_an_lstms_states_stay_within_what_its_gates_allow():
    """An update adds less than 1, and of what was there the forget gate takes its share."""
    cell = model(LSTM, scale=0.3, decoder_layers=1).float().memory.cells[0]
    states, sizes = cell.begin(torch.empty(1, 0, 8)), []
    for words in torch.randn(2000, 2, 1, 2, 3, 4, generator=torch.Generator().manual_seed(0)):
        before, heads = states, cell.project(states, states)
        states = cell.update(states, heads, KeyValues(*words), "eager")
        sizes.append(states.abs().max())
        assert ((states - before).abs() < 1 + before.abs()).all()
    assert max(sizes[-200:]) <= 1.1 * max(sizes[200:400]) and min(sizes[-200:]) > 0.05


@torch.no_grad()
def test_a_longer_window_at_test_time():
    short, long = model(mem_len=2), model(mem_len=40)
    tokens = random_tokens(2, 45)
    one, other = read_streams(short, tokens), read_streams(long, tokens)
    torch.testing.assert_close(one[:, :3], other[:, :3], rtol=0, atol=1e-12)
    assert not torch.allclose(one[:, 3:], other[:, 3:])
    torch.testing.assert_close(read_by_token(long, tokens), other, rtol=0, atol=1e-10)


@torch.no_grad()
def test_initial_values():
    """Scales are the option's, gates nearly half open or an LSTM's, and states small beside their identities."""
    torch.manual_seed(0)
    sizes = {"recurrent_states": 64, "decoder_embed_dim": 64}
    for variant in (FIXED, LSTM):
        decoder = LanguageModel(config_of(17, **tiny_options(variant, {**sizes, "recurrent_scale": 3.0})))
        scales = [p for n, p in decoder.named_parameters() if n.endswith("scale")]
        assert len(scales) == 5 and all(torch.equal(scale, torch.full_like(scale, 3.0)) for scale in scales)
        cell = decoder.memory.cells[0]
        deviations = [float(p.std()) for p in (cell.first_states, cell.identities, decoder.positions.table * 128 / 3)]
        assert deviations == pytest.approx([0.1, 1, 32**-0.5 / 3], rel=0.2)
        biases = [cell.gate.bias] if variant == FIXED else [cell.gate.input.bias, cell.gate.forget.bias]
        assert [float(bias.std()) for bias in biases] == pytest.approx([0.1] * len(biases), rel=0.3)
        assert not cell.gate.value.bias.any() and bool((cell.norm_gain == 1).all())


@torch.no_grad()
def test_weights_with_t5s_biases_themselves_give_the_same_results(caplog):
    """Older versions stored the biases of scores, and a_h multiplied them as now."""
    decoder, tokens = tiny_decoder(FIXED, recurrent_scale=4.0), random_tokens(1, 6)
    expected, weights = read_streams(decoder, tokens), decoder.state_dict()
    weights["positions.bias"] = weights.pop("positions.table") * (128 / 4)
    assert weights["positions.bias"].any()
    other = tiny_decoder(FIXED, recurrent_scale=4.0)
    other.positions.table.add_(1)
    other.load_state_dict(weights)
    assert torch.equal(read_streams(other, tokens), expected)
    assert "a training goes on with a new optimizer only" in caplog.text


@pytest.mark.parametrize(
    ("layers", "named", "expected"),
    [(1, None, [0]), (2, None, [0]), (4, None, [1]), (12, None, [9]), (16, None, [13]), (4, "4,2,4", [1, 3])],
)
def test_layers_with_states(layers, named, expected):
    assert BlockRecurrentOptions(recurrent_layers=named).layers_of(layers) == expected
    decoder = tiny_decoder(FIXED, decoder_layers=layers, recurrent_layers=named)
    assert [n for n, layer in enumerate(decoder.layers) if hasattr(layer.self_attn, "state_query")] == expected
    assert len(decoder.memory.cells) == len(expected)


def test_one_window_an_update_is_told(caplog):
    assert_one_segment_an_update_is_told(model, "block-recurrent", caplog)


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        (FIXED, {"recurrent_scale": 0.0}, r"--recurrent-scale is 0.0, it must be above 0 and finite"),
        ((*FIXED[:2], "gru"), {}, r"unknown --state-gate 'gru'; the known ones are fixed, lstm"),
        (FIXED, {"recurrent_states": 0}, r"--recurrent-states is 0, it must be at least 1: .* --memory recurrent"),
        (FIXED, {"recurrent_layers": "3"}, r"--recurrent-layers names layer 3, but there are 2 layers: pass .* 1 to 2"),
        (FIXED, {"recurrent_layers": "top"}, r"--recurrent-layers 'top': pass whole numbers"),
        (FIXED, {"same_length": True}, r"--same-length .* block-recurrent it does anyway: leave it out"),
        (FIXED, {"mem_len": 0}, r"--mem-len is 0, but --memory block-recurrent needs at least 1"),
        (FIXED, {"bptt_segments": 2}, r"--tokens-per-sample 3 .* --bptt-segments 2 .* pass a multiple"),
        (("block-recurrent", "absolute", "fixed"), {}, r"--position-encoding absolute .* instead of block-recurrent"),
        (("block-recurrent", "disentangled", "fixed"), {}, r"nothing attends to its right: take transformer-xl"),
        (("lookahead", "t5", "right"), {}, r"--position-encoding t5 has no distances to the right"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(variant, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_decoder(variant, **options)
