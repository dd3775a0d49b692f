"""Segments and layers on the anti-diagonal, against one segment after the other: the same to the last bit."""

from itertools import pairwise

import pytest
import torch

from lamemo_fairseq.core.diagonal import DiagonalGraph, Diagonals, EagerStep, read_diagonally
from lamemo_fairseq.core.memory import MEMORIES
from lamemo_fairseq.core.memory.documents import DocumentStreams
from lamemo_fairseq.core.positions import POSITIONS
from lamemo_fairseq.core.segments import Piece

from ..gpus import gpu
from .helpers import VARIANTS, first_of_each_memory, random_tokens, tiny_decoder

LAYERED = [
    (memory, positions, choice)
    for memory, positions, choice in VARIANTS
    if MEMORIES[memory].is_layered() and not POSITIONS[positions].reads_words and choice != "seldom"
]
FIRST = [v for v in first_of_each_memory().values() if v in LAYERED]
# Each memory with each of its own choices, and each position encoding with one memory.
CHOSEN = {**{v[1]: v for v in LAYERED}, **{(v[0], v[2]): v for v in reversed(LAYERED)}}.values()
SIZES = {"segment_length": 4, "compressed_len": 2, "decoder_layers": 3}


def model_of(variant, order="diagonal", dtype=torch.float64, **options):
    segments = 2 if MEMORIES[variant[0]].carries_gradient else 1
    sizes = {**SIZES, "bptt_segments": segments, "cuda_graphs": True, "reading_order": order, **options}
    return tiny_decoder(variant, dtype=dtype, **sizes)


def pieces_of(tokens, length=4):
    return [Piece(segment) for segment in tokens.split(length, dim=1)]


def everything(model, pieces):
    """Features of all segments, and the memory after them."""
    with torch.no_grad():
        reader = model.segments()
        features = list(reader.features(pieces))
    return [*features, *reader.state.tensors()]


def assert_same(one, other):
    assert len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.fixture
def steps(monkeypatch):
    """The layers that read in each step."""
    noted, run = [], EagerStep.run

    def noting(self, x, layers):
        noted.append(tuple(layers))
        run(self, x, layers)

    monkeypatch.setattr(EagerStep, "run", noting)
    return noted


def backwards(self, x, layers):
    """Run the layers of a step in another order, and hand rows on after all have read."""
    if x is not None:
        self.rows[0] = x
    made = {}
    for n in [*layers][1:] + [*layers][:1]:
        made[n] = self.memory.pass_layer(n, self.layers[n], self.rows[n], self.states[n], self.segment)
    for n, (rows, state, _) in made.items():
        self.rows[n + 1], self.states[n] = rows, state


@pytest.mark.parametrize("variant", dict.fromkeys(CHOSEN), ids="-".join)
def test_layers_read_other_segments_with_the_same_result(variant, steps, monkeypatch):
    """Two streams; the last segment is not whole. Layers of one step are independent: any may be the first."""
    pieces = pieces_of(random_tokens(2, 8 * 4 + 2))
    expected = everything(model_of(variant, "plain"), pieces)
    assert not steps
    assert_same(everything(model_of(variant), pieces), expected)
    assert (0, 1, 2) in steps, "no step had all layers at work"
    if variant in FIRST:
        monkeypatch.setattr(EagerStep, "run", backwards)
        assert_same(everything(model_of(variant), pieces), expected)


def test_the_pipeline_fills_and_empties(steps):
    model = model_of(VARIANTS[0])
    for segments, expected in {
        1: [(0,), (1,), (2,)],
        2: [(0,), (0, 1), (1, 2), (2,)],
        3: [(0,), (0, 1), (0, 1, 2), (1, 2), (2,)],
        5: [(0,), (0, 1), (0, 1, 2), (0, 1, 2), (0, 1, 2), (1, 2), (2,)],
    }.items():
        steps.clear()
        read_without_looking_ahead(model, segments)
        assert steps == expected


