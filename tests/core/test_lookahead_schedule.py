"""Look-ahead in some layers and segments only, against loops over tokens, Transformer-XL, and counts of operations."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lamemo_fairseq.core import StreamMemory
from lamemo_fairseq.core.memory.lookahead import LookaheadState
from lamemo_fairseq.core.memory.position import SegmentPosition

from .helpers import (
    assert_decoding_follows_reordered_beams,
    random_tokens,
    read_by_token,
    tiny_decoder,
    whole_segments,
)
from .paper import Paper

LAYERS = 3
SIZES = {"decoder_layers": LAYERS, "segment_length": 3}


def model_of(lowest=1, every=1, positions="disentangled-content", window="right", **options):
    schedule = {"lookahead_from_layer": lowest, "lookahead_every": every}
    return tiny_decoder(("lookahead", positions, window), **{**SIZES, **schedule, "mem_len": 5, **options})


class SchedulePaper(Paper):
    """A text read token by token. Tokens have a row in each layer, which a slot's refresh replaces by another one."""

    def text(self, embedded, period, mem_len, lowest, every, both_sides=False):
        self.read_outs = [{} for _ in range(self.layers)]  # by token and head, with the logarithm of their weight
        inputs = [{} for _ in range(self.layers)]  # by token, the row that goes into a layer
        met, features = {}, []  # the last token that a token has looked at
        for start in range(0, len(embedded), period):
            end, oldest = min(start + period, len(embedded)), max(start - mem_len, 0)
            inputs[0].update(enumerate(embedded[start:end], start))
            self.oldest, self.slots, self.keys = oldest, start - oldest, {}
            first, is_due = max(oldest + 1, start - every * period + 1), start % (every * period) == 0
            for token in range(oldest, start):
                unmet = range(first if both_sides else met[token] + 1, start + 1)
                self.keys[token - oldest] = [key - oldest for key in unmet]
            for layer in range(self.layers):
                self.looks = is_due and lowest - 1 <= layer < self.layers - 1
                everything = np.array([inputs[layer][token] for token in range(oldest, end)])
                queries = len(everything) if self.looks else end - start
                passed = self.through(layer, everything, queries, self.seen)
                if layer == self.layers - 1:
                    features.append(passed)
                else:
                    inputs[layer + 1].update(enumerate(passed, end - queries))
            if is_due:
                met.update(dict.fromkeys(range(oldest, start), start))
            met.update({token: token for token in range(start, end)})
        return np.concatenate(features)

    def seen(self, i):
        return range(i + 1) if i >= self.slots else self.keys[i]

    def mixed(self, layer, q, k, v, attended):
        first = len(q) - len(attended)
        for i, head in itertools.product(range(first, len(q)), range(self.heads)):
            scores = [self.score(layer, head, i, j, q[i, head], k[j, head]) for j in self.seen(i)]
            weight, read = np.logaddexp.reduce(scores), attended[i - first, head]
            if i < self.slots:
                former, before = self.read_outs[layer][self.oldest + i, head]
                top = max(weight, before)
                share = np.exp(before - top) / (np.exp(before - top) + np.exp(weight - top) + 1e-6)
                read, weight = share * former + (1 - share) * read, np.logaddexp(weight, before)
            self.read_outs[layer][self.oldest + i, head] = read, weight
            attended[i - first, head] = read
        return attended


