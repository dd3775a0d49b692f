"""No prediction sees the token it predicts, nor a later one, through any memory."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lamemo_fairseq.core.attention import Attended
from lamemo_fairseq.core.memory.lookahead import WINDOWS

from .helpers import VARIANTS, limits_distances, random_tokens, read_streams, tiny_decoder

sizes = st.fixed_dictionaries(
    {
        "segment_length": st.integers(1, 6),
        "mem_len": st.integers(1, 9),
        "store_len": st.just(9),  # no shorter than other layers' memory
        "decoder_layers": st.integers(1, 4),
        "clamp_len": st.sampled_from([0, 0, 3]),
        "decoder_normalize_before": st.booleans(),
    }
)


@settings(max_examples=80, deadline=None)
@given(variant=st.sampled_from(VARIANTS), options=sizes, data=st.data())
def test_changing_a_token_changes_no_earlier_prediction(variant, options, data):
    assume(not options["clamp_len"] or limits_distances(variant[1]))
    decoder = tiny_decoder(variant, **options)
    length = data.draw(st.integers(1, 4 * options["segment_length"]), label="length")
    padding = data.draw(st.integers(0, 3), label="padding")
    changed = data.draw(st.integers(0, length - 1), label="changed")
    tokens = random_tokens(2, length)
    other = tokens.clone()
    other[:, changed] = 4 + (other[:, changed] - 3) % 13
    with torch.no_grad():
        before, after = (read_streams(decoder, pad(t, padding), lengths=[length] * 2) for t in (tokens, other))
    # The score of a token's successor stands at the token's own place, the first that may change.
    torch.testing.assert_close(before[:, :changed], after[:, :changed], rtol=0, atol=1e-12)
    assert not torch.equal(before[:, changed], after[:, changed])


@settings(max_examples=30, deadline=None)
@given(variant=st.sampled_from(VARIANTS), options=sizes, padding=st.integers(1, 5))
def test_padding_at_the_end_changes_nothing(variant, options, padding):
    assume(not options["clamp_len"] or limits_distances(variant[1]))
    decoder = tiny_decoder(variant, **options)
    tokens = random_tokens(2, 2 * options["segment_length"] + 1)
    lengths = [tokens.size(1)] * 2
    with torch.no_grad():
        plain, padded = (read_streams(decoder, pad(tokens, p), lengths=lengths) for p in (0, padding))
    torch.testing.assert_close(plain, padded[:, : tokens.size(1)], rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_later_segments_see_earlier_ones_through_memory_alone(variant):
    decoder = tiny_decoder(variant)
    tokens = random_tokens(1, 9)
    other = tokens.clone()
    other[:, 0] = 4 + (other[:, 0] - 3) % 13
    with torch.no_grad():
        before, after = read_streams(decoder, tokens), read_streams(decoder, other)
    assert torch.equal(before[:, 3:], after[:, 3:]) == (variant[0] == "none")


@pytest.mark.parametrize("window", ["right", "full"])
def test_a_slot_that_looks_ahead_sees_the_first_current_token_and_no_later_one(window):
    """The gradient of a refreshed slot reaches the first current token's embedding and stops there."""
    decoder = tiny_decoder(("lookahead", "disentangled", window), decoder_layers=2)
    _, state, _ = decoder.read_segment(random_tokens(1, 3), None)
    x = decoder.embed_tokens(random_tokens(1, 3, seed=1)).detach().requires_grad_()
    _, after, _ = decoder.memory(x, state, decoder.layers, decoder.positions)
    refreshed = after.outputs[0][:, :, :-3]  # the slots that were there before
    assert refreshed.size(2) == 1

    rows = torch.cat([state.embeddings, x], dim=1)
    biases = decoder.positions(6, range(-1 if window == "full" else 1, 4), x)
    held = Attended(state.outputs[0], state.normalizers[0])
    out, _ = decoder.layers[0](rows, biases[0], WINDOWS[window](3, 3), held, 3)
    (gradient,) = torch.autograd.grad(out[:, :3].sum(), x)
    assert gradient[:, 0].abs().max() > 0
    assert torch.count_nonzero(gradient[:, 1:]) == 0


def pad(tokens, columns):
    return torch.nn.functional.pad(tokens, (0, columns), value=1)
