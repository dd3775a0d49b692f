"""Segatron's positions against a computation written from the paper, and the numbers of sentences and paragraphs.

Shapes: one stream; R rows, n tokens of a segment, M slots, H heads, D size of a head, d model width.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from lamemo_fairseq.core.attention.counted import counted_scores
from lamemo_fairseq.core.config import ModelConfig
from lamemo_fairseq.core.decoding.state import DecodingState
from lamemo_fairseq.core.positions import POSITIONS, PositionConfig

from .helpers import (
    ENDS,
    assert_decoding_follows_reordered_beams,
    random_tokens,
    read_by_token,
    read_streams,
    tiny_decoder,
    whole_segments,
)
from .paper import Paper

ODD = {"decoder_embed_dim": 10, "decoder_attention_heads": 3, "decoder_head_dim": 3, "decoder_ffn_embed_dim": 7}
memories = pytest.mark.parametrize("memory", ["lookahead", "recurrent", "enhanced", "none"])


def segatron(memory, choice="right", **options):
    return tiny_decoder((memory, "segatron", choice), **options)


class SegatronPaper(Paper):
    """Transformer-XL, enhanced recurrence and LaMemo in numpy, with running numbers over the whole text."""

    def __init__(self, decoder, words, widths, parts="tsp", **options):
        super().__init__(decoder, **options)
        self.words, self.widths = words, widths
        self.numbers = [n for name, n in zip("tsp", numbered(words), strict=True) if name in parts]
        self.oldest = 0  # the token that row 0 stands for
        self.seen = None  # the keys of a row, if slots look ahead

    def score(self, layer, head, i, j, q, k):
        u, v = self.w["positions.content_bias"], self.w["positions.position_bias"]
        sinusoids = []
        for numbers, width in zip(self.numbers, self.widths, strict=True):
            distance = numbers[self.oldest + i] - numbers[self.oldest + j]
            distance = distance if self.farthest is None else min(distance, self.farthest)
            angles = [distance / 10000 ** (2 * n / width) for n in range(width // 2)]
            sinusoids += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        r = (self.w["positions.projection"][layer] @ np.array(sinusoids)).reshape(self.heads, -1)[head]
        return ((q + u[head]) @ k + (q + v[head]) @ r) / math.sqrt(len(q))

    def recurrence(self, period, mem_len, of_outputs):
        """Features of a text; a layer's memory is what went into it, or *of_outputs* what came out."""
        embedded = self.embedding(self.words)
        memory, features = [embedded[:0]] * self.layers, []
        for start in range(0, len(embedded), period):
            rows = embedded[start : start + period]
            self.oldest = start - len(memory[0])
            for layer in range(self.layers):
                everything = np.concatenate([memory[layer], rows])
                passed = self.through(layer, everything, len(rows), lambda i: range(i + 1))
                new = np.concatenate([memory[layer], passed]) if of_outputs else everything
                memory[layer], rows = new[max(len(new) - mem_len, 0) :], passed
            features.append(rows)
        return np.concatenate(features)

    def lookahead(self, period, mem_len, both_sides):
        """Features of a text by LaMemo: slots are computed anew from embeddings, and attend to what came after."""
        embedded, features = self.embedding(self.words), []
        stored = [{} for _ in range(self.layers)]  # by token and head, the read-out and the logarithm of its weight
        for start in range(0, len(embedded), period):
            self.oldest = max(start - mem_len, 0)
            rows, self.slots = embedded[self.oldest : start + period], start - self.oldest
            first = self.slots - min(self.slots, len(rows) - self.slots) + 1

            def seen(i, slots=self.slots, first=first):
                return range(i + 1) if i >= slots else range(first if both_sides else max(first, i + 1), slots + 1)

            self.seen = seen
            for layer in range(self.layers):
                self.stored = stored[layer]
                queries = len(rows) - (self.slots if layer == self.layers - 1 else 0)
                rows = self.through(layer, rows, queries, seen)
            features.append(rows)
        return np.concatenate(features)

    def mixed(self, layer, q, k, v, attended):
        """Interpolate the read-outs of slots with what they had read, and note those of all rows."""
        if self.seen is None or len(attended) < len(q):
            return attended
        for i, head in np.ndindex(len(q), self.heads):
            scores = [self.score(layer, head, i, j, q[i, head], k[j, head]) for j in self.seen(i)]
            weight = np.logaddexp.reduce(scores)
            if i < self.slots:
                read, former = self.stored[self.oldest + i, head]
                top = max(weight, former)
                share = math.exp(former - top) / (math.exp(former - top) + math.exp(weight - top) + 1e-6)
                attended[i, head] = share * read + (1 - share) * attended[i, head]
                weight = np.logaddexp(weight, former)
            self.stored[self.oldest + i, head] = attended[i, head].copy(), weight
        return attended