@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize("lowest", range(1, LAYERS + 2))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mem_len": 2, "decoder_normalize_before": True},
        {"window": "full", "positions": "transformer-xl", "mem_len": 7},
    ],
    ids=str,
)
@torch.no_grad()
def test_segments_equal_a_computation_token_by_token(options, lowest, every):
    """Of six segments, so that the seventh is never read."""
    model, tokens = model_of(lowest, every, **options), random_tokens(1, 18)
    paper = SchedulePaper(model, pre_norm=model.config.decoder_normalize_before)
    both_sides = options.get("window") == "full"
    expected = paper.text(paper.embedding(tokens[0]), 3, model.config.mem_len, lowest, every, both_sides)
    np.testing.assert_allclose(whole_segments(model, tokens)[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize("lowest", range(1, LAYERS + 2))
@pytest.mark.parametrize("options", [{}, {"mem_len": 2}, {"mem_len": 7, "same_length": True}], ids=str)
@torch.no_grad()
def test_token_by_token_as_by_segments(options, lowest, every):
    model, tokens = model_of(lowest, every, **options), random_tokens(2, 19)
    expected = model.output_layer(whole_segments(model, tokens))
    torch.testing.assert_close(read_by_token(model, tokens, first=4), expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_sequences_in_other_segments_follow_reordered_beams():
    assert_decoding_follows_reordered_beams(model_of(2, 3), words=3)


@pytest.mark.parametrize("segments", [2, 3])
def test_gradients_within_a_segment(segments):
    """Of the third segment no slot looks ahead, of the fourth all slots do; the memory has no gradient."""
    model, state = model_of(2, 3), None
    for segment in random_tokens(1, 3 * segments).split(3, dim=1):
        state = model.read_segment(segment, state).state
    assert not any(tensor.requires_grad for tensor in state.tensors())
    x = model.embed_tokens(random_tokens(1, 3, seed=1)).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model.memory(x, state, model.layers, model.positions).features, x)


def updates(model, tokens):
    """Features and gradients of each segment in training, with the same dropout for every model."""
    state, made = None, []
    for n, segment in enumerate(tokens.split(3, dim=1)):
        torch.manual_seed(n)
        model.zero_grad()
        features, state, _ = model.read_segment(segment, state)
        features.square().sum().backward()
        made += [features.detach(), *(torch.zeros(1) if p.grad is None else p.grad for p in model.parameters())]
    return made


@pytest.mark.parametrize("lowest", [LAYERS, LAYERS + 1])
def test_above_all_layers_that_have_others_above_is_transformer_xl(lowest):
    """To the last bit, by the same weights. No slot of the last layer looks ahead, as its rows would go nowhere."""
    options = {**SIZES, "mem_len": 5, "dropout": 0.3}
    models = [
        tiny_decoder(("recurrent", "transformer-xl", "right"), **options),
        tiny_decoder(("lookahead", "transformer-xl", "right"), lookahead_from_layer=lowest, **options),
    ]
    models[1].load_state_dict(models[0].state_dict())
    tokens = random_tokens(2, 12)
    assert all(map(torch.equal, *(updates(model.train(), tokens) for model in models)))
    assert all(map(torch.equal, *(updates(model.eval(), tokens) for model in models)))


def operations(memory, lowest=1, every=1, segments=4):
    """Multiplications and additions of the last of some segments, the memory being full."""
    options = {**SIZES, "mem_len": 3, "decoder_layers": 6, "attention_backend": "eager"}
    schedule = {"lookahead_from_layer": lowest, "lookahead_every": every}
    model = tiny_decoder((memory, "transformer-xl", "right"), **schedule, **options)
    state, (*before, last) = None, random_tokens(2, 3 * segments).split(3, dim=1)
    for segment in before:
        state = model.read_segment(segment, state).state
    with FlopCounterMode(display=False) as counter:
        model.read_segment(last, state)
    return counter.get_total_flops()


@torch.no_grad()
def test_the_cost_is_in_proportion_to_the_layers_that_look_ahead():
    counts = [operations("lookahead", lowest) for lowest in range(1, 6)]
    steps = {more - less for more, less in itertools.pairwise(counts)}
    assert len(steps) == 1 and steps.pop() > 0
    assert operations("lookahead", 6) == operations("lookahead", 7) == operations("recurrent") < counts[-1]


@torch.no_grad()
def test_segments_without_look_ahead_cost_as_much_as_transformer_xls():
    """Slots look ahead in the fifth segment and in the seventh."""
    costs = [operations("lookahead", 1, 2, segments) for segments in (5, 6, 7, 8)]
    assert costs == [operations("lookahead"), operations("recurrent")] * 2


@pytest.mark.parametrize("every", [1, 2, 3])
@torch.no_grad()
def test_a_saved_memory_goes_on(every, tmp_path):
    model, tokens = model_of(2, every), random_tokens(2, 18).split(3, dim=1)
    streams = StreamMemory(model.memory.state)
    places = [SegmentPosition("train", 1, 2, 3, (0, 1), index) for index in range(6)]
    expected = []
    for place, segment in zip(places, tokens, strict=True):
        features, state, _ = model.read_segment(segment, streams.read(place, True))
        streams.write(place, True, state)
        expected.append(features)
        if place.index == 3:
            torch.save(state.to_dict(), tmp_path / "memory.pt")
    again = StreamMemory(model.memory.state)
    again.restore(places[3], torch.load(tmp_path / "memory.pt"), slice(0, 2))
    for place, segment in zip(places[4:], tokens[4:], strict=True):
        features, state, _ = model.read_segment(segment, again.read(place, True))
        again.write(place, True, state)
        assert torch.equal(features, expected[place.index])


@torch.no_grad()
def test_the_memory_of_all_layers_is_saved_as_before():
    state = model_of().read_segment(random_tokens(2, 3)).state
    saved = state.to_dict()
    assert set(saved) == {"embeddings", "outputs", "normalizers"}
    assert all(map(torch.equal, LookaheadState.from_dict(saved).tensors(), state.tensors()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lookahead_from_layer": 0}, "--lookahead-from-layer is 0, but layers are counted from 1: pass 1 for all"),
        ({"lookahead_every": 0}, "--lookahead-every is 0, it must be at least 1: pass 1 for every segment, or --mem"),
        (
            {"lookahead_every": 2, "reading_order": "diagonal", "cuda_graphs": True},
            "--reading-order diagonal reads segments that are all alike, and with --lookahead-every 2 they are not",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_decoder(**options)
    assert "\n" not in str(error.value)
