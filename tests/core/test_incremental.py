"""Token-by-token decoding against the pass over whole segments."""

import copy

import pytest
import torch

from lamemo_fairseq.core import MEMORIES
from lamemo_fairseq.core.decoding.state import DecodingState

from .helpers import (
    VARIANTS,
    first_of_each_memory,
    limits_distances,
    random_tokens,
    read_by_token,
    tiny_decoder,
    whole_segments,
)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
OPTIONS = [
    {},
    {"mem_len": 2, "segment_length": 5},
    {"mem_len": 7, "segment_length": 3, "decoder_layers": 3},
    {"mem_len": 5, "segment_length": 1},
    {"clamp_len": 3},
    {"decoder_normalize_before": True},
    {"decoder_layers": 1},
    {"adaptive_softmax_cutoff": "6,11", "adaptive_softmax_factor": 2.0, "adaptive_input": True},
    {"same_length": True},
]
# What float32 could do otherwise does not depend on most options.
CASES = [*((options, torch.float64) for options in OPTIONS), *((options, torch.float32) for options in OPTIONS[:3])]
WITHOUT_SPAN = ("none", "token", "infini", "associative", "block-recurrent")  # they refuse --same-length
FED_BACK = ("token", "enhanced", "associative", "block-recurrent")  # what they compute is the next segment's input


def rounding(decoder, tokens, scores):
    """How far float32 takes the pass over segments from float64."""
    exact = copy.deepcopy(decoder).double()
    return float((exact.output_layer(whole_segments(exact, tokens)) - scores).abs().max())


@pytest.mark.parametrize(("options", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
@torch.no_grad()
def test_every_token_equals_the_pass_over_segments(variant, options, dtype):
    if options.get("same_length") and (variant[0] in WITHOUT_SPAN or variant[2] == "dense"):
        pytest.skip("this memory refuses the option")
    if options.get("clamp_len") and not limits_distances(variant[1]):
        pytest.skip("this position encoding refuses the option")
    decoder = tiny_decoder(variant, dtype=dtype, **options)
    tokens = random_tokens(2, 23)
    expected = decoder.output_layer(whole_segments(decoder, tokens))
    tolerance = TOLERANCE[dtype]
    if dtype == torch.float32 and variant[0] in FED_BACK:
        tolerance = max(tolerance, 10 * rounding(decoder, tokens, expected))
    torch.testing.assert_close(read_by_token(decoder, tokens), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("memory", [name for name in MEMORIES.names() if name not in WITHOUT_SPAN])
@torch.no_grad()
def test_rows_that_wait_for_others_write_nothing_that_is_read(memory):
    """A row that reads nothing stands beside one that reads: with --same-length, it may see no column at all."""
    options = {"segment_length": 6, "mem_len": 2, "same_length": True}
    decoder, tokens = tiny_decoder(first_of_each_memory()[memory], **options), random_tokens(2, 6)
    expected = whole_segments(decoder, tokens)
    for count in range(1, 6):
        state = DecodingState(decoder, 2)
        state.read(tokens[:, :4], [4, 0])
        state.read(tokens[:, :count], [0, count])
        found = state.read(torch.stack([tokens[0, 4:5], tokens[1, count : count + 1]]))
        torch.testing.assert_close(found[0, 0], expected[0, 4], rtol=0, atol=1e-12)
        torch.testing.assert_close(found[1, 0], expected[1, count], rtol=0, atol=1e-12)
