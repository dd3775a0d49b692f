"""Documents read side by side score what each scores alone, whatever the memory and the number of streams."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamemo_fairseq.core import StreamMemory
from lamemo_fairseq.core.memory.documents import DocumentStreams
from lamemo_fairseq.core.memory.groups import GroupedState, advance, join_batches, load_groups, save_groups
from lamemo_fairseq.core.memory.position import SegmentPosition

from .helpers import TINY, VARIANTS, first_of_each_memory, random_tokens, tiny_decoder

LENGTH = TINY["segment_length"]
LENGTHS = [17, 0, 1, 5, 3, 9, 6, 1, 2, 20]  # tokens of documents, read in segments of 3
memories = pytest.mark.parametrize("variant", first_of_each_memory().values(), ids="-".join)


def documents():
    return [random_tokens(1, length + 1, seed=number)[0] for number, length in enumerate(LENGTHS)]


def assert_scored_alone(model, streams):
    for scores, document in zip(model.score_documents(documents(), streams), documents(), strict=True):
        assert len(scores) == len(document) - 1
        if len(scores):
            with torch.no_grad():
                alone = model.log_probs(model.read_text(document[None, :-1])).squeeze(0)
            torch.testing.assert_close(scores, alone.gather(1, document[1:, None]).squeeze(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_scores_are_those_of_each_document_alone(variant):
    assert_scored_alone(tiny_decoder(variant), 4)


@memories
@pytest.mark.parametrize("streams", [1, 12])
def test_scores_do_not_depend_on_the_number_of_streams(variant, streams):
    assert_scored_alone(tiny_decoder(variant), streams)


def test_scores_in_float32():
    model = tiny_decoder(dtype=torch.float32)
    one, many = model.score_documents(documents(), 1), model.score_documents(documents(), 5)
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_scored():
    model = tiny_decoder()
    for texts, streams in (([torch.tensor([], dtype=torch.int64)], 1), (documents(), 0)):
        with pytest.raises(ValueError, match="at least one word, in at least one stream"):
            model.score_documents(texts, streams)
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        model.train().score_documents(documents(), 1)


def gradients(model, texts, streams):
    """Gradients of the summed loss of texts and of the memory's own losses, a token each; and that of the memory."""
    deal = DocumentStreams([len(text) - 1 for text in texts], streams, LENGTH, clear=True)
    own = [deal.stream(dealt) for dealt in deal.dealt]
    model.zero_grad()
    state, of_memory = None, 0.0
    for index in range(deal.num_segments):
        tokens, target = torch.ones(2, streams, LENGTH, dtype=torch.int64)
        lengths = torch.zeros(streams, dtype=torch.int64)
        cleared = []
        for row, stream in enumerate(own):
            for extract in stream.segment(index):
                words = texts[extract.document][extract.start : extract.stop + 1]
                lengths[row] = len(words) - 1
                tokens[row, : len(words) - 1], target[row, : len(words) - 1] = words[:-1], words[1:]
                cleared += [row] * (extract.start == 0)
        ended = (lengths == 0).nonzero().flatten().tolist()
        state = advance(state, streams, cleared, ended)
        passage = model.read(tokens, state, lengths)
        state = passage.state
        log_probs = model.log_probs(passage.features).gather(2, target.unsqueeze(2)).squeeze(2)
        real = torch.arange(LENGTH) < lengths.unsqueeze(1)
        memory = sum(passage.losses.values()) * lengths.sum()
        of_memory += float(torch.as_tensor(memory).detach())
        (memory - log_probs[real].sum()).backward()
    return of_memory, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@memories
def test_gradients_are_those_of_documents_alone(variant):
    texts = [text for text in documents() if len(text) > 1]
    model = tiny_decoder(variant).train()
    of_memory, together = gradients(model, texts, 3)
    alone, one_by_one = gradients(model, texts, 1)
    assert of_memory == pytest.approx(alone, rel=1e-10) and (alone != 0) is model.memory.has_losses
    assert together.keys() == one_by_one.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, one_by_one[name], rtol=1e-9, atol=1e-9)


def read_some(model, segments=5, streams=4):
    """Yield the memory after each segment of streams of which some are cleared on the way, and one ends."""
    state = None
    for index, cleared in enumerate([(), (1,), (0, 3), (), (0,)][:segments]):
        state = advance(state, streams, cleared, (2,) if index > 2 else ())
        state = model.read(random_tokens(streams, LENGTH, seed=index), state).state
        yield state


def assert_reads_the_same(model, state, other, streams):
    """Two memories give the same features, to the last bit."""
    tokens = random_tokens(streams, LENGTH, seed=9)
    assert torch.equal(*(model.read(tokens, advance(each, streams)).features for each in (state, other)))


@memories
def test_saved_memories_of_ranks_are_joined_and_divided(variant):
    model = tiny_decoder(variant)
    for state in read_some(model):
        kind = model.memory.state
        both = join_batches([save_groups(state, 4), save_groups(state, 4)])
        for streams in (range(4), range(4, 8)):
            assert_reads_the_same(model, load_groups(both, kind, streams), state, 4)
        halves = [load_groups(both, kind, half) for half in (range(2), range(2, 4))]
        whole = load_groups(join_batches([save_groups(half, 2) for half in halves]), kind, range(4))
        assert_reads_the_same(model, whole, state, 4)