def numbered(words, sentence_ends=ENDS["sentence_ends"], paragraph_ends=ENDS["paragraph_ends"]):
    """The numbers of each word's token, sentence and paragraph: a new one begins behind a run of ends."""
    tokens, sentences, paragraphs = [0], [0], [0]
    for before, word in itertools.pairwise(words):
        ends = {*sentence_ends, *paragraph_ends}
        tokens.append(tokens[-1] + 1)
        sentences.append(sentences[-1] + (before in ends and word not in ends))
        paragraphs.append(paragraphs[-1] + (before in paragraph_ends and word not in paragraph_ends))
    return tokens, sentences, paragraphs


def test_numbers_of_sentences_and_paragraphs():
    """Of ``A . B ? ! C </s> </s> D E . </s> . F`` behind a ``</s>``; an empty line and a run of ends count once."""
    words = torch.tensor([[9, 20, 5, 21, 7, 5, 22, 9, 9, 23, 24, 5, 9, 5, 25]])
    sentences = [0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4, 5]
    paragraphs = [0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    config = PositionConfig(1, 6, 1, 4, looks_ahead=False, trained_distances=9, **ENDS)
    assert POSITIONS["segatron"](config).counts(words)[:, 0].tolist() == [sentences, paragraphs]
    assert numbered(words[0].tolist()) == (list(range(15)), sentences, paragraphs)


@memories
@pytest.mark.parametrize(
    "options",
    [
        {"mem_len": 5, "segment_length": 4},
        {"mem_len": 3, "segment_length": 5, "clamp_len": 2, "decoder_normalize_before": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_segments_equal_the_papers_computation(memory, options):
    decoder = segatron(memory, **{**ODD, **options})
    words = random_tokens(2, 14)
    assert len({tuple(numbered(row)[1]) for row in words.tolist()}) == 2
    features, state = [], None
    for segment in words.split(decoder.segment_length, dim=1):
        passed, state, _ = decoder.read_segment(segment, state)
        features.append(passed)
    assert memory == "none" or torch.equal(state.words, words[:, -decoder.memory.slots :])
    for stream in range(2):
        expected = of_paper(decoder, memory, words[stream].tolist(), [4, 4, 2])
        np.testing.assert_allclose(torch.cat(features, dim=1)[stream], expected, rtol=0, atol=1e-9)


def of_paper(decoder, memory, words, widths, parts="tsp"):
    config = decoder.config
    options = {"pre_norm": config.decoder_normalize_before, "farthest": config.clamp_len or None}
    paper = SegatronPaper(decoder, words, widths, parts, **options)
    if memory == "lookahead":
        return paper.lookahead(decoder.segment_length, config.mem_len, config.memory_options.lookahead_window == "full")
    return paper.recurrence(decoder.segment_length, config.slots, memory == "enhanced")


@torch.no_grad()
def test_slots_that_look_at_both_sides_equal_the_papers_computation():
    decoder = segatron("lookahead", "full", **ODD, mem_len=5, segment_length=3)
    words = random_tokens(1, 12)
    expected = of_paper(decoder, "lookahead", words[0].tolist(), [4, 4, 2])
    np.testing.assert_allclose(whole_segments(decoder, words)[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("ends", "parts"),
    [({"sentence_ends": ()}, "tp"), ({"paragraph_ends": ()}, "ts")],
)
@torch.no_grad()
def test_a_part_that_is_left_out(ends, parts):
    """As in the paper's ablation: the two others share the width."""
    decoder = segatron("recurrent", **ODD, **ends, segment_length=4)
    words = random_tokens(1, 12)
    paper = SegatronPaper(decoder, words[0].tolist(), [6, 4], parts)
    paper.numbers = [numbered(words[0].tolist(), **{**ENDS, **ends})["tsp".index(part)] for part in parts]
    expected = paper.recurrence(4, decoder.memory.slots, False)
    np.testing.assert_allclose(whole_segments(decoder, words)[0], expected, rtol=0, atol=1e-9)


def test_gradients_of_chosen_scores():
    """Distances to both sides; pairs outside of the table are masked, as they are in attention."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(2, (2, 2, 6), generator=generator).cumsum(2)
    queries, keys = counts[:, :, 2:] + 2, counts
    entries = queries.unsqueeze(3) - keys.unsqueeze(2)
    within = ((entries >= 0) & (entries < 5)).all(0).unsqueeze(1)

    def scores(q, tables):
        return counted_scores(q, tables, queries, keys).masked_fill(~within, 0)

    q, tables = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 4, 2), (2, 3, 5, 2))
    )
    assert gradcheck(scores, (q.requires_grad_(), tables.requires_grad_()))
    one, other = scores(q, tables), torch.zeros(2, 3, 4, 6, dtype=torch.float64)
    for kind, b, h, i, j in np.ndindex(2, 2, 3, 4, 6):
        if within[b, 0, i, j]:
            other[b, h, i, j] += (q[b, h, i] @ tables[kind, h, entries[kind, b, i, j]]).item()
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@memories
def test_gradients_of_the_model(memory):
    """Those of the parameters of positions along random directions, by differences; the memory is a constant."""
    decoder = segatron(memory, **ODD, segment_length=5)
    words, weighting = random_tokens(2, 10), torch.randn(10, dtype=torch.float64)
    with torch.no_grad():
        state = decoder.read_segment(words[:, :5]).state

    def loss():
        return decoder.read_segment(words[:, 5:], state).features.matmul(weighting).tanh().sum()

    for parameter in decoder.positions.parameters():
        (gradient,) = torch.autograd.grad(loss(), parameter)
        direction = torch.randn_like(parameter)
        losses = []
        with torch.no_grad():
            for step in (1e-5, -1e-5):
                parameter += step * direction
                losses.append(loss().item())
                parameter -= step * direction
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx((gradient * direction).sum().item(), rel=1e-6)


@torch.no_grad()
def test_earlier_rows_do_not_see_where_a_later_sentence_begins():
    """The authors' code gives each row the distances of the last one."""
    decoder = segatron("recurrent", segment_length=6)
    words = random_tokens(1, 12)
    before = whole_segments(decoder, words)
    for last in (4, 5, 9):
        words[0, -1] = last
        assert torch.equal(whole_segments(decoder, words)[:, :-1], before[:, :-1])


@pytest.mark.parametrize("memory", ["enhanced", "none"])
@torch.no_grad()
def test_tokens_equal_segments(memory):
    """With other memories, those of VARIANTS. Beams are reordered, and a sequence's words go with it."""
    decoder = segatron(memory, mem_len=5)
    words = random_tokens(3, 14)
    expected = decoder.output_layer(whole_segments(decoder, words))
    torch.testing.assert_close(read_by_token(decoder, words), expected, rtol=0, atol=1e-9)
    assert_decoding_follows_reordered_beams(decoder)


@torch.no_grad()
def test_texts_of_one_shape_have_distances_of_their_own():
    """Where parameters stay as they are, tables are computed once, and numbers for each text."""
    decoder = segatron("lookahead")
    texts = [random_tokens(2, 9, seed=seed) for seed in range(2)]
    expected = [read_streams(decoder, text) for text in texts]
    assert not torch.equal(*(decoder.positions.counts(text) for text in texts))
    with decoder.positions.unchanged():
        for text, scores in zip(texts, expected, strict=True):
            assert torch.equal(read_streams(decoder, text), scores)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 0.05), (torch.bfloat16, 0.4)])
@torch.no_grad()
def test_half_precision(dtype, largest):
    """Numbers are integers, and exact however long the text is."""
    exact, words = segatron("recurrent", segment_length=40, mem_len=40), random_tokens(1, 80)
    rounded = segatron("recurrent", segment_length=40, mem_len=40).to(dtype)
    found, expected = (read_streams(model, words).double() for model in (rounded, exact))
    assert found.isfinite().all() and (found - expected).abs().max() < largest * expected.abs().max()


def test_a_sampler_takes_over_tables_and_words():
    """Graphs of an earlier call go on with what another state has read, and with its parameters."""
    decoder, words = segatron("recurrent"), random_tokens(2, 9)
    with torch.no_grad():
        former, state = DecodingState(decoder, 2), None
        decoder.positions.projection.mul_(2)
        state = DecodingState(decoder, 2)
        state.read(words[:, :8])
        former.copy_(state)
        assert torch.equal(former.read(words[:, 8:]), state.read(words[:, 8:]))


@torch.no_grad()
def test_a_memory_without_words_is_refused():
    decoder, plain = segatron("recurrent"), tiny_decoder(("recurrent", "transformer-xl", "right"))
    words = random_tokens(1, 3)
    with pytest.raises(
        ValueError, match=r"segatron needs the words of the memory slots, .*: begin with an empty memory"
    ):
        decoder.read_segment(words, plain.read_segment(words).state)
    state = decoder.read_segment(words).state
    assert torch.equal(type(state).from_dict(state.to_dict()).words, words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "compressive"}, "not tokens with --memory compressive: .* memories enhanced, lookahead, none, rec"),
        ({"memory": "token", "mem_len": 0}, "not tokens with --memory token: take another encoding"),
        ({"sentence_ends": (), "paragraph_ends": ()}, "pass --sentence-ends or --paragraph-ends, or take"),
        ({"sentence_ends": [99]}, "sentence_ends has 99: pass ids of words, from 0 to 16"),
        ({"decoder_embed_dim": 4}, "--decoder-embed-dim 4 is too narrow for the 3 parts .*: pass at least 6"),
        (
            {"attention_backend": "fused"},
            "fused cannot run here: attention by distances .* pass --attention-backend auto",
        ),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        segatron(options.pop("memory", "recurrent"), dtype=torch.float32, **options).read_segment(random_tokens(1, 3))


def test_the_configuration_has_the_ids():
    config = segatron("enhanced").config
    assert (
        config.sentence_ends == (5, 7)
        and ModelConfig.from_dict({**config.to_dict(), "sentence_ends": [5, 7]}) == config
    )
    others = tiny_decoder(("enhanced", "transformer-xl", "right"))
    assert [p.shape for p in segatron("enhanced").parameters()] == [p.shape for p in others.parameters()]
