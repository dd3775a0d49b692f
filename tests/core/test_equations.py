"""Positions and attention together against the papers' equations, pair by pair, in float64.

Shapes: B streams, H heads, N current tokens, m memory slots, D size of a head, d model width.
"""

import math

import pytest
import torch

from lamemo_fairseq.core.attention import Attended, eager
from lamemo_fairseq.core.memory.lookahead import WINDOWS
from lamemo_fairseq.core.memory.lookahead import eager as lookahead
from lamemo_fairseq.core.positions import POSITIONS, PositionConfig

from .helpers import random_tokens, tiny_decoder

B, H, D, WIDTH = 2, 2, 3, 8
TRAINED = 6  # distances that learned positions were trained with
sinusoidal = pytest.mark.parametrize("name", ["transformer-xl", "disentangled", "disentangled-content"])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def encoding_of(name, clamp_len=0):
    config = PositionConfig(
        1, WIDTH, H, D, looks_ahead=name not in ("shaw", "t5"), trained_distances=TRAINED, clamp_len=clamp_len
    )
    encoding = POSITIONS[name](config).double()
    for seed, parameter in enumerate(encoding.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed)
    return encoding


def sinusoid(distance):
    angles = [distance / 10000 ** (2 * i / WIDTH) for i in range(WIDTH // 2)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)


def embedded(encoding, distance):
    """``R = W_r sinusoid(distance)``: ``[H, D]``."""
    return (encoding.projection[0] @ sinusoid(distance)).view(H, D)


def attend(q, k, v, parts):
    """Softmax attention of each query i over the keys j for which ``parts(i, j)`` is not None.

    The parts of a pair are, for each head, the vectors added to the query for content and for
    position, the embedded distance, and the distance's own score.
    """
    output, normalizer = torch.zeros_like(q), q.new_zeros(q.shape[:3])
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        keys = [j for j in range(k.size(2)) if parts(i, j)]
        scores = torch.stack([pair_score(q[b, h, i], k[b, h, j], *(part[h] for part in parts(i, j))) for j in keys])
        normalizer[b, h, i] = scores.logsumexp(0)
        output[b, h, i] = scores.softmax(0) @ v[b, h, keys]
    return Attended(output, normalizer)


def pair_score(q, k, content, position, distance, score=0):
    return ((q + content) @ k + (q + position) @ distance + score) / math.sqrt(len(q))


def assert_close(actual, expected):
    for part in Attended._fields:
        torch.testing.assert_close(getattr(actual, part), getattr(expected, part), rtol=0, atol=1e-12)


def assert_causal_attention(encoding, parts, queries, keys, span=None, nearest=0):
    q, k, v = normal(B, H, queries, D), normal(B, H, keys, D, seed=1), normal(B, H, keys, D, seed=2)

    def seen(i, j):
        distance = keys - queries + i - j
        return parts(distance) if nearest <= distance < nearest + (span or keys) else None

    bias = encoding(keys, None, q)[0].causal
    assert_close(eager.causal_attention(q, k, v, bias, span, nearest=nearest), attend(q, k, v, seen))


@sinusoidal
@pytest.mark.parametrize(
    ("queries", "keys", "span", "clamp"),
    [(1, 1, None, 0), (5, 5, None, 0), (3, 8, None, 2), (4, 7, 3, 0), (3, 7, 1, 4), (1, 6, 2, 0)],
)
def test_current_tokens_attend_by_sinusoids(name, queries, keys, span, clamp):
    encoding = encoding_of(name, clamp)

    def parts(distance):
        return encoding.content_bias, encoding.position_bias, embedded(encoding, min(distance, clamp or keys))

    assert_causal_attention(encoding, parts, queries, keys, span)


@pytest.mark.parametrize(("queries", "keys", "clamp"), [(1, 1, 0), (2, 6, 0), (4, 9, 0), (3, 5, 2), (3, 9, 8)])
def test_current_tokens_attend_by_learned_distances(queries, keys, clamp):
    """Rows hold the farthest distance first, and whatever is farther takes that."""
    encoding = encoding_of("shaw", clamp)

    def parts(distance):
        row = TRAINED - 1 - min(distance, min(clamp or TRAINED, TRAINED) - 1)
        embedding, score = encoding.distance_embedding[0, row], encoding.distance_bias[0, row]
        return encoding.content_bias[0], torch.zeros(H, D), embedding, score

    assert_causal_attention(encoding, parts, queries, keys)


@pytest.mark.parametrize(
    ("queries", "keys", "clamp", "nearest"), [(1, 1, 0, 0), (3, 20, 0, 1), (1, 140, 0, 1), (2, 40, 18, 0)]
)
def test_current_tokens_attend_by_biases_that_far_distances_share(queries, keys, clamp, nearest):
    """The first 16 distances have one each. Each of the other 16 begins ``8 ** (1 / 16)`` times as far away."""
    encoding, zeros = encoding_of("t5", clamp), torch.zeros(H, D, dtype=torch.float64)
    begins = [*range(16), *(16 * 8 ** (n / 16) for n in range(16))]

    def parts(distance):
        which = sum(begin <= min(distance, clamp or keys) for begin in begins) - 1
        return zeros, zeros, zeros, 128 * encoding.table[0, :, which] * math.sqrt(D)

    assert_causal_attention(encoding, parts, queries, keys, nearest=nearest)


def test_absolute_positions_count_down_to_the_last_token():
    added = encoding_of("absolute").embed(torch.zeros(2, 4, WIDTH, dtype=torch.float64), torch.tensor([4, 2]))
    for row, position, from_end in [(0, 0, 3), (0, 1, 2), (0, 3, 0), (1, 0, 1), (1, 1, 0)]:
        torch.testing.assert_close(added[row, position], sinusoid(from_end))


@sinusoidal
@pytest.mark.parametrize("window", ["right", "full"])
@pytest.mark.parametrize(("slots", "current", "clamp"), [(1, 1, 0), (5, 3, 0), (3, 5, 0), (5, 5, 2), (4, 1, 1)])
def test_slots_look_ahead_by_sinusoids(name, window, slots, current, clamp):
    encoding = encoding_of(name, clamp)
    q, k, v = normal(B, H, slots, D), normal(B, H, slots + 1, D, seed=1), normal(B, H, slots + 1, D, seed=2)
    first = slots + 1 - min(slots, current)  # of the keys, which end with the first current token

    def parts(slot, position):
        if position < first or (window == "right" and position <= slot):
            return None
        distance = slot - position  # negative to the right
        if name == "transformer-xl":
            return encoding.content_bias, encoding.position_bias, embedded(encoding, min(distance, clamp or slots))
        content = encoding.ahead_content_bias if name == "disentangled-content" else encoding.content_bias
        return content, encoding.ahead_position_bias, embedded(encoding, min(abs(distance), clamp or slots))

    keys = WINDOWS[window](slots, current)
    bias = encoding(slots + current, keys.distances(slots), q)[0].ahead
    nothing = Attended(torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=q.dtype))
    actual = lookahead.lookahead_attention(q, k[:, :, keys.first :], v[:, :, keys.first :], bias, keys, nothing)
    expected = attend(q, k, v, parts)
    assert_close(actual, expected)


@pytest.mark.parametrize(("segment", "mem_len"), [(1, 5), (2, 5), (3, 3), (4, 2)])
def test_a_slot_holds_one_softmax_over_everything_it_has_seen(segment, mem_len):
    """In the first layer, whose rows never change: it meets no position twice and misses none, whatever the sizes."""
    decoder = tiny_decoder(segment_length=segment, mem_len=mem_len)
    positions = decoder.positions
    tokens, state = random_tokens(1, 6 * segment), None
    with torch.no_grad():
        for part in tokens.split(segment, dim=1):
            _, state, _ = decoder.read_segment(part, state)
        q, k, v = decoder.layers[0].self_attn.project(decoder.embed_tokens(tokens), 6 * segment)
        tables = positions._project(positions._sinusoids(range(6 * segment), q))[0]
    newest = 5 * segment  # the first token of the last segment, up to which its memory looks ahead
    error = 5 * lookahead.INTERPOLATION_EPS * (v.max() - v.min())  # one eps a refresh

    for index, slot in enumerate(range(6 * segment - mem_len, 6 * segment)):
        seen = range(max(0, slot // segment * segment - mem_len), max(slot, newest) + 1)
        for head in range(2):
            scores = []
            for j in seen:
                bias = positions.position_bias if j <= slot else positions.ahead_position_bias
                content, distance = positions.content_bias[head], tables[head, abs(slot - j)]
                scores.append(pair_score(q[0, head, slot], k[0, head, j], content, bias[head], distance))
            expected = torch.stack(scores).softmax(0) @ v[0, head, seen.start : seen.stop]
            assert (state.outputs[0][0, head, index] - expected).abs().max() <= error
            normalizer = torch.stack(scores).logsumexp(0)
            torch.testing.assert_close(state.normalizers[0][0, head, index], normalizer, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "largest"), [("disentangled", (0.3, 0.35)), ("disentangled-normal", (0.04, 0.1))])
def test_the_second_position_bias_at_first(name, largest):
    """Xavier-uniform is bounded by sqrt(6 / (10 + 41)) = .343; the largest of 410 normal numbers is some .06."""
    torch.manual_seed(1)
    config = PositionConfig(
        layers=1, embed_dim=8, heads=10, head_dim=41, looks_ahead=True, trained_distances=4, clamp_len=0, dropout=0.0
    )
    low, high = largest
    assert low < POSITIONS[name](config).ahead_position_bias.abs().max() < high