def read_without_looking_ahead(model, count):
    """Read *count* segments on the anti-diagonal, fewer than there are layers too; features and memory are right."""
    with torch.no_grad():
        pieces = pieces_of(random_tokens(1, (3 + count) * 4))
        reader = model.segments()
        for _ in reader.features(pieces[:3]):
            pass
        state, wanted, after = reader.state, [], reader.state
        for piece in pieces[3:]:
            features, after, _ = model.read_segment(piece.tokens, after)
            wanted.append(features)
        x = [model.embed(piece.tokens) for piece in pieces[3:]]
        step = EagerStep(model, model.memory.segment(x[0], state, model.positions))
        reading, found = read_diagonally(step, model.memory.layer_states(state), iter(x)), []
        parts = None
        while parts is None:
            try:
                found.append(next(reading))
            except StopIteration as end:
                parts = end.value
        assert_same([*found, *model.memory.joined(parts, state).tensors()], [*wanted, *after.tensors()])


def test_no_segments_leave_the_memory_alone():
    model = model_of(VARIANTS[0])
    parts = [(torch.ones(1),)] * 3
    reading = read_diagonally(EagerStep(model, None), parts, iter(()))
    with pytest.raises(StopIteration) as end:
        next(reading)
    assert end.value.value == parts


def test_a_text_with_fewer_segments_than_layers_is_read_in_turn(steps):
    everything(model_of(VARIANTS[0]), pieces_of(random_tokens(1, 4 * 4)))
    assert not steps  # two segments fill the memory, two are left


def test_segments_are_asked_for_no_further_ahead_than_there_are_layers():
    asked, got = 0, 0

    def pieces():
        nonlocal asked
        for piece in pieces_of(random_tokens(1, 80)):
            asked += 1
            yield piece

    with torch.no_grad():
        for _ in model_of(VARIANTS[0]).segments().features(pieces()):
            got += 1
            assert asked - got <= 2 * SIZES["decoder_layers"]
    assert got == 20


@pytest.mark.parametrize(("streams", "lengths"), [(1, [26, 5, 22]), (2, [27, 35, 5, 38, 31])])
def test_streams_that_begin_anew(streams, lengths, steps):
    """Documents clear their stream, and streams end apart."""
    tokens = random_tokens(1, 100)[0]
    deal = DocumentStreams(lengths, streams, 4, clear=True)
    dealt = [deal.stream(own) for own in deal.dealt]

    def pieces():
        for index in range(deal.num_segments):
            own = [stream.segment(index) for stream in dealt]
            sizes = [extracts[0].stop - extracts[0].start if extracts else 1 for extracts in own]
            rows = [tokens[index : index + size] for size in sizes]
            padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            ragged = min(sizes) < padded.size(1)
            yield Piece(
                padded,
                torch.tensor(sizes) if ragged else None,
                [n for n, extracts in enumerate(own) if extracts and extracts[0].start == 0],
                [n for n, extracts in enumerate(own) if not extracts],
            )

    for name in ("lookahead", "compressive"):
        variant = first_of_each_memory()[name]
        steps.clear()
        expected = everything(model_of(variant, "plain", decoder_layers=2), pieces())
        assert_same(everything(model_of(variant, decoder_layers=2), pieces()), expected)
        assert steps


@pytest.mark.parametrize("mem_len", [3, 6, 9])
def test_memories_of_other_lengths_than_a_segment(mem_len, steps):
    for name in ("lookahead", "recurrent", "enhanced", "compressive"):
        variant = first_of_each_memory()[name]
        pieces = pieces_of(random_tokens(1, 36))
        expected = everything(model_of(variant, "plain", mem_len=mem_len), pieces)
        assert_same(everything(model_of(variant, mem_len=mem_len), pieces), expected)
    assert steps


def test_one_layer(steps):
    pieces = pieces_of(random_tokens(1, 24))
    for variant in (VARIANTS[0], first_of_each_memory()["compressive"], first_of_each_memory()["infini"]):
        expected = everything(model_of(variant, "plain", decoder_layers=1), pieces)
        assert_same(everything(model_of(variant, decoder_layers=1), pieces), expected)
    assert set(steps) == {(0,)}


