"""Enhanced recurrence against a computation written from the paper, and its reach.

Shapes: one stream; n tokens of a segment, M slots, d model width.
"""

import numpy as np
import pytest
import torch

from .helpers import random_tokens, read_features, read_streams, tiny_decoder
from .paper import Paper

ENHANCED = ("enhanced", "transformer-xl", "right")
ODD = {"decoder_embed_dim": 10, "decoder_attention_heads": 3, "decoder_head_dim": 3, "decoder_ffn_embed_dim": 7}


class EnhancedPaper(Paper):
    """The model in numpy."""

    def text(self, embedded, period, mem_len):
        """Features of a text, and every layer's memory behind it."""
        memory, features = [embedded[:0]] * self.layers, []
        for start in range(0, len(embedded), period):
            rows = embedded[start : start + period]
            for layer in range(self.layers):
                everything = np.concatenate([memory[layer], rows])
                rows = self.through(layer, everything, len(rows), lambda i: range(i + 1))
                out = np.concatenate([memory[layer], rows])
                memory[layer] = out[max(len(out) - mem_len, 0) :]
            features.append(rows)
        return np.concatenate(features), memory


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mem_len": 7},
        {"mem_len": 2, "segment_length": 5, "decoder_layers": 3},
        {"mem_len": 5, "segment_length": 2, "decoder_normalize_before": True, "clamp_len": 3},
    ],
    ids=str,
)
@torch.no_grad()
def test_segments_equal_the_papers_computation(options):
    decoder = tiny_decoder(ENHANCED, **{**ODD, **options})
    words = random_tokens(2, 13)
    features, state = read_features(decoder, words)
    pre_norm = options.get("decoder_normalize_before", False)
    paper = EnhancedPaper(decoder, pre_norm, options.get("clamp_len"))
    for stream in range(2):
        expected, memory = paper.text(paper.embedding(words[stream]), decoder.segment_length, decoder.memory.slots)
        np.testing.assert_allclose(features[stream].numpy(), expected, rtol=0, atol=1e-9)
        for mine, other in zip(state.outputs, memory, strict=True):
            np.testing.assert_allclose(mine[stream].numpy(), other, rtol=0, atol=1e-9)


def reach(variant, segments):
    """How many segments back the last one depends on a token."""
    decoder = tiny_decoder(variant, segment_length=3, mem_len=3, decoder_layers=2)
    tokens = random_tokens(1, 3 * segments)
    before = read_streams(decoder, tokens)[0, -1]
    return max(
        segments - 1 - start // 3
        for start in range(0, tokens.size(1), 3)
        if not torch.equal(read_streams(decoder, changed(tokens, start))[0, -1], before)
    )


def changed(tokens, position):
    tokens = tokens.clone()
    tokens[0, position] = 4 + (tokens[0, position] - 3) % 13
    return tokens


@torch.no_grad()
def test_the_reach_has_no_bound():
    """Two layers of Transformer-XL reach two segments back; here a change is carried on from segment to segment."""
    assert reach(("recurrent", "transformer-xl", "right"), 6) == 2
    assert reach(ENHANCED, 6) == 5


def test_the_memory_has_no_gradient():
    """The gradient is that of the segment alone, with its memory held."""
    decoder = tiny_decoder(ENHANCED, segment_length=4).train()
    first, second = random_tokens(1, 8).split(4, dim=1)
    state = decoder.read_segment(first, None).state
    assert not any(rows.requires_grad for rows in state.outputs)
    whole = decoder.read_segment(second, decoder.read_segment(first, None).state).features.square().sum()
    alone = decoder.read_segment(second, state.map(torch.clone)).features.square().sum()
    parameters = list(decoder.layers.parameters())
    for mine, other in zip(*(torch.autograd.grad(loss, parameters) for loss in (whole, alone)), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


@pytest.mark.parametrize("pre_norm", [False, True])
@torch.no_grad()
def test_nothing_grows_over_two_thousand_segments(pre_norm):
    """Outputs that go into the memory of their own layer again and again stay as large as they were."""
    decoder = tiny_decoder(ENHANCED, decoder_normalize_before=pre_norm)
    state, sizes = None, []
    for segment in random_tokens(2, 6000).split(3, dim=1):
        features, state, _ = decoder.read_segment(segment, state)
        sizes.append(features.abs().max())
    assert max(sizes[-200:]) <= 1.5 * max(sizes[:200])