@memories
def test_streams_that_are_alike_again_are_read_together(variant):
    model = tiny_decoder(variant, mem_len=6, compression_rate=3)  # a rate that divides both lengths
    one, state = read_some(model, segments=2)  # streams of one segment and of two
    two = model.read(random_tokens(4, LENGTH), one).state
    differ = [t.shape for t in one.tensors()] != [t.shape for t in two.tensors()]
    assert isinstance(advance(state, 4), GroupedState) is differ
    for index in range(9):  # until the slots are full
        state = model.read(random_tokens(4, LENGTH, seed=index), advance(state, 4)).state
    assert not isinstance(advance(state, 4), GroupedState)
    assert advance(state, 4, range(4)) is None


def test_streams_that_are_not_there_are_refused():
    state = tiny_decoder().read(random_tokens(3, LENGTH)).state
    grouped = advance(state, 3, (1,))
    for before in (state, grouped):
        for cleared, ended in (((3,), ()), ((-1,), ()), ((), (3,))):
            with pytest.raises(ValueError, match=r"^there is no stream -?\d: pass streams to clear .* from 0 to 2$"):
                advance(before, 3, cleared, ended)
        with pytest.raises(ValueError, match=r"^num_streams is 2, and the state is of 3 streams: pass their number$"):
            advance(before, 2, (1,))


@memories
def test_clearing_twice_is_clearing_once(variant):
    model = tiny_decoder(variant)
    for state in read_some(model):
        once = advance(state, 4, (1,), (3,))
        assert_reads_the_same(model, advance(once, 4, (1,), (3,)), once, 4)
        assert_reads_the_same(model, advance(once, 4), once, 4)


def test_a_state_of_streams_that_go_on_is_left_alone():
    """CUDA graphs know the tensors of a segment that was begun early."""
    _, state = read_some(tiny_decoder(), segments=2)
    plain = advance(state.groups[0].state, 2)
    assert plain is state.groups[0].state


@memories
def test_memory_by_position_is_cleared_where_the_position_says_so(variant):
    """Whoever looks at it before it is read, and however often it is read."""
    model = tiny_decoder(variant)
    memory = StreamMemory(model.memory.state)
    first = SegmentPosition("train", 1, 100, LENGTH, (4, 5), 0)
    second = replace(first, index=1, cleared=(1,))
    third = replace(first, index=2, cleared=(0, 1))
    tokens, others = random_tokens(2, LENGTH), random_tokens(2, LENGTH, seed=2)

    def read(segment, position):
        passage = model.read(segment, memory.read(position, training=True))
        memory.write(position, True, passage.state)
        return passage.features

    assert memory.before(second) is None
    read(tokens, first)
    alone = model.read(others).features
    after = memory.saved(first)
    begun = memory.before(second)
    assert after is not None and memory.saved(first) is after  # a checkpoint of now does not depend on it
    assert memory.before(second) is begun and memory.read(second, training=True) is begun
    for _ in range(2):
        features = read(others, second)
        assert begun is None or memory.read(second, training=True).tensors()[0] is begun.tensors()[0]
        torch.testing.assert_close(features[1], alone[1], rtol=0, atol=1e-12)
        torch.testing.assert_close(features[0], model.read(others, after).features[0], rtol=0, atol=1e-12)
    assert memory.before(third) is None and memory.saved(second) is not None
    torch.testing.assert_close(read(tokens, third), model.read(tokens).features, rtol=0, atol=1e-12)


def test_a_stream_that_has_ended_may_begin_anew():
    model = tiny_decoder()
    *_, state = read_some(model)
    features = model.read(random_tokens(4, LENGTH), advance(state, 4, (2,))).features
    torch.testing.assert_close(features[2], model.read(random_tokens(4, LENGTH)).features[2], rtol=0, atol=1e-12)


def test_nothing_but_ended_streams():
    """A rank whose streams have ended still has a gradient for the others to wait for."""
    model = tiny_decoder().train()
    state = advance(None, 2, (), (0, 1))
    passage = model.read(random_tokens(2, LENGTH), state, torch.zeros(2, dtype=torch.int64))
    passage.features[torch.zeros(2, LENGTH, dtype=torch.bool)].sum().backward()
    assert all(not p.grad.any() for p in model.layers.parameters())
    assert advance(passage.state, 2) == state


lengths = st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(any)


@settings(max_examples=200, deadline=None)
@given(lengths=lengths, streams=st.integers(1, 9), segment=st.integers(1, 8), clear=st.booleans(), order=st.randoms())
def test_every_token_is_read_once_and_no_stream_waits(lengths, streams, segment, clear, order):
    deal = DocumentStreams(lengths, streams, segment, clear)
    read, begun, sizes = [], [], []
    for dealt in deal.dealt:
        assert dealt == sorted(dealt)
        stream = deal.stream(order.sample(dealt, len(dealt)))
        segments = [stream.segment(index) for index in range(deal.num_segments + 1)]
        assert segments[-1] == []
        tokens = [(e.document, t) for own in segments for e in own for t in range(e.start, e.stop)]
        read += tokens
        used = [sum(e.stop - e.start for e in own) for own in segments]
        sizes.append(sum(map(bool, used)))
        assert all(used[: sizes[-1]])  # and none is empty before the last
        begun += [index for index, own in enumerate(segments) for e in own if e.start == 0]
        if clear:
            assert all(len(own) <= 1 for own in segments)
        else:
            assert all(count == segment for count in used[: max(0, sizes[-1] - 1)])
    assert sorted(read) == [(d, t) for d, length in enumerate(lengths) for t in range(length)]
    assert max(sizes) == deal.num_segments
    assert max(begun) <= min(sizes)  # no stream ends while a document waits
