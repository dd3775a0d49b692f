"""Token-by-token decoding against the pass over whole segments."""

import copy

import pytest
import torch

from .helpers import VARIANTS, random_tokens, tiny_decoder

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
OPTIONS = [
    {},
    {"mem_len": 2, "tokens_per_sample": 5},
    {"mem_len": 7, "tokens_per_sample": 3, "decoder_layers": 3},
    {"mem_len": 5, "tokens_per_sample": 1},
    {"clamp_len": 3},
    {"decoder_normalize_before": True},
    {"decoder_layers": 1},
    {"adaptive_softmax_cutoff": "6,11", "adaptive_softmax_factor": 2.0, "adaptive_input": True},
    {"same_length": True},
]


def whole_segments(decoder, tokens):
    """Features of ``tokens [B, T]`` by the pass over segments, the last one filled up with more tokens."""
    length, total = decoder.segment_length, tokens.size(1)
    filled = torch.cat([tokens, random_tokens(len(tokens), -total % length, seed=9)], dim=1)
    state, parts = None, []
    for segment in filled.split(length, dim=1):
        part, state, _ = decoder.step(segment, state)
        parts.append(part)
    return torch.cat(parts, dim=1)[:, :total]


def rounding(decoder, tokens, scores):
    """How far float32 takes the pass over segments from float64."""
    exact = copy.deepcopy(decoder).double()
    return float((exact.output_layer(whole_segments(exact, tokens)) - scores).abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
@torch.no_grad()
def test_every_token_equals_the_pass_over_segments(variant, options, dtype):
    if options.get("same_length") and variant[0] in ("none", "token"):
        pytest.skip("this memory refuses the option")
    if options.get("clamp_len") and variant[1] == "rotary":
        pytest.skip("this position encoding refuses the option")
    decoder = tiny_decoder(variant, dtype=dtype, **options)
    tokens = random_tokens(2, 23)
    expected = decoder.output_layer(whole_segments(decoder, tokens))
    tolerance = TOLERANCE[dtype]
    if dtype == torch.float32 and variant[0] == "token":  # its own output is the next segment's input
        tolerance = max(tolerance, 10 * rounding(decoder, tokens, expected))
    incremental = {}
    for end in range(1, 24):
        scores, _ = decoder(tokens[:, :end], incremental_state=incremental)
        assert scores.shape[1] == 1
        torch.testing.assert_close(scores[:, 0], expected[:, end - 1], rtol=0, atol=tolerance)