@pytest.mark.parametrize(
    ("variant", "mem_len"),
    [
        (v, mem_len)
        for v in FIRST
        if MEMORIES[v[0]].fills_caches
        for mem_len in ((6, 3) if v[0] in ("lookahead", "recurrent", "enhanced") else (4,))
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else str(value),
)
def test_a_long_prompt_goes_into_the_cache_in_whole_segments(variant, mem_len, steps):
    """Its words have the same scores, and so have those that are read into the cache after it."""
    tokens, sizes = random_tokens(2, 44), {"mem_len": mem_len, "decoder_layers": 2}
    beginnings, others = [tokens[0, :34], tokens[1, :27]], [tokens[0, 34:], tokens[1, 27:]]
    scored = []
    for order in ("plain", "diagonal"):
        reader = model_of(variant, order, **sizes).reader(2)
        scored.append([score.log_probs for texts in (beginnings, others) for score in reader.score(texts)])
        assert bool(steps) == (order == "diagonal")
    for one, other in zip(*scored, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    steps.clear()
    reader = model_of(variant, **sizes).reader(2)
    reader.read(beginnings)
    assert steps
    assert_same([score.log_probs for score in reader.score(others)], scored[1][2:])


def test_a_text_that_has_begun_goes_on_in_the_cache(steps):
    reader = model_of(VARIANTS[0]).reader()
    reader.read(random_tokens(1, 3)[0])
    reader.read(random_tokens(1, 40)[0])
    assert not steps


def test_training_is_never_on_the_anti_diagonal(steps):
    model = model_of(VARIANTS[0]).train()
    reader = model.segments()
    features = list(reader.features(pieces_of(random_tokens(1, 40))))
    features[-1].sum().backward()
    assert not steps


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        (first_of_each_memory()["token"], {"reading_order": "diagonal", "cuda_graphs": True}, "first layer waits for"),
        (
            ("lookahead", "segatron", "full"),
            {"reading_order": "diagonal", "cuda_graphs": True},
            "segatron counts words",
        ),
        (VARIANTS[0], {"reading_order": "diagonal"}, "pass --cuda-graphs too"),
        (VARIANTS[0], {"reading_order": "other"}, "unknown --reading-order 'other'; the known ones are auto, plain"),
    ],
    ids=["memory", "positions", "graphs", "unknown"],
)
def test_what_cannot_be_read_so_is_refused(variant, options, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_decoder(variant, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("variant", FIRST, ids=lambda v: v[0])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=gpu)], ids=str)
def test_recorded_steps_give_the_same(variant, dtype, device):
    """Two texts one after the other by one recording, the weights changed in place between them."""
    pieces = pieces_of(random_tokens(1, 36).to(device))
    sizes = {"decoder_head_dim": 4, "decoder_layers": 2}
    models = [model_of(variant, order, dtype, **sizes).to(device) for order in ("plain", "auto")]
    for _ in range(2):
        expected, found = (everything(model, pieces) for model in models)
        assert_same(found, expected)
        with torch.no_grad():
            for model in models:
                for parameter in model.parameters():
                    parameter.mul_(1.1)
    assert isinstance(models[1].diagonals.graph, DiagonalGraph)
    assert models[0].diagonals.graph is None


def test_a_recording_serves_one_reading_at_a_time(device):
    models = [model_of(VARIANTS[0], order, torch.float32, decoder_layers=2).to(device) for order in ("plain", "auto")]
    texts = [pieces_of(random_tokens(1, 24, seed=seed).to(device)) for seed in (1, 2)]
    with torch.no_grad():
        expected = [list(models[0].segments().features(pieces)) for pieces in texts]
        readings = [models[1].segments().features(pieces) for pieces in texts]
        in_turn = list(zip(*readings, strict=True))
    for one, other in zip(zip(*in_turn, strict=True), expected, strict=True):
        assert_same(one, other)


def test_features_stay_what_they_were(device):
    model = model_of(VARIANTS[0], "auto", torch.float32, decoder_layers=2).to(device)
    with torch.no_grad():
        found = list(model.segments().features(pieces_of(random_tokens(1, 24).to(device))))
    assert all(not torch.equal(*pair) for pair in pairwise(found))


def test_two_streams_are_read_in_turn_unless_asked_for(device):
    model = model_of(VARIANTS[0], "auto", torch.float32).to(device)
    everything(model, pieces_of(random_tokens(2, 32).to(device)))
    assert model.diagonals.graph is None


def test_a_copied_model_records_anew():
    model = model_of(VARIANTS[0])
    model.diagonals.graph = object()
    function, arguments = model.diagonals.__reduce__()
    copied = function(*arguments)
    assert isinstance(copied, Diagonals) and copied.order == "diagonal" and copied.graph is None
