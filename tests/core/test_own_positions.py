"""A position encoding of a user's own, with every field of a bias learnt, works with every memory; or is refused.

Shapes: L layers, H heads, D size of a head, U distances.
"""

import re

import pytest
import torch
from torch import nn

from lamemo_fairseq.core import MEMORIES
from lamemo_fairseq.core.attention import RelativeBias
from lamemo_fairseq.core.memory.token.attention import blocks_attention
from lamemo_fairseq.core.memory.token.eager import Blocks
from lamemo_fairseq.core.positions import POSITIONS, LayerBias, PositionEncoding

from ..gpus import DEVICE
from .helpers import random_tokens, read_by_token, tiny_decoder, whole_segments

FARTHEST = 40


class LearntPositions(PositionEncoding):
    """Content, position, table and score of both sides, learnt for each layer and distance."""

    def __init__(self, config):
        super().__init__(config)
        count, heads, size = 2 * FARTHEST, config.heads, config.head_dim
        shapes = {"content": (size,), "position": (size,), "table": (count, size), "score": (count,)}
        for side in ("causal", "ahead"):
            for name, shape in shapes.items():
                setattr(self, f"{side}_{name}", nn.Parameter(torch.randn(config.layers, heads, *shape)))

    def biases(self, causal, ahead, like):
        past = self._side("causal", torch.arange(causal - 1, -1, -1))
        future = [None] * self.config.layers if ahead is None else self._side("ahead", torch.tensor([*ahead]))
        return [LayerBias(*sides) for sides in zip(past, future, strict=True)]

    def _side(self, side, distances):
        rows = (distances + FARTHEST).long()
        content, position, table, score = (getattr(self, f"{side}_{name}") for name in RelativeBias._fields)
        return [RelativeBias(*of) for of in zip(content, position, table[:, :, rows], score[:, :, rows], strict=True)]


class PastPositions(LearntPositions):
    """An encoding without distances to the right, which does not refuse a memory that attends there."""

    def biases(self, causal, ahead, like):
        return super().biases(causal, None, like)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    added = {"learnt": LearntPositions, "past": PastPositions}
    monkeypatch.setattr(POSITIONS, "_entries", {**POSITIONS._entries, **added})


ENDS = {"block-recurrent": "fixed", "compressive": "most-used", "infini": "delta", "memorizing": "top-k"}


def variant(memory, positions="learnt"):
    return memory, positions, ENDS.get(memory, "right")


@pytest.mark.parametrize("options", [{}, {"lookahead_every": 2}, {"lookahead_from_layer": 2}, {"decoder_layers": 1}])
@pytest.mark.parametrize("memory", MEMORIES.names())
def test_every_parameter_has_a_gradient_from_the_first_segment_on(memory, options):
    """Data-parallel training waits for one of every parameter, also where no slot looks ahead yet."""
    if "decoder_layers" not in options and options and memory != "lookahead":
        return
    model, tokens, state = tiny_decoder(variant(memory), **options).train(), random_tokens(2, 16), None
    own = [name for name, _ in model.named_parameters() if MEMORIES[memory].looks_ahead or ".ahead_" not in name]
    for start in range(0, 15, 3):
        features, state, losses = model(tokens[:, start : start + 3], state)
        model.zero_grad()
        sum(losses.values(), model.loss(features, tokens[:, start + 1 : start + 4])).backward()
        assert [name for name in own if model.get_parameter(name).grad is None] == [], start


@pytest.mark.parametrize("memory", MEMORIES.names())
@torch.no_grad()
def test_decoding_equals_whole_segments(memory):
    model, tokens = tiny_decoder(variant(memory)), random_tokens(2, 17)
    expected = model.output_layer(whole_segments(model, tokens))
    torch.testing.assert_close(read_by_token(model, tokens), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("memory", [name for name in MEMORIES.names() if MEMORIES[name].looks_ahead])
def test_an_encoding_without_distances_to_the_right(memory):
    with pytest.raises(ValueError, match=r"^PastPositions.biases returned ahead=None, and this memory attends to the "):
        tiny_decoder(variant(memory, "past"))(random_tokens(2, 3))
    tiny_decoder(variant("recurrent", "past"))(random_tokens(2, 3))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda bias: LayerBias(None, None),
            "causal is of type NoneType: return a RelativeBias, RelativeBias() for none",
        ),
        (lambda bias: bias.causal, " returned a RelativeBias: return a LayerBias for each layer"),
    ],
)
def test_a_layer_without_a_bias(monkeypatch, made, message):
    def biases(self, causal, ahead, like):
        return [made(bias) for bias in LearntPositions.biases(self, causal, ahead, like)]

    monkeypatch.setattr(PastPositions, "biases", biases)
    with pytest.raises(ValueError, match=f"^PastPositions.biases.*{re.escape(message)}"):
        tiny_decoder(variant("recurrent", "past"))(random_tokens(2, 3))


@pytest.mark.parametrize("missing", ["table", "score"])
def test_kernels_of_memory_tokens_keep_what_one_side_lacks(missing):
    """The two sides share a table in one call; distances of the other side alone were left out."""
    pytest.importorskip("triton", reason="the fused backend needs Triton")
    rows, size, heads, width = 9, 2, 2, 8
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, rows, width, generator=generator).to(DEVICE) for _ in range(3))
    table, score = torch.randn(heads, rows, width, generator=generator), torch.randn(heads, rows, generator=generator)
    causal = RelativeBias(table=table.to(DEVICE), score=score.to(DEVICE))
    ahead = RelativeBias(table=causal.table[:, :size], score=causal.score[:, :size])._replace(**{missing: None})
    blocks = Blocks(cached=0, tokens=size, current=rows - 2 * size, reads_cache=False, last=False)
    fused, eager = (blocks_attention(name, q, k, v, causal, ahead, blocks).output for name in ("fused", "eager"))
    torch.testing.assert_close(fused, eager, rtol=0, atol=1e-4)
